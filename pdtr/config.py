"""The configuration of a training run: one frozen dataclass, which is also the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast, get_args

from agents.algorithms.base import Algorithm, changed
from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.functional import check_choice
from agents.learner import LearnerSettings
from agents.policies.backbone import BackboneSettings
from agents.policies.weights import LoraSettings
from agents.samplers import ODE, Sampler
from pdtr.adaptive import Adaptive
from pdtr.aggregation import Aggregation, check_weights
from pdtr.curriculum import Curriculum, StageCurriculum, pdtr_curriculum, split_prompts
from pdtr.missing import MissingSettings
from pdtr.processes import ProcessSettings
from pdtr.reward_source import GroundTruth, RewardSource
from pdtr.run_settings import MAY_CHANGE
from pdtr.stages import Stage
from pdtr.task_source import ScenesTasks, TaskSource


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation of both tasks: fixed prompts, fixed seeds.

    Attributes:
        num_prompts: held-out prompts a task while training, for the curves and for stages' ends.
        num_final_prompts: held-out prompts a task for the table of base and stages; never used for choosing.
        every: iterations between evaluations.
        sampler: how evaluation images are drawn.
        chunk_size: images drawn at once.
        num_grid: prompts a task that are shown before and after.
    """

    num_prompts: int = 120
    num_final_prompts: int = 600
    every: int = 20
    sampler: Sampler = field(default_factory=ODE)
    chunk_size: int = field(default=60, metadata=MAY_CHANGE)
    num_grid: int = 12

    def __post_init__(self) -> None:
        _at_least_one(self, "num_prompts", "num_final_prompts", "every", "chunk_size")
        if self.num_grid < 0:
            raise ValueError(f"evaluation: expected num_grid of 0 or more, got {self.num_grid}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        output_dir: where everything of the run goes.
        base: folder of the policy to start from, a published model's in diffusers' layout, or the latter's name on the
            hub; the base that ships with the package when empty.
        backbone: size, precision and memory of a published model; those that its folder was saved with, or else the
            defaults, when empty.
        algorithm: what is descended, and how rollouts are drawn.
        curriculum: what is practised when.
        tasks: what is practised and measured: the embedded world, or files of prompts with their rewards.
        rewards: what is trained on in place of the embedded world's ground truth, which is measured all the same; on
            files of prompts, where they name no reward.
        num_prompts: prompts an iteration.
        group_size: samples a prompt.
        chunk_size: samples drawn at once; divides num_prompts x group_size.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
        learner: optimiser steps on a rollout.
        missing: what follows from rewards that are not available.
        panel_groups: groups of an iteration whose images the hacking panel describes; 0 for none.
        aggregation: how several rewards become one: "sum_then_normalize" adds the weighed components to the total, or
            "normalize_then_sum", which first makes each comparable within its group (GDPO, arXiv:2601.05242); it needs
            weights of components in every stage, and has the total only where that is weighed too.
        reward_std_floor: least deviation that "normalize_then_sum" divides by, in units of the rewards: less than what
            they really differ by within a group, and more than their noise.
        lora: train adapters instead of every parameter.
        evaluation: see :class:`EvaluationConfig`.
        checkpoint_every: iterations between checkpoints.
        keep_checkpoints: how many are kept.
        processes: how several processes share the run.
        num_threads: torch threads of each process.
        seed: of everything.
    """

    output_dir: Path = field(default=Path("runs/pdtr_scenes"), metadata=MAY_CHANGE)
    base: Path | None = None
    backbone: BackboneSettings | None = None
    algorithm: Algorithm = field(default_factory=DiffusionNFT)
    # Its state, which a checkpoint has, is checked there: iterations may be added.
    curriculum: Curriculum = field(default_factory=lambda: pdtr_curriculum(40, 40), metadata=MAY_CHANGE)
    tasks: TaskSource = field(default_factory=ScenesTasks)
    rewards: RewardSource = field(default_factory=GroundTruth)
    num_prompts: int = 8
    group_size: int = 12
    chunk_size: int = 24
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    missing: MissingSettings = field(default_factory=MissingSettings)
    aggregation: Aggregation = "sum_then_normalize"
    reward_std_floor: float = 0.05
    panel_groups: int = 3
    lora: LoraSettings | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint_every: int = field(default=10, metadata=MAY_CHANGE)
    keep_checkpoints: int = field(default=3, metadata=MAY_CHANGE)
    processes: ProcessSettings = field(default_factory=ProcessSettings, metadata=MAY_CHANGE)
    num_threads: int = field(default=2, metadata=MAY_CHANGE)
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("num_prompts", "group_size", "chunk_size", "checkpoint_every", "keep_checkpoints", "num_threads")
        _at_least_one(self, *names)
        if not self.learning_rate > 0 or self.weight_decay < 0:
            raise ValueError(
                "expected learning_rate above 0 and weight_decay of 0 or more, "
                f"got {self.learning_rate} and {self.weight_decay}"
            )
        total = self.num_prompts * self.group_size
        if total % self.chunk_size:
            raise ValueError(
                f"chunk_size: expected a divisor of num_prompts x group_size = {self.num_prompts} x {self.group_size} "
                f"= {total}, got {self.chunk_size}; {math.gcd(total, self.chunk_size)} would do"
            )
        if not self.reward_std_floor > 0:
            raise ValueError(f"reward_std_floor: expected a number above 0, got {self.reward_std_floor}")
        if self.panel_groups < 0:
            raise ValueError(f"panel_groups: expected 0 or more, got {self.panel_groups}")
        check_choice("aggregation", self.aggregation, get_args(Aggregation))
        if self.aggregation == "normalize_then_sum":
            _check_normalized(self)
        _check_parts(self)
        if self.learner.num_minibatches > total // self.chunk_size:
            raise ValueError(
                f"learner.num_minibatches: expected at most the iteration's {total // self.chunk_size} chunks, "
                f"got {self.learner.num_minibatches}; lower it or chunk_size"
            )


def _at_least_one(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(config, name)}")


def _check_normalized(config: TrainConfig) -> None:
    """What "normalize_then_sum" normalises are components, and nothing undoes the floor under their deviations."""
    settings = {entry.name: getattr(config.algorithm, entry.name) for entry in fields(cast(Any, config.algorithm))}
    if settings.get("advantage_std") == "group":
        raise ValueError(
            'algorithm.advantage_std: expected "global", GDPO\'s, or "none" with aggregation "normalize_then_sum", got '
            '"group": divided by its deviation once more, a group that hardly differs is as loud as any other'
        )
    for stage in known_stages(config.curriculum) or ():
        check_weights([stage.weights(i) for i in range(stage.num_iterations)], f"stage {stage.name!r}: ")


def weighed_components(curriculum: Curriculum) -> dict[str, float]:
    """The largest weight, by its size, that a curriculum's stages give each component; nothing of other curricula."""
    found: dict[str, float] = {}
    for stage in known_stages(curriculum) or ():
        for weights in map(stage.weights, range(stage.num_iterations)):
            found |= {name: max(found.get(name, 0.0), weight, key=abs) for name, weight in weights.items()}
    return {name: weight for name, weight in found.items() if weight and name != "total"}


def known_stages(curriculum: Curriculum) -> tuple[Stage, ...] | None:
    """A curriculum's stages, an adaptive one's within; None of one that is not made of stages."""
    while isinstance(curriculum, Adaptive):
        curriculum = curriculum.inner
    return curriculum.as_stages() if isinstance(curriculum, StageCurriculum) else None


def _check_parts(config: TrainConfig) -> None:
    """In every stage each task's share of an iteration fills whole chunks, and the algorithm's changes fit it."""
    for stage in config.curriculum.as_stages() if isinstance(config.curriculum, StageCurriculum) else ():
        try:
            changed(config.algorithm, stage.algorithm)
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}: {error}") from error
        for iteration in range(max(1, len(stage.cycle))):
            for task, count in split_prompts(config.num_prompts, stage.shares(iteration)).items():
                if count * config.group_size % config.chunk_size:
                    raise ValueError(
                        f"stage {stage.name!r}: its {count} prompts of {task!r} x group_size {config.group_size} do "
                        f"not fill chunks of {config.chunk_size}; choose a chunk_size that divides "
                        f"{count * config.group_size}, or another mixture"
                    )
