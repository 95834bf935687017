"""How far a learnt edit reward agrees with the scores of held-out edits: each dimension, and each kind of edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.benchmarks.tables import quantity, text_table
from pdtr.statistics import Interval
from rewards.agreement import Agreement, Estimate, agreement
from rewards.base import Prompt, Reward
from rewards.edit_reward_data import ScoredEdit, read_edits
from rewards.scoring import score

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

    return check_reward_on(EditReward(checkpoint), list(read_edits(data, split)), num_resamples)


def check_reward_on(reward: Reward, edits: Sequence[ScoredEdit], num_resamples: int) -> list[Found]:
    """Compare any reward with scored edits of one picture size."""
    prompts = [Prompt(edit.instruction, (edit.source,), {}, edit.prompt_id) for edit in edits]
    scores = score(reward, np.stack([edit.image for edit in edits]), prompts)
    groups = [edit.prompt_id for edit in edits]
    said = {"total": scores.total, **scores.components}
    truths = {name: np.array([edit.scores.get(name, np.nan) for edit in edits]) for name in said}
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
    return quantity(Interval(*estimate), ".3f")
