"""Trainings of a tiny edit reward, as functions that several processes can run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rewards.edit_reward_training import TrainingConfig, train_edit_reward


@dataclass(frozen=True)
class EditRewardJob:
    """One training; fields as :class:`TrainingConfig` has them.

    Attributes:
        data: folder of edits.
        base: where it starts from.
        output_dir: where it goes.
        batch_size: pairs of a step in each process.
        lora_rank: of adapters.
        bradley_terry_weight: of the loss on pairs.
    """

    data: str
    base: str
    output_dir: str
    batch_size: int
    lora_rank: int = 0
    bradley_terry_weight: float = 1.0


def told(jobs: list[EditRewardJob]) -> str:
    """What :func:`main` is told: text, which any way of starting a process can carry."""
    return json.dumps([asdict(job) for job in jobs])


def main(text: str) -> None:
    """Train one after the other."""
    for job in json.loads(text):
        train_edit_reward(config_of(EditRewardJob(**job)))


def config_of(job: EditRewardJob) -> TrainingConfig:
    """Its settings, of eight steps or so."""
    values: dict[str, Any] = {field.name: getattr(job, field.name) for field in fields(job)}
    values |= {"data": Path(job.data), "output_dir": Path(job.output_dir)}
    return TrainingConfig(**values, num_epochs=4, learning_rate=1e-3)
