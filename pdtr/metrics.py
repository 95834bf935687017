"""What is logged of rollouts and evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdtr.evaluate import HELD_OUT, Evaluation, mean
from pdtr.panel import agreement

if TYPE_CHECKING:
    from torch import Tensor

    from agents.types import Rollout
    from rewards.base import Reward


def rollout_metrics(task: str, rollout: Rollout, group_size: int) -> dict[str, float]:
    """Statistics of one task's rewards and advantages.

    Of the total under ``NAME/task`` and of each component under ``NAME/task/component``: ``reward`` and ``reward_std``
    over the available ones, ``group_std``, the mean deviation within groups, ``zero_std_ratio``, the share of groups
    whose values are all equal (they teach nothing), and ``missing_ratio``, the share that was not available. Groups
    without any available value count in neither ``group_std`` nor ``zero_std_ratio``, and both are NaN where there is
    no other.
    """
    row = {f"{name}/{task}": value for name, value in _spread(rollout.rewards, group_size).items()}
    row[f"advantage_abs_mean/{task}"] = float(rollout.advantages.abs().mean())
    for component, values in rollout.components.items():
        found = _spread(values, group_size)
        row |= {f"{name}/{task}/{component}": value for name, value in found.items()}
    return row


def _spread(values: Tensor, group_size: int) -> dict[str, float]:
    """Mean, deviations and missing share of values [N], whole groups one after the other."""
    import torch

    groups = values.reshape(-1, group_size)
    available = ~groups.isnan()
    count = available.sum(1).clamp_min(1)
    known = groups[available].numpy()
    means = torch.where(available, groups, 0.0).sum(1) / count
    squares = torch.where(available, (groups - means[:, None]).square(), 0.0).sum(1) / count
    variances = squares[available.any(1)]
    return {
        "reward": mean(known),
        "reward_std": float(known.std()) if len(known) else float("nan"),
        "group_std": float(variances.sqrt().mean()),
        "zero_std_ratio": float((variances < 1e-12).float().mean()),
        "missing_ratio": float((~available).float().mean()),
    }


def statistics_metrics(task: str, reward: Reward) -> dict[str, float]:
    """What a reward has counted since the process started (calls, faults, seconds, tokens), by the names of the log."""
    from rewards.base import reward_statistics

    return {f"statistics/{task}/{name}": value for name, value in reward_statistics(reward).items()}


def evaluation_row(found: Evaluation, task: str, kind: str, label: str) -> dict[str, Any]:
    """One evaluation of one task, without its rows.

    ``success`` names what ``strict`` is of. Where the run trains on another reward than it is measured by, ``trained``
    is that one's mean over the same images and ``agreement`` Spearman's correlation of the two; ``held_out/NAME`` and
    ``agreement/NAME`` are those of a member of the trained reward that is only logged.
    """
    row = {
        "task": task,
        "set": kind,
        "label": label,
        "success": found.success,
        "strict": found.score,
        "reward": mean(found.reward),
        "count": len(found.strict),
        "missing": int((found.strict != found.strict).sum()),
        "strict_by_skill": found.by_skill(),
    }
    if found.trained is not None:
        row |= {"trained": mean(found.trained), "agreement": agreement(found.trained, found.reward)}
    trained = found.reward if found.trained is None else found.trained
    for name, values in found.held_out.items():
        row |= {f"{HELD_OUT}/{name}": mean(values), f"agreement/{name}": agreement(trained, values)}
    return row
