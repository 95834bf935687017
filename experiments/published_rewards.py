"""The rewards of published runs as a ``RewardSource``: which weights, where they run; loaded with the first picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rewards.detected import Reading

if TYPE_CHECKING:
    from rewards.base import Reward
    from rewards.checkpoints import Placement

# From here on a name with two slashes is a folder, and not a repository of the hub.
_FOLDER_PARTS = 3


@dataclass(frozen=True)
class EditRewardWeights:
    """A learnt edit reward, see ``rewards.edit_reward.EditReward``.

    Skywork-EditReward (arXiv:2509.04548) has not been published, so it is a checkpoint of one's own.

    Attributes:
        checkpoint: folder of a trained edit reward, or its name on the hub.
        dtype: of its weights.
        batch_size: most edits of a forward pass.
    """

    checkpoint: str = "runs/edit_reward/model"
    dtype: str = "bfloat16"
    batch_size: int = 16

    def make(self) -> Reward:
        """The reward, not loaded yet.

        Raises:
            ValueError: there is no such checkpoint.
        """
        from rewards.edit_reward import EditReward, checkpoint_folder

        path = Path(self.checkpoint)
        if not path.is_dir() and len(path.parts) >= _FOLDER_PARTS:
            raise ValueError(
                f"rewards.edit.checkpoint: expected a trained edit reward, got {self.checkpoint!r}, no folder; "
                "train one (pdtr edit-reward train --base Qwen/Qwen2.5-VL-7B-Instruct --data SCORED_EDITS), or name one"
            )
        if path.exists():
            checkpoint_folder(self.checkpoint)
        return EditReward(self.checkpoint, dtype=self.dtype, batch_size=self.batch_size)


@dataclass(frozen=True)
class GenEvalWeights:
    """The GenEval rule over what a detector of transformers finds, see ``rewards.detected.DetectedGenEval``.

    Differs: the published runs have GenEval's own Mask2Former (mmdet's); this one has the same architecture and other
    weights, so rewards are called "not comparable".

    Attributes:
        detector: folder or hub name of a Mask2Former.
        colors: folder or hub name of a CLIP that tells colours apart; GenEval's own weights unless given.
        reading: "dense" is trained on, "strict" and "official" are measured beside it.
        published_quirks: Flow-GRPO's reward to the letter, its slips included.
    """

    detector: str = "facebook/mask2former-swin-small-coco-instance"
    colors: str = "openai/clip-vit-large-patch14"
    reading: Reading = "dense"
    published_quirks: bool = False

    def make(self) -> Reward:
        """The reward, not loaded yet.

        Raises:
            ValueError: a folder that is not there.
        """
        from rewards.clip_models import ClipSource
        from rewards.colors import ColorClassifier, ColorSettings
        from rewards.detected import DetectedGenEval
        from rewards.detectors import DetectorSettings, InstanceDetector
        from rewards.geneval import GenEvalRule

        detector = InstanceDetector(DetectorSettings(self.detector, placement=_placement()))
        colors = ColorClassifier(ColorSettings(ClipSource(self.colors), _placement()))
        return DetectedGenEval(detector, colors, GenEvalRule(published_quirks=self.published_quirks), self.reading)


@dataclass(frozen=True)
class PickScoreWeights:
    """PickScore, see ``rewards.pickscore.PickScore``.

    Attributes:
        model: folder or hub name of its CLIP.
        processor: of tokenizer and picture settings, where the model has none.
        divisor: 26 in Flow-GRPO, so that a reward is near 1.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    divisor: float = 26.0

    def make(self) -> Reward:
        """The reward, not loaded yet.

        Raises:
            ValueError: a folder that is not there.
        """
        from rewards.clip_models import ClipSource
        from rewards.pickscore import PickScore, PickScoreSettings

        source = ClipSource(self.model, processor=self.processor)
        return PickScore(PickScoreSettings(source, self.divisor, _placement()))


@dataclass(frozen=True)
class OCRReader:
    """Text rendering, see ``rewards.ocr.OCR``; its networks come with the package that reads.

    Attributes:
        min_confidence: lines that were read with less are left out.
        excess_penalty: for more text than was asked for; none in Flow-GRPO.
    """

    min_confidence: float = 0.5
    excess_penalty: float = 0.0

    def make(self) -> Reward:
        """The reward, not loaded yet.

        Raises:
            ValueError: RapidOCR is not installed.
        """
        from rewards.ocr import OCR, OCRSettings

        return OCR(OCRSettings(self.min_confidence, self.excess_penalty))


@dataclass(frozen=True)
class PublishedRewards:
    """The rewards of a run by task.

    Attributes:
        edit: of edits; None where the run has none.
        t2i: of text-to-image; None where the run has none.
    """

    edit: EditRewardWeights | None = None
    t2i: GenEvalWeights | PickScoreWeights | OCRReader | None = None

    def make_rewards(self) -> Mapping[str, Reward]:
        """The rewards by task, not loaded yet.

        Raises:
            ValueError: a folder that is not there, or a package that is not installed.
        """
        given = {"edit": self.edit, "t2i": self.t2i}
        return {name: weights.make() for name, weights in given.items() if weights is not None}


def _placement() -> Placement:
    """The GPU of this process where it has one."""
    import torch

    from rewards.checkpoints import Placement

    return Placement("cuda" if torch.cuda.is_available() else "cpu")
