"""Pairs of edits of one prompt, streamed: what a reward model is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.edit_reward_data import ScoredEdit, read_edits
from rewards.edit_reward_inputs import EditInputs

if TYPE_CHECKING:
    from torch import Tensor

# A pair whose totals differ by less says nothing about which is better: its weight is 0, its scores still count.
LEAST_DIFFERENCE = 0.05
# Prompts whose pairs are shuffled together: a stream is only ever shuffled within a window.
_WINDOW = 2048


@dataclass(frozen=True)
class Pair:
    """Two edits of one prompt, the better one first; ``weight`` is 0 where neither is."""

    chosen: ScoredEdit
    rejected: ScoredEdit
    weight: float


def make_pairs(edits: Sequence[ScoredEdit], rng: np.random.Generator) -> list[Pair]:
    """Pair the edits of one prompt at random, each once; of an odd number one is taken twice.

    A single edit is paired with itself: it has scores to be fitted to, and no comparison.
    """
    order = [edits[i] for i in rng.permutation(len(edits))]
    if len(order) % 2:
        order.append(order[0])
    return [_pair(first, second) for first, second in zip(order[::2], order[1::2], strict=True)]


def stream_pairs(folder: Path, split: str, seed: int) -> Iterator[Pair]:
    """The pairs of a split without end, paired and shuffled anew in each pass; edits of a prompt must lie together."""
    num_passes = 0
    while True:
        rng = np.random.default_rng((seed, num_passes))
        yield from _shuffled(_groups(read_edits(folder, split)), rng)
        num_passes += 1


def count_edits(folder: Path, split: str) -> int:
    """How many usable edits a split has; logs those that are not."""
    return sum(1 for _ in read_edits(folder, split))


def collate(pairs: Sequence[Mapping[str, Any]], inputs: EditInputs, dimensions: Sequence[str]) -> dict[str, Tensor]:
    """A batch for the trainer: first all chosen edits, then all rejected ones.

    Args:
        pairs: P mappings with the :class:`Pair` under ``"pair"``.
        inputs: what the model reads.
        dimensions: of the model.

    Returns:
        The model's arguments for 2 P edits, ``scores`` [2 P, D] and ``pair_weights`` [P].
    """
    import torch

    made: list[Pair] = [entry["pair"] for entry in pairs]
    edits = [pair.chosen for pair in made] + [pair.rejected for pair in made]
    batch = inputs([e.instruction for e in edits], [e.source for e in edits], [e.image for e in edits])
    scores = torch.tensor([[edit.scores[name] for name in dimensions] for edit in edits])
    return {**batch, "scores": scores, "pair_weights": torch.tensor([pair.weight for pair in made])}


def _pair(first: ScoredEdit, second: ScoredEdit) -> Pair:
    difference = first.scores["total"] - second.scores["total"]
    chosen, rejected = (first, second) if difference >= 0 else (second, first)
    return Pair(chosen, rejected, float(abs(difference) >= LEAST_DIFFERENCE))


def _groups(edits: Iterable[ScoredEdit]) -> Iterator[list[ScoredEdit]]:
    for _, group in groupby(edits, key=lambda edit: edit.prompt_id):
        yield list(group)


def _shuffled(groups: Iterator[list[ScoredEdit]], rng: np.random.Generator) -> Iterator[Pair]:
    while window := [group for group, _ in zip(groups, range(_WINDOW), strict=False)]:
        pairs = [pair for group in window for pair in make_pairs(group, rng)]
        yield from (pairs[i] for i in rng.permutation(len(pairs)))
