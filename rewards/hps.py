"""HPSv2: CLIP trained on people's rankings of images of one prompt, versions 2.0 and 2.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

from rewards.base import Images, Prompt, Scores
from rewards.checkpoints import Once, Placement, scorer_traits, scores_at, with_text
from rewards.clip_models import ClipSource, load_clip, paired_cosines
from rewards.names import nearest

Version = Literal["v2.0", "v2.1"]
FILES = {"v2.0": "xswu/HPSv2:HPS_v2_compressed.pt", "v2.1": "xswu/HPSv2:HPS_v2.1_compressed.pt"}
"""The published checkpoints: state dicts of open_clip's ViT-H-14."""


@dataclass(frozen=True)
class HPSSettings:
    """How HPSv2 is computed.

    Attributes:
        version: which checkpoint, "v2.1" or "v2.0"; their scores are not comparable.
        source: another CLIP in place of the published one of that version; a fine-tuned or a converted one.
        scale: the score is multiplied by it. 1 gives the cosine, as Flow-GRPO trains on; tables in papers have 100.
        placement: device, precision, batch size.

    Raises:
        ValueError: an unknown version, or a scale that is not a positive number.
    """

    version: Version = "v2.1"
    source: ClipSource | None = None
    scale: float = 1.0
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        if self.version not in FILES:
            near = nearest(self.version, get_args(Version))
            raise ValueError(f"version: expected 'v2.0' or 'v2.1', got {self.version!r}; the nearest is {near!r}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale: expected a positive number, got {self.scale}")

    @property
    def clip(self) -> ClipSource:
        """The CLIP that is loaded."""
        return self.source or ClipSource("ViT-H-14", "open_clip", FILES[self.version])


class HPS:
    """Human Preference Score v2, a reward of about 0.2 to 0.34 (before the scale).

    score = scale cos(E_I(image), E_T(prompt))

    Wu et al., arXiv:2306.09341; xswu/HPSv2, a CLIP ViT-H/14 of open_clip. Each image is compared with its own prompt
    alone; prompts are cut at 77 tokens. A prompt without text is not available.

    Differs: the published code runs in mixed precision and resizes the float tensor; this runs in ``placement.dtype``
    and resizes the image. The third digit differs.

    Raises:
        ValueError: open_clip is asked for, as by default, and not installed.
    """

    def __init__(self, settings: HPSSettings | None = None) -> None:
        self.settings = settings or HPSSettings()
        clip = self.settings.clip
        clip.require()
        self.traits = scorer_traits(
            "HPS", self.settings, self.settings.placement, published=FILES[self.settings.version]
        )
        self._clip = Once(partial(load_clip, clip, self.settings.placement))

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3], one prompt each -> [B]."""
        rows, reasons = with_text(prompts)
        cosines = paired_cosines(self._clip(), images[rows], [prompts[row].text for row in rows])
        return scores_at(self.settings.scale * cosines, rows, len(images), reasons)
