"""Supervised data for joint pre-training: prompts with pictures, instructions with both pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from envs.scenes.edits import EditTask, instruction, sample_edit
from envs.scenes.grammar import Metadata, SceneTask, Split, sample_task, scene_for
from envs.scenes.mislabelling import wrong_metadata, wrong_operations
from envs.scenes.render import render

# How often each skill is shown: the ones that are learnt late more often than those that they contain.
T2I_SHARES = {"single_object": 1, "two_object": 3, "counting": 2, "colors": 1, "position": 4, "color_attr": 4}
EDIT_SHARES = {"recolor": 2, "remove": 2, "add": 1, "move": 3, "replace": 3, "compound": 4}
_WORD = re.compile(r"[a-z0-9]+|,")


@dataclass(frozen=True)
class SupervisedBatch:
    """Texts, target pictures, and source pictures where the task is editing; uint8 [B, H, W, 3]."""

    texts: Sequence[str]
    targets: NDArray[np.uint8]
    sources: NDArray[np.uint8] | None = None


def supervised_batch(
    task: str, rng: np.random.Generator, count: int, split: Split = "train", mislabelled: float = 0.0
) -> SupervisedBatch:
    """Draw ``count`` examples of ``"t2i"`` or ``"edit"`` with pictures, skills by their shares.

    A picture is right with probability ``1 - mislabelled``; see ``envs.scenes.mislabelling``.
    """
    if task == "t2i":
        tasks = [sample_task(rng, split, skill) for skill in _skills(rng, T2I_SHARES, count)]
        scenes = [scene_for(rng, _shown(rng, drawn, mislabelled)) for drawn in tasks]
        return SupervisedBatch([drawn.text for drawn in tasks], render(scenes))
    if task != "edit":
        raise ValueError(f"task: expected 't2i' or 'edit', got {task!r}")
    edits = [sample_edit(rng, split, skill) for skill in _skills(rng, EDIT_SHARES, count)]
    texts = [_told(rng, edit, mislabelled) for edit in edits]
    return SupervisedBatch(texts, render([e.target for e in edits]), render([e.source for e in edits]))


def _shown(rng: np.random.Generator, drawn: SceneTask, mislabelled: float) -> Metadata:
    return wrong_metadata(rng, drawn.metadata) if rng.random() < mislabelled else drawn.metadata


def _told(rng: np.random.Generator, edit: EditTask, mislabelled: float) -> str:
    if rng.random() >= mislabelled:
        return edit.text
    return instruction(rng, wrong_operations(rng, edit.metadata["ops"], edit.source), edit.source)


def _skills(rng: np.random.Generator, shares: Mapping[str, int], count: int) -> list[str]:
    weights = np.array(list(shares.values()))
    return [str(skill) for skill in rng.choice(list(shares), count, p=weights / weights.sum())]


@cache
def vocabulary(num_texts: int = 1500) -> tuple[str, ...]:
    """The words of the world's prompts and instructions, in order, from a fixed draw of ``num_texts`` of each."""
    rng = np.random.default_rng(0)
    texts = [sample_task(rng).text for _ in range(num_texts)] + [sample_edit(rng).text for _ in range(num_texts)]
    return tuple(sorted({word for text in texts for word in _WORD.findall(text)}))
