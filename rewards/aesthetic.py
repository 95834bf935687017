"""LAION's aesthetic predictor: how much people like to look at an image, whatever it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rewards.base import Images, Prompt, Scores
from rewards.checkpoints import Once, Placement, check_source, load_tensors, local_file, scorer_traits, scores_at
from rewards.clip_models import ClipModel, ClipSource, load_clip
from rewards.linear_heads import linear_head

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AestheticSettings:
    """How the aesthetic score is computed.

    Attributes:
        source: which CLIP; the head is made for OpenAI's ViT-L/14.
        head: a path or "owner/model:file" of the hub. The default is a copy of ``sac+logos+ava1-l14-linearMSE.pth``,
            the file that DDPO and Flow-GRPO use.
        placement: device, precision and batch size; the head is in float32 always.

    Raises:
        ValueError: a path that leads nowhere.
    """

    source: ClipSource = field(default_factory=lambda: ClipSource("openai/clip-vit-large-patch14"))
    head: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        check_source("head", self.head)


class Aesthetic:
    """The aesthetic score, a reward of about 1 to 10; prompts do not matter.

    score = head(E_I(image) / |E_I(image)|), see :mod:`rewards.linear_heads`

    Schuhmann, improved-aesthetic-predictor, the head ``sac+logos+ava1-l14-linearMSE.pth``; as a reward in DDPO,
    arXiv:2305.13301. Trained on alone it rewards saturated colours and forgets the prompt.

    Raises:
        ValueError: open_clip is asked for and not installed.
    """

    def __init__(self, settings: AestheticSettings | None = None) -> None:
        self.settings = settings or AestheticSettings()
        self.settings.source.require()
        self.traits = scorer_traits("Aesthetic", self.settings, self.settings.placement)
        self._models = Once(self._load)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] -> [B].

        Raises:
            ValueError: the head's width is not that of CLIP's features.
        """
        import torch

        clip, head = self._models()
        if not len(images):
            return scores_at(images.mean((1, 2, 3)), [], 0)
        features = clip.image_features(images)
        if features.shape[-1] != (width := head[0].in_features):
            raise ValueError(
                f"Aesthetic: expected a CLIP with features of the head's width, {width}, got {features.shape[-1]}; "
                "the published head goes with openai/clip-vit-large-patch14"
            )
        with torch.no_grad():
            values = head(features)[:, 0].double().cpu().numpy()
        return scores_at(values, range(len(images)), len(images))

    def _load(self) -> tuple[ClipModel, torch.nn.Sequential]:
        placement = self.settings.placement
        head = linear_head(load_tensors(local_file(self.settings.head)), self.settings.head)
        return load_clip(self.settings.source, placement), head.to(placement.device)
