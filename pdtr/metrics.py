"""What is logged of rollouts and evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pdtr.evaluate import Evaluation, mean
from pdtr.panel import agreement

if TYPE_CHECKING:
    from agents.types import Rollout
    from rewards.base import Reward


def rollout_metrics(task: str, rollout: Rollout, group_size: int) -> dict[str, float]:
    """Statistics of one task's rewards and advantages.

    ``group_std`` is the mean deviation within groups, ``zero_std_ratio`` the share of groups whose rewards are all
    equal (they teach nothing); groups without any available reward count in neither, and both are NaN where there is
    no other. ``missing_ratio`` is the share of rewards that were not available.
    """
    import torch

    groups = rollout.rewards.reshape(-1, group_size)
    available = ~groups.isnan()
    count = available.sum(1).clamp_min(1)
    rewards = rollout.rewards.numpy()
    available_rewards = rewards[available.flatten().numpy()]
    means = torch.where(available, groups, 0.0).sum(1) / count
    squares = torch.where(available, (groups - means[:, None]).square(), 0.0).sum(1) / count
    variances = squares[available.any(1)]
    row = {
        f"reward/{task}": mean(rewards),
        f"reward_std/{task}": float(available_rewards.std()) if len(available_rewards) else float("nan"),
        f"group_std/{task}": float(variances.sqrt().mean()),
        f"zero_std_ratio/{task}": float((variances < 1e-12).float().mean()),
        f"missing_ratio/{task}": float((~available).float().mean()),
        f"advantage_abs_mean/{task}": float(rollout.advantages.abs().mean()),
    }
    for name, values in rollout.components.items():
        found = values.numpy()
        known = found[~np.isnan(found)]
        row[f"reward/{task}/{name}"] = mean(found)
        row[f"reward_std/{task}/{name}"] = float(known.std()) if len(known) else float("nan")
    return row


def statistics_metrics(task: str, reward: Reward) -> dict[str, float]:
    """What a reward has counted since the process started (calls, faults, seconds, tokens), by the names of the log."""
    from rewards.base import reward_statistics

    return {f"statistics/{task}/{name}": value for name, value in reward_statistics(reward).items()}


def evaluation_row(found: Evaluation, task: str, kind: str, label: str) -> dict[str, Any]:
    """One evaluation of one task, without its rows.

    Where the run trains on another reward than it is measured by, ``trained`` is that one's mean over the same images
    and ``agreement`` Spearman's correlation of the two.
    """
    row = {
        "task": task,
        "set": kind,
        "label": label,
        "strict": found.score,
        "reward": mean(found.reward),
        "count": len(found.strict),
        "missing": int((found.strict != found.strict).sum()),
        "strict_by_skill": found.by_skill(),
    }
    if found.trained is not None:
        row |= {"trained": mean(found.trained), "agreement": agreement(found.trained, found.reward)}
    return row
