"""GenEval's colours: which of ten colours an object has, by CLIP, on its mask alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.base import Images
from rewards.checkpoints import Once, Placement
from rewards.clip_models import ClipSource, load_clip
from rewards.relations import Box

if TYPE_CHECKING:
    import torch

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
BACKGROUND = (0x99, 0x99, 0x99)


@dataclass(frozen=True)
class ColorSettings:
    """Which CLIP tells colours apart; GenEval's is open_clip's ViT-L-14 with OpenAI's weights.

    Attributes:
        source: which CLIP. ``ClipSource("openai/clip-vit-large-patch14")`` has the same weights without open_clip.
        placement: device and precision.
    """

    source: ClipSource = field(default_factory=lambda: ClipSource("ViT-L-14", "open_clip", "openai"))
    placement: Placement = field(default_factory=Placement)


class ColorClassifier:
    """The colour of an object, as GenEval decides it (arXiv:2310.11513, ``evaluate_images.py``).

    color = argmax_c cos(E_I(crop), w_c),  w_c = unit(mean over the templates of unit(E_T(template(c, class))))

    The crop is the box's content with everything outside the object's mask painted #999; without a mask, as it is.

    Raises:
        ValueError: open_clip is asked for, as by default, and not installed.
    """

    def __init__(self, settings: ColorSettings | None = None) -> None:
        self.settings = settings or ColorSettings()
        self.settings.source.require()
        self._clip = Once(partial(load_clip, self.settings.source, self.settings.placement))
        self._weights: dict[str, torch.Tensor] = {}

    def facts(self) -> dict[str, object]:
        """What its answers depend on, for fingerprints."""
        return {**asdict(self.settings.source), "dtype": self.settings.placement.dtype}

    def __call__(
        self, image: Images, boxes: Sequence[Box], masks: Sequence[NDArray[np.bool_] | None], label: str
    ) -> list[str | None]:
        """The colour of each box of one class in an image uint8 [H, W, 3]; None for a box without area."""
        crops = [color_crop(image, box, mask) for box, mask in zip(boxes, masks, strict=True)]
        rows = [row for row, crop in enumerate(crops) if crop.size]
        colors: list[str | None] = [None] * len(crops)
        if rows:
            similarities = self._clip().image_features([crops[row] for row in rows]) @ self._of(label).T
            for row, best in zip(rows, similarities.argmax(-1).tolist(), strict=True):
                colors[row] = COLORS[best]
        return colors

    def _of(self, label: str) -> torch.Tensor:
        if label not in self._weights:
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            features = self._clip().text_features(texts)
            means = features.reshape(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._weights[label] = means / means.norm(dim=-1, keepdim=True)
        return self._weights[label]


def color_crop(image: Images, box: Box, mask: NDArray[np.bool_] | None) -> Images:
    """A box's content, grey (#999) outside the mask.

    Parts of a box outside the image are black, as Pillow's ``crop`` leaves them; a box without area gives an image
    without pixels.
    """
    left, top, right, bottom = (round(edge) for edge in box)
    if right <= left or bottom <= top:
        return image[:0, :0]
    shown = image if mask is None else np.where(mask[..., None], image, np.array(BACKGROUND, np.uint8))
    return np.asarray(Image.fromarray(shown).crop((left, top, right, bottom)))
