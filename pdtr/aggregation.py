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
    rollouts: Sequence[Rollout],
    reward_weights: Mapping[str, float],
    aggregation: Aggregation = "sum_then_normalize",
    std_floor: float = 0.05,
) -> list[Rollout]:
    """What advantages are made of: :func:`summed`, or with "normalize_then_sum" the same terms, each normalised before.

    Normalised within their groups, see ``normalize_then_sum``, terms count by their weights and not by their spreads.
    The weighed components are all there is then: a total that is their sum would count them again, and by their
    spreads. It counts where it is named, and once in a task that has none of the weighed components.

    Raises:
        ValueError: a weight names a component that no task of the iteration has, or "normalize_then_sum" has no weight
            of a component.
    """
    if aggregation == "sum_then_normalize":
        return summed(rollouts, reward_weights)
    if not reward_weights.keys() - {"total"}:
        raise _no_component("", reward_weights)
    return [
        rollout.with_rewards(normalize_then_sum(_parts(rollout), weights, rollout.group_ids, std_floor))
        for rollout, weights in _terms(rollouts, reward_weights, aggregation)
    ]


def summed(
    rollouts: Sequence[Rollout], reward_weights: Mapping[str, float], aggregation: Aggregation = "sum_then_normalize"
) -> list[Rollout]:
    """``sum_k w_k r_k`` over the total and its components, for each rollout: an aggregation's terms as they are.

    With "sum_then_normalize" components are added to the total, which counts once unless it is weighed. A task without
    a named component goes without it, and a weight of 0 keeps a component that is not available from masking the
    sample.

    Raises:
        ValueError: a weight names a component that no task of the iteration has.
    """
    return [
        rollout.with_rewards(
            sum((weight * _parts(rollout)[name] for name, weight in weights.items()), torch.zeros_like(rollout.rewards))
        )
        for rollout, weights in _terms(rollouts, reward_weights, aggregation)
    ]


def check_weights(reward_weights: Sequence[Mapping[str, float]], where: str) -> None:
    """Check that "normalize_then_sum" has components to normalise, and something in every iteration.

    Args:
        reward_weights: those of each iteration of a stage.
        where: what stands before the message.

    Raises:
        ValueError: no component is ever weighed, or none is in an iteration that does not name the total either.
    """
    is_weighed = [any(weight for name, weight in weights.items() if name != "total") for weights in reward_weights]
    if not any(is_weighed):
        raise _no_component(where, reward_weights[0])
    for iteration, weights in enumerate(reward_weights):
        if not is_weighed[iteration] and "total" not in weights:
            raise ValueError(
                f'{where}aggregation "normalize_then_sum" expects a component with a weight other than 0 in every '
                f"iteration, got {dict(weights)} in iteration {iteration}; change the schedule, or weigh 'total' too"
            )


def _no_component(where: str, reward_weights: Mapping[str, float]) -> ValueError:
    return ValueError(
        f'{where}aggregation "normalize_then_sum" expects weights for components, got reward_weights '
        f"{dict(reward_weights)}: it would normalise the finished total, not its members; weigh these by name in the "
        'stage\'s reward_weights, or choose "sum_then_normalize"'
    )


def _parts(rollout: Rollout) -> dict[str, Tensor]:
    return {"total": rollout.rewards, **rollout.components}


def _terms(
    rollouts: Sequence[Rollout], reward_weights: Mapping[str, float], aggregation: Aggregation
) -> list[tuple[Rollout, dict[str, float]]]:
    """Each rollout with the weights, other than 0, of what it has."""
    known = {"total"}.union(*(rollout.components for rollout in rollouts))
    unknown = sorted(set(reward_weights) - known)
    if unknown:
        raise ValueError(f"reward_weights: expected some of {sorted(known)}, got {unknown[0]!r}")
    terms = []
    for rollout in rollouts:
        has_components = any(reward_weights.get(name) for name in rollout.components)
        total = 0.0 if aggregation == "normalize_then_sum" and has_components else 1.0
        weights = {"total": total, **reward_weights}
        parts = _parts(rollout)
        terms.append((rollout, {name: weight for name, weight in weights.items() if weight != 0 and name in parts}))
    return terms
