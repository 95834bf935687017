"""The configuration of a training run: one frozen dataclass, which is also the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agents.algorithms.base import Algorithm
from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.learner import LearnerSettings
from agents.policies.weights import LoraSettings
from agents.samplers import ODE, Sampler
from pdtr.curriculum import Curriculum, pdtr_curriculum


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
    chunk_size: int = 60
    num_grid: int = 12


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        output_dir: where everything of the run goes.
        base: folder of the policy to start from; the one that ships with the package when empty.
        algorithm: what is descended, and how rollouts are drawn.
        curriculum: what is practised when.
        num_prompts: prompts an iteration.
        group_size: samples a prompt.
        chunk_size: samples drawn at once; divides num_prompts x group_size.
        learning_rate: AdamW's.
        weight_decay: AdamW's.
        learner: optimiser steps on a rollout.
        lora: train adapters instead of every parameter.
        evaluation: see :class:`EvaluationConfig`.
        checkpoint_every: iterations between checkpoints.
        keep_checkpoints: how many are kept.
        num_threads: torch threads.
        seed: of everything.
    """

    output_dir: Path = Path("runs/pdtr_scenes")
    base: Path | None = None
    algorithm: Algorithm = field(default_factory=DiffusionNFT)
    curriculum: Curriculum = field(default_factory=lambda: pdtr_curriculum(40, 40))
    num_prompts: int = 8
    group_size: int = 12
    chunk_size: int = 24
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    lora: LoraSettings | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint_every: int = 10
    keep_checkpoints: int = 3
    num_threads: int = 2
    seed: int = 0
    world: Literal["scenes"] = "scenes"
