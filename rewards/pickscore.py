"""PickScore: CLIP trained on people's choices between two images of one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from rewards.base import Images, Prompt, Scores
from rewards.checkpoints import Once, Placement, scorer_traits, scores_at, with_text
from rewards.clip_models import ClipSource, load_clip, paired_cosines


@dataclass(frozen=True)
class PickScoreSettings:
    """How PickScore is computed.

    Attributes:
        source: which CLIP; the default is the published one. Its repository has no processor, so that of the CLIP it
            was trained from is taken, as its authors do.
        divisor: the score is divided by it. 1 gives the published scale; Flow-GRPO divides by 26, DiffusionNFT too, so
            that the reward is near 1.
        placement: device, precision, batch size.

    Raises:
        ValueError: a divisor that is not a positive number.
    """

    source: ClipSource = field(
        default_factory=lambda: ClipSource(
            "yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        )
    )
    divisor: float = 1.0
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        if not 0 < self.divisor < math.inf:
            raise ValueError(f"divisor: expected a positive number, got {self.divisor}")


class PickScore:
    """PickScore, a reward of about 18 to 26 (before the divisor).

    score = exp(logit_scale) cos(E_I(image), E_T(prompt)) / divisor

    Kirstain et al., Pick-a-Pic, arXiv:2305.01569; yuvalkirstain/PickScore_v1, a CLIP ViT-H/14. Each image is compared
    with its own prompt alone; prompts are cut at 77 tokens, so that the end of a long one counts for nothing. A prompt
    without text is not available.

    Raises:
        ValueError: open_clip is asked for and not installed.
    """

    def __init__(self, settings: PickScoreSettings | None = None) -> None:
        self.settings = settings or PickScoreSettings()
        self.settings.source.require()
        self.traits = scorer_traits("PickScore", self.settings, self.settings.placement)
        self._clip = Once(partial(load_clip, self.settings.source, self.settings.placement))

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3], one prompt each -> [B]."""
        rows, reasons = with_text(prompts)
        clip = self._clip()
        cosines = paired_cosines(clip, images[rows], [prompts[row].text for row in rows])
        return scores_at(clip.logit_scale * cosines / self.settings.divisor, rows, len(images), reasons)
