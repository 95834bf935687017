"""The rewards of published runs as a ``RewardSource``: weights in every process, a judge, or a reward server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.served_rewards import EditJudge, RemoteScorer
from pdtr.run_settings import MAY_CHANGE
from rewards.detected import Reading

if TYPE_CHECKING:
    from rewards.base import Reward
    from rewards.checkpoints import Placement

# From here on a name with two slashes is a folder, and not a repository of the hub.
_FOLDER_PARTS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditRewardWeights:
    """A learnt edit reward, see ``rewards.edit_reward.EditReward``.

    Skywork-EditReward (arXiv:2509.04548) has not been published, so it is a checkpoint of one's own.

    Attributes:
        checkpoint: folder of a trained edit reward, or its name on the hub.
        dtype: of its weights.
        batch_size: most edits of a forward pass.
        device: torch's name of where it runs, such as "cuda:1"; the process's own GPU, or the CPU, unless given.
    """

    checkpoint: str = "runs/edit_reward/model"
    dtype: str = "bfloat16"
    batch_size: int = 16
    device: str = field(default="", metadata=MAY_CHANGE)

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
                "train one (pdtr edit-reward train --base Qwen/Qwen2.5-VL-7B-Instruct --data SCORED_EDITS), name one, "
                "or another reward: --rewards.edit-by judge, or remote; --tasks.edit-reward MODULE:REWARD"
            )
        if path.exists():
            checkpoint_folder(self.checkpoint)
        device = _placement(self.device).device
        return EditReward(self.checkpoint, dtype=self.dtype, batch_size=self.batch_size, device=device)


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
        device: as in :class:`EditRewardWeights`, of both networks.
    """

    detector: str = "facebook/mask2former-swin-small-coco-instance"
    colors: str = "openai/clip-vit-large-patch14"
    reading: Reading = "dense"
    published_quirks: bool = False
    device: str = field(default="", metadata=MAY_CHANGE)

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

        detector = InstanceDetector(DetectorSettings(self.detector, placement=_placement(self.device)))
        colors = ColorClassifier(ColorSettings(ClipSource(self.colors), _placement(self.device)))
        return DetectedGenEval(detector, colors, GenEvalRule(published_quirks=self.published_quirks), self.reading)


@dataclass(frozen=True)
class PickScoreWeights:
    """PickScore, see ``rewards.pickscore.PickScore``.

    Attributes:
        model: folder or hub name of its CLIP.
        processor: of tokenizer and picture settings, where the model has none.
        divisor: 26 in Flow-GRPO, so that a reward is near 1.
        device: as in :class:`EditRewardWeights`.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    divisor: float = 26.0
    device: str = field(default="", metadata=MAY_CHANGE)

    def make(self) -> Reward:
        """The reward, not loaded yet.

        Raises:
            ValueError: a folder that is not there.
        """
        from rewards.clip_models import ClipSource
        from rewards.pickscore import PickScore, PickScoreSettings

        source = ClipSource(self.model, processor=self.processor)
        return PickScore(PickScoreSettings(source, self.divisor, _placement(self.device)))


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
    """The rewards of a run by task: weights in every process, or what other machines serve.

    Attributes:
        edit: weights that reward edits; None where the run has none.
        t2i: weights that reward text-to-image; None where the run has none.
        edit_by: what rewards edits: the weights, the judge, or the server of edit_remote.
        t2i_by: what rewards text-to-image: the weights, or the server of t2i_remote.
        judge: of edits.
        edit_remote: of edits.
        t2i_remote: of text-to-image, such as GenEval with a detector that needs an environment of its own.

    Raises:
        ValueError: a judge or a server is named that nothing asks, or asked that is not named.
    """

    edit: EditRewardWeights | None = None
    t2i: GenEvalWeights | PickScoreWeights | OCRReader | None = None
    edit_by: Literal["weights", "judge", "remote"] = "weights"
    t2i_by: Literal["weights", "remote"] = "weights"
    judge: EditJudge = field(default_factory=EditJudge)
    edit_remote: RemoteScorer = field(default_factory=RemoteScorer)
    t2i_remote: RemoteScorer = field(default_factory=RemoteScorer)

    def __post_init__(self) -> None:
        if self.edit_by != "judge" and self.judge != EditJudge():
            raise ValueError(
                f"rewards.judge: expected no settings where edits are rewarded by {self.edit_by}, got {self.judge}; "
                "add --rewards.edit-by judge"
            )
        for task, by, remote in (("edit", self.edit_by, self.edit_remote), ("t2i", self.t2i_by, self.t2i_remote)):
            if by != "remote" and remote != RemoteScorer():
                raise ValueError(
                    f"rewards.{task}_remote: expected no settings where {task} is rewarded by {by}, got {remote}; "
                    f"add --rewards.{task}-by remote"
                )
            if by == "remote" and not remote.url:
                raise ValueError(
                    f"rewards.{task}_remote.url: expected where a reward server is (pdtr reward serve MODULE:REWARD), "
                    f"got none; add --rewards.{task}-remote.url URL"
                )

    @property
    def unused_settings(self) -> tuple[str, ...]:
        """The fields that nobody asks, such as a judge, of which the environment may say more, where weights reward."""
        used = {"edit": {"weights": "edit", "judge": "judge", "remote": "edit_remote"}[self.edit_by]}
        used["t2i"] = {"weights": "t2i", "remote": "t2i_remote"}[self.t2i_by]
        makers = ("edit", "t2i", "judge", "edit_remote", "t2i_remote")
        return tuple(name for name in makers if name not in used.values())

    def make_rewards(self) -> Mapping[str, Reward]:
        """The rewards by task; each is made when it is asked for: a judge and a server are tried, weights not loaded.

        Asking for one raises ValueError: a folder that is not there, a package that is not installed, no server that
        answers.
        """
        makes: dict[str, Callable[[], Reward]] = {}
        for task, by, weights in (("edit", self.edit_by, self.edit), ("t2i", self.t2i_by, self.t2i)):
            if by == "judge":
                makes[task] = self.judge.make
            elif by == "remote":
                remote = self.edit_remote if task == "edit" else self.t2i_remote
                makes[task] = partial(remote.make, f"--rewards.{task}-remote.url")
            elif weights is not None:
                makes[task] = weights.make
            if by != "weights" and weights is not None and weights != type(weights)():
                logger.warning("%s is rewarded by %s: %s is not used", task, by, weights)
        return _MadeWhenAsked(makes)


class _MadeWhenAsked(Mapping[str, "Reward"]):
    """Rewards of which nobody has to serve, or to have, one that a task of its own reward never asks for."""

    def __init__(self, makes: Mapping[str, Callable[[], Reward]]) -> None:
        self._makes = makes
        self._made: dict[str, Reward] = {}

    def __getitem__(self, task: str) -> Reward:
        if task not in self._made:
            self._made[task] = self._makes[task]()
        return self._made[task]

    def __contains__(self, task: object) -> bool:
        # Mapping's own asks for the value.
        return task in self._makes

    def __iter__(self) -> Iterator[str]:
        return iter(self._makes)

    def __len__(self) -> int:
        return len(self._makes)


def _placement(device: str) -> Placement:
    """The device that was named, or else this process's own."""
    from rewards.checkpoints import Placement

    return Placement(device or own_device())


def own_device() -> str:
    """The GPU of this process by its number, where it has one: in another thread "cuda" alone is the first one."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
