"""Supervised data for joint pre-training: prompts with pictures, instructions with both pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from envs.scenes.edits import sample_edit
from envs.scenes.grammar import Split, sample_task, scene_for
from envs.scenes.render import render

_WORD = re.compile(r"[a-z0-9]+|,")


@dataclass(frozen=True)
class SupervisedBatch:
    """Texts, target pictures, and source pictures where the task is editing; uint8 [B, H, W, 3]."""

    texts: Sequence[str]
    targets: NDArray[np.uint8]
    sources: NDArray[np.uint8] | None = None


def supervised_batch(task: str, rng: np.random.Generator, count: int, split: Split = "train") -> SupervisedBatch:
    """Draw ``count`` examples of ``"t2i"`` or ``"edit"`` with a picture that is right."""
    if task == "t2i":
        tasks = [sample_task(rng, split) for _ in range(count)]
        return SupervisedBatch([t.text for t in tasks], render([scene_for(rng, t.metadata) for t in tasks]))
    if task != "edit":
        raise ValueError(f"task: expected 't2i' or 'edit', got {task!r}")
    edits = [sample_edit(rng, split) for _ in range(count)]
    return SupervisedBatch(
        [e.text for e in edits], render([e.target for e in edits]), render([e.source for e in edits])
    )


@cache
def vocabulary(num_texts: int = 1500) -> tuple[str, ...]:
    """The words of the world's prompts and instructions, in order, from a fixed draw of ``num_texts`` of each."""
    rng = np.random.default_rng(0)
    texts = [sample_task(rng).text for _ in range(num_texts)] + [sample_edit(rng).text for _ in range(num_texts)]
    return tuple(sorted({word for text in texts for word in _WORD.findall(text)}))
