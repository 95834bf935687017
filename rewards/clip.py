"""CLIPScore: how well an image goes with its prompt, by the cosine of CLIP's features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rewards.base import Images, Prompt, Scores
from rewards.checkpoints import Once, Placement, scorer_traits, scores_at, with_text
from rewards.clip_models import ClipSource, load_clip, paired_cosines


@dataclass(frozen=True)
class CLIPScoreSettings:
    """How CLIPScore is computed; the defaults are those of Flow-GRPO's ``clipscore``, see :class:`CLIPScore`.

    Attributes:
        source: which CLIP; the default is OpenAI's ViT-L/14. ``ClipSource("openai/clip-vit-large-patch14")`` has the
            same weights and needs transformers alone.
        weight: w. Hessel et al. have 2.5, which stretches the score to about [0, 1].
        clamp: whether a negative cosine is 0, as in Hessel et al.
        prefix: goes before the prompt; theirs is "A photo depicts ".
        placement: device, precision, batch size.

    Raises:
        ValueError: a weight that is not a positive number.
    """

    source: ClipSource = field(default_factory=lambda: ClipSource("ViT-L-14", "open_clip", "openai"))
    weight: float = 1.0
    clamp: bool = False
    prefix: str = ""
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: expected a positive number, got {self.weight}")


def hessel_settings(placement: Placement | None = None) -> CLIPScoreSettings:
    """CLIPScore as it was published (arXiv:2104.08718): ViT-B/32, w = 2.5, clamped, "A photo depicts "."""
    source = ClipSource("ViT-B-32", "open_clip", "openai")
    return CLIPScoreSettings(source, 2.5, True, "A photo depicts ", placement or Placement())


class CLIPScore:
    """CLIPScore, a reward in about [0.1, 0.4] with the default settings.

    score = w cos(E_I(image), E_T(prefix + prompt)), or w max(cos, 0) with ``clamp``

    Hessel et al., arXiv:2104.08718. Flow-GRPO's reward is CLIP's logit divided by 100, which is the cosine, for
    OpenAI's temperature is 100. Each image is compared with its own prompt alone; prompts are cut at 77 tokens. A
    prompt without text is not available.

    Differs: Flow-GRPO resizes the float tensor, this the image; the third digit differs.

    Raises:
        ValueError: open_clip is asked for and not installed.
    """

    def __init__(self, settings: CLIPScoreSettings | None = None) -> None:
        self.settings = settings or CLIPScoreSettings()
        self.settings.source.require()
        self.traits = scorer_traits("CLIPScore", self.settings, self.settings.placement)
        self._clip = Once(partial(load_clip, self.settings.source, self.settings.placement))

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3], one prompt each -> [B]."""
        rows, reasons = with_text(prompts)
        texts = [self.settings.prefix + prompts[row].text for row in rows]
        cosines = paired_cosines(self._clip(), images[rows], texts)
        values = self.settings.weight * (np.maximum(cosines, 0) if self.settings.clamp else cosines)
        return scores_at(values, rows, len(images), reasons)
