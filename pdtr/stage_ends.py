"""What a run keeps of each stage's end: the weights that were evaluated there, for good, among its checkpoints.

    checkpoints/stage-000040-edit/

A checkpoint but for what only the run's continuation needs: one version of the weights, which are the adapters where
adapters are trained, in place of every version and the optimiser's state. ``pdtr export`` makes a policy of it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pdtr.checkpoint import save_state

if TYPE_CHECKING:
    from torch import Tensor

_NAME = re.compile(r"stage-(\d{6,})-(.+)")
# Of a stage's name, so many letters are in that of a folder.
_LETTERS = 64


class StageEnd(NamedTuple):
    """The weights of a stage's end.

    Attributes:
        folder: that has them.
        iteration: of the run, after which the stage ended.
        stage: its name, as far as a folder's name can have it.
    """

    folder: Path
    iteration: int
    stage: str


def folder_part(stage_name: str) -> str:
    """A stage's name as a part of a folder's: without separators, and not too long."""
    return re.sub(r"[^\w.-]", "_", stage_name)[:_LETTERS]


def save_stage_end(
    checkpoints: Path, tensors: Mapping[str, Tensor], iteration: int, stage_name: str, version: str
) -> Path:
    """Keep the weights of a stage's end; -> their folder. The same end, reached again, takes the old one's place.

    Args:
        checkpoints: the run's folder of checkpoints.
        tensors: named as in a checkpoint, whole.
        iteration: of the run, after which the stage ended.
        stage_name: as the curriculum has it.
        version: of the weights: the one that is evaluated.
    """
    folder = checkpoints / f"stage-{iteration:06d}-{folder_part(stage_name)}"
    save_state(folder, tensors, {"kind": "stage", "iteration": iteration, "stage_name": stage_name, "version": version})
    return folder


def stage_ends(checkpoints: Path) -> list[StageEnd]:
    """What a run's folder of checkpoints has of stages' ends, by rising iteration."""
    if not checkpoints.is_dir():
        return []
    found = [(path, _NAME.fullmatch(path.name)) for path in checkpoints.iterdir() if path.is_dir()]
    return sorted(
        (StageEnd(path, int(match[1]), match[2]) for path, match in found if match is not None),
        key=lambda end: end.iteration,
    )


def drop_stage_ends(checkpoints: Path, iteration: int) -> None:
    """Delete what was kept after an iteration, of a run that goes on from there."""
    for end in stage_ends(checkpoints):
        if end.iteration > iteration:
            shutil.rmtree(end.folder)
