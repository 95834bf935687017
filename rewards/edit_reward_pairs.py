"""Pairs of edits of one prompt, streamed: what a reward model is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.edit_reward_data import ScoredEdit, read_edits
from rewards.edit_reward_inputs import EditInputs

if TYPE_CHECKING:
    from torch import Tensor

# A pair whose totals differ by less says nothing about which is better: its weight is 0, its scores still count.
LEAST_DIFFERENCE = 0.05
# Prompts whose pairs are shuffled together, and bytes of their pictures: a stream is shuffled within a window alone.
_WINDOW, _WINDOW_BYTES = 2048, 2**30


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


def stream_pairs(folder: Path, split: str, seed: int, scored: bool = True) -> Iterator[Pair]:
    """The pairs of a split without end, paired and shuffled anew in each pass; edits of a prompt must lie together.

    Without ``scored`` edits may have ranks in place of scores, and there are only pairs that say which is better.
    """
    num_passes = 0
    while True:
        rng = np.random.default_rng((seed, num_passes))
        pairs = _shuffled(_groups(read_edits(folder, split, scored)), rng)
        yield from (pair for pair in pairs if scored or pair.weight)
        num_passes += 1


def count_edits(folder: Path, split: str, scored: bool = True, inputs: EditInputs | None = None) -> int:
    """How many edits of a split :func:`stream_pairs` uses; logs those that cannot be used.

    Raises:
        ValueError: ``inputs`` cannot read an edit, or edits need no scores and nothing is said of which is better.
    """
    edits = (_readable(edit, f"{folder}, split {split}", inputs) for edit in read_edits(folder, split, scored))
    if scored:
        return sum(1 for _ in edits)
    count = sum(len(group) for group in _groups(edits) if any(_pair(*two).weight for two in combinations(group, 2)))
    if not count:
        raise ValueError(
            f"{folder}, split {split}: expected prompts with a better and a worse edit, got none; write the edits of a "
            "prompt side by side, with one prompt_id and ranks (or totals) that differ"
        )
    return count


def collate(pairs: Sequence[Mapping[str, Any]], inputs: EditInputs, dimensions: Sequence[str]) -> dict[str, Tensor]:
    """A batch for the trainer: first all chosen edits, then all rejected ones.

    Args:
        pairs: P mappings with the :class:`Pair` under ``"pair"``.
        inputs: what the model reads.
        dimensions: of the model; none where scores are not looked at.

    Returns:
        The model's arguments for 2 P edits, ``pair_weights`` [P] and, where there are dimensions, ``scores`` [2 P, D].
    """
    import torch

    made: list[Pair] = [entry["pair"] for entry in pairs]
    edits = [pair.chosen for pair in made] + [pair.rejected for pair in made]
    batch = inputs([e.instruction for e in edits], [e.source for e in edits], [e.image for e in edits])
    batch["pair_weights"] = torch.tensor([pair.weight for pair in made])
    if dimensions:
        batch["scores"] = torch.tensor([[edit.scores[name] for name in dimensions] for edit in edits])
    return batch


def _readable(edit: ScoredEdit, where: str, inputs: EditInputs | None) -> ScoredEdit:
    reason = inputs.unfit(edit.instruction, (edit.source, edit.image)) if inputs else ""
    if reason:
        raise ValueError(f"{where}: edit {edit.id or edit.prompt_id!r} cannot be read: {reason}; or leave it out")
    return edit


def _pair(first: ScoredEdit, second: ScoredEdit) -> Pair:
    """The better one first: by rank where both have one, else by total; without either neither is better."""
    if first.rank is not None and second.rank is not None:
        difference = float(second.rank - first.rank)
    else:
        difference = first.total - second.total
    chosen, rejected = (second, first) if difference < 0 else (first, second)
    return Pair(chosen, rejected, float(abs(difference) >= LEAST_DIFFERENCE))


def _groups(edits: Iterable[ScoredEdit]) -> Iterator[list[ScoredEdit]]:
    for _, group in groupby(edits, key=lambda edit: edit.prompt_id):
        yield list(group)


def _shuffled(groups: Iterable[list[ScoredEdit]], rng: np.random.Generator) -> Iterator[Pair]:
    for window in _windows(groups):
        pairs = [pair for group in window for pair in make_pairs(group, rng)]
        yield from (pairs[i] for i in rng.permutation(len(pairs)))


def _windows(groups: Iterable[list[ScoredEdit]]) -> Iterator[list[list[ScoredEdit]]]:
    window: list[list[ScoredEdit]] = []
    size = 0
    for group in groups:
        window.append(group)
        size += sum(edit.source.nbytes + edit.image.nbytes for edit in group)
        if len(window) == _WINDOW or size >= _WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window
