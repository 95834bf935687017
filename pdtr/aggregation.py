"""Several rewards as one: the total and the weighed components of a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from agents.functional import normalize_then_sum
from agents.types import Rollout

Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]


def weighted(
    rollouts: Sequence[Rollout], reward_weights: Mapping[str, float], aggregation: Aggregation = "sum_then_normalize"
) -> list[Rollout]:
    """``total * w["total"] + sum_c w[c] component_c`` for each rollout; the total counts once unless it is weighed.

    With "normalize_then_sum" each term is first normalised within its group, see ``normalize_then_sum``.

    Components are added to the total; a task without a named component goes without it, and a weight of 0 keeps a
    component that is not available from masking the sample.

    Raises:
        ValueError: a weight names a component that no task of the iteration has.
    """
    known = {"total"}.union(*(rollout.components for rollout in rollouts))
    unknown = sorted(set(reward_weights) - known)
    if unknown:
        raise ValueError(f"reward_weights: expected some of {sorted(known)}, got {unknown[0]!r}")
    return [rollout.with_rewards(_weighted_sum(rollout, reward_weights, aggregation)) for rollout in rollouts]


def _weighted_sum(rollout: Rollout, reward_weights: Mapping[str, float], aggregation: Aggregation) -> Tensor:
    parts = {"total": rollout.rewards, **rollout.components}
    weights = {"total": 1.0, **reward_weights}
    if aggregation == "normalize_then_sum":
        known = {name: weight for name, weight in weights.items() if name in parts}
        return normalize_then_sum(parts, known, rollout.group_ids)
    terms = [weight * parts[name] for name, weight in weights.items() if weight != 0 and name in parts]
    return sum(terms, torch.zeros_like(rollout.rewards))
