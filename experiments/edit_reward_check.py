"""How far a learnt edit reward agrees with what is said of held-out edits: each dimension, and each kind of edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.benchmarks.tables import quantity, text_table
from pdtr.statistics import Interval
from rewards.agreement import Agreement, Estimate, agreement
from rewards.base import Prompt, Reward
from rewards.edit_reward_data import ScoredEdit, read_dimensions, read_edits
from rewards.scoring import join_scores, score

# Edits that a kind needs for an interval to say anything.
_LEAST = 20


@dataclass(frozen=True)
class Found:
    """One comparison.

    Attributes:
        what: the dimension, or "total, KIND" for the edits of one kind.
        agreement: the figures.
    """

    what: str
    agreement: Agreement


def check_checkpoint(checkpoint: str, data: Path, split: str, num_resamples: int) -> list[Found]:
    """Score a split with a checkpoint and compare: every dimension, then the total by kind of edit.

    Raises:
        ValueError: the checkpoint or the data cannot be used.
    """
    from rewards.edit_reward import EditReward

    is_scored = bool(read_dimensions(data, split))
    return check_reward_on(EditReward(checkpoint), list(read_edits(data, split, is_scored)), num_resamples)


def check_reward_on(reward: Reward, edits: Sequence[ScoredEdit], num_resamples: int) -> list[Found]:
    """Compare any reward with judged edits, of one picture size or several.

    The last dimension of the edits is compared with the reward's total. Edits without scores are compared by rank: only
    which of a prompt's is better is known then.
    """
    said = _said(reward, edits)
    groups = [edit.prompt_id for edit in edits]
    if not all(edit.scores for edit in edits):
        return [Found("total", _order(said["total"], edits, groups, num_resamples))]
    truths = {name: np.array([edit.scores.get(name, np.nan) for edit in edits]) for name in said}
    truths["total"] = np.array([edit.total for edit in edits])
    found = [
        Found(name, agreement(said[name], truths[name], groups, num_resamples))
        for name in said
        if not np.isnan(truths[name]).any()
    ]
    for tag in sorted({edit.tag for edit in edits}):
        rows = [row for row, edit in enumerate(edits) if edit.tag == tag]
        if len(rows) >= _LEAST:
            mine = [groups[row] for row in rows]
            found.append(
                Found(f"total, {tag}", agreement(said["total"][rows], truths["total"][rows], mine, num_resamples))
            )
    return found


def _said(reward: Reward, edits: Sequence[ScoredEdit]) -> dict[str, NDArray[np.float32]]:
    """What a reward says of edits, by dimension, in their order: those of one picture size are scored together."""
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, edit in enumerate(edits):
        rows_of.setdefault(edit.image.shape, []).append(row)
    prompts = [Prompt(edit.instruction, (edit.source,), {}, edit.prompt_id) for edit in edits]
    scores = join_scores(
        [
            score(reward, np.stack([edits[row].image for row in rows]), [prompts[row] for row in rows])
            for rows in rows_of.values()
        ]
    )
    back = np.argsort([row for rows in rows_of.values() for row in rows])
    return {name: values[back] for name, values in {"total": scores.total, **scores.components}.items()}


def _order(
    said: NDArray[np.float32], edits: Sequence[ScoredEdit], groups: Sequence[str], num_resamples: int
) -> Agreement:
    """Agreement with ranks: pairs in order, and nothing that compares edits of several prompts."""
    unknown = [edit.id for edit in edits if edit.rank is None]
    if unknown:
        raise ValueError(
            f"check: expected scores of all edits or ranks of all, got edits without scores, and {unknown[0]!r} "
            "without a rank; check a split that is judged in one way"
        )
    found = agreement(said, [-float(edit.rank or 0) for edit in edits], groups, num_resamples)
    none = Estimate(np.nan, np.nan, np.nan)
    return replace(found, spearman=none, calibration=none)


def format_found(found: Sequence[Found]) -> str:
    """A table, 95 % bootstrap intervals over prompts."""
    rows = [
        [
            row.what,
            str(row.agreement.count),
            _cell(row.agreement.spearman),
            _cell(row.agreement.pairwise),
            str(row.agreement.num_pairs),
            _cell(row.agreement.calibration),
        ]
        for row in found
    ]
    header = ["", "edits", "Spearman", "pairs in order", "pairs", "calibration error"]
    return f"95 % bootstrap intervals over prompts\n{text_table(header, rows)}"


def _cell(estimate: Estimate) -> str:
    return "" if np.isnan(estimate.value) else quantity(Interval(*estimate), ".3f")
