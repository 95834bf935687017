"""Several rewards as one: a weighted sum, beside rewards that are only looked at."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

import numpy as np

from rewards.base import Images, Prompt, Reward, RewardTraits, Scores, reward_name, reward_statistics, reward_traits
from rewards.names import hint
from rewards.scoring import score_async


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """A reward that is the weighted sum of others: ``total = sum_k weights[k] * rewards[k]``.

    Several rewards hold each other in check, and a held-out one shows when the others are being gamed (GARDO,
    arXiv:2512.24138). The components are ``name``, each member's total, and ``name/part``, its own components.

    Every member is called as its own traits ask, and members run at the same time: plain functions in threads,
    coroutines in one event loop. The sum has group scope where a member has it. It is then called a group at a time,
    and batches of its other members end where a group ends; a member's ``concurrency`` holds over all groups.

    A NaN of a member of non-zero weight makes the total NaN: a sum of what is left would be on another scale. An
    exception of any member, held out or not, is the sum's.

    Attributes:
        rewards: the members, by the name they are logged under.
        weights: one finite number for each of ``rewards``, negative for a penalty; at 0 a member is logged only.
        held_out: rewards that are scored and logged and never enter the total; their NaN masks nothing.

    Raises:
        ValueError: a name without a weight or without a reward, a name that cannot be logged or is there twice, a
            weight that is not finite, or nothing of non-zero weight.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    held_out: Mapping[str, Reward] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, reward in [*self.rewards.items(), *self.held_out.items()]:
            _check_name(name)
            if not callable(reward):
                raise ValueError(f"{name}: expected a reward, which is callable, got {type(reward).__name__}")
        _check_held_out(self.rewards, self.weights, self.held_out)
        _check_weights(self.rewards, self.weights)

    @property
    def traits(self) -> RewardTraits:
        """Group scope if any member has it; the fingerprint is made of names, weights and members' fingerprints."""
        members = [reward_traits(reward) for reward in (*self.rewards.values(), *self.held_out.values())]
        return RewardTraits(
            scope="group" if any(traits.scope == "group" for traits in members) else "sample",
            concurrency=max(traits.concurrency for traits in members),
            fingerprint=_fingerprint(self),
        )

    async def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] by every member at a time."""
        members = {**self.rewards, **self.held_out}
        scores = await asyncio.gather(*(score_async(reward, images, prompts) for reward in members.values()))
        return weighted_scores(dict(zip(members, scores, strict=True)), self.weights)

    def statistics(self) -> dict[str, float]:
        """What the members have counted, each behind its name and a slash."""
        members = {**self.rewards, **self.held_out}
        return {
            f"{name}/{part}": value
            for name, reward in members.items()
            for part, value in reward_statistics(reward).items()
        }


def weighted_scores(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """``total = sum_k weights[k] * scores[k].total`` over the weights that are not 0, with all totals as components.

    Args:
        scores: each member's answers for the same B images.
        weights: a number for each member that may enter the total; a member without one does not.

    Returns:
        Scores with the components ``name`` and ``name/part``. Where a weighted member is NaN the total is, and the
        reasons of all that are missing are joined, each behind its member's name.
    """
    weighted = {name: weight for name, weight in weights.items() if weight}
    total = sum(
        (weight * scores[name].total.astype(np.float64) for name, weight in weighted.items()),
        start=np.zeros(len(next(iter(scores.values())).total)),
    )
    components = {}
    for name, member in scores.items():
        components[name] = member.total
        components |= {f"{name}/{part}": values for part, values in member.components.items()}
    reasons = {
        index: "; ".join(
            f"{name}: {scores[name].reasons[index]}" for name in weighted if np.isnan(scores[name].total[index])
        )
        for index in map(int, np.flatnonzero(np.isnan(total)))
    }
    return Scores(total.astype(np.float32), components, reasons)


def _fingerprint(weighted: WeightedSum) -> str:
    def identity(reward: Reward) -> list[str]:
        return [reward_name(reward), reward_traits(reward).fingerprint]

    parts = {
        "rewards": {name: [float(weighted.weights[name]), *identity(r)] for name, r in weighted.rewards.items()},
        "held_out": {name: identity(reward) for name, reward in weighted.held_out.items()},
    }
    return json.dumps(parts, sort_keys=True)


def _check_name(name: object) -> None:
    # "total" is what logs and schedules call the sum, and "/" parts a member's name from its components'.
    if not isinstance(name, str) or not name or "/" in name or name == "total":
        raise ValueError(f"name of a reward: expected text without '/' that is not 'total', got {name!r}; rename it")


def _check_held_out(
    rewards: Mapping[str, Reward], weights: Mapping[str, float], held_out: Mapping[str, Reward]
) -> None:
    twice = [name for name in held_out if name in rewards]
    if twice:
        raise ValueError(f"held_out: {twice[0]!r} is in rewards too; expected each name once, so rename one of them")
    weighed = [name for name in held_out if name in weights]
    if weighed:
        raise ValueError(
            f"weights: {weighed[0]!r} is held out and enters no total; take its weight away, or move it to rewards"
        )


def _check_weights(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
    for name in weights:
        if name not in rewards:
            raise ValueError(f"weights: {name!r} is not among the rewards {_listed(rewards)}{_hint(name, rewards)}")
    for name in rewards:
        if name not in weights:
            raise ValueError(f"weights: expected a number for every reward, got none for {name!r}; give it one")
    for name, weight in weights.items():
        if not _is_finite(weight):
            raise ValueError(f"weights[{name!r}]: expected a finite number, got {weight!r}")
    if not any(weights.values()):
        raise ValueError(
            "weights: expected at least one that is not 0, got "
            f"{dict(weights)}; rewards that are only to be logged belong in held_out"
        )


def _is_finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(repr, names)) or "(none)"


def _hint(name: object, names: Iterable[str]) -> str:
    return hint(str(name), names) or "; take it away, or add the reward"
