"""How well a reward agrees with a ground truth: rank correlation, pairs put in order, calibration, with intervals.

Shapes: N images. Groups are the prompts: images of one prompt are alike, so intervals resample prompts and not images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats, Floats, NDArray[np.int64]], float]


class Estimate(NamedTuple):
    """A statistic with its bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """A reward against the ground truth.

    Attributes:
        spearman: rank correlation over all images, ties have their mean rank.
        pairwise: share of the pairs of one prompt, whose truths differ, that the reward puts in order; a tie is half.
        calibration: expected calibration error, in the truth's units.
        count: images.
        num_pairs: pairs.
    """

    spearman: Estimate
    pairwise: Estimate
    calibration: Estimate
    count: int
    num_pairs: int


def spearman(rewards: ArrayLike, truths: ArrayLike) -> float:
    """Spearman's rank correlation, Pearson's of the ranks with ties at their mean rank; NaN where one is constant."""
    from scipy.stats import rankdata

    first, second = (rankdata(np.asarray(values, np.float64)) for values in (rewards, truths))
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / norm if norm > 0 else math.nan


def pairwise_accuracy(
    rewards: ArrayLike, truths: ArrayLike, groups: ArrayLike, least: float = 0.05
) -> tuple[float, int]:
    """The share of pairs within a group that are in order, and how many pairs there are.

    A pair counts where its truths differ by more than ``least``; equal rewards are half in order.
    """
    right = total = 0.0
    first, second = np.asarray(rewards, np.float64), np.asarray(truths, np.float64)
    for members in _members(np.asarray(groups)):
        above, below = np.triu_indices(len(members), 1)
        difference = second[members[above]] - second[members[below]]
        counts = np.abs(difference) > least
        agreement = np.sign(first[members[above]] - first[members[below]]) * np.sign(difference)
        right += float(((agreement + 1) / 2)[counts].sum())
        total += float(counts.sum())
    return (right / total if total else math.nan), int(total)


def calibration_error(rewards: ArrayLike, truths: ArrayLike, num_bins: int = 10) -> float:
    """Expected calibration error: ``sum_b n_b / N |mean reward - mean truth|`` over bins of equally many images."""
    first, second = np.asarray(rewards, np.float64), np.asarray(truths, np.float64)
    if len(first) == 0:
        return math.nan
    bins = np.array_split(np.argsort(first, kind="stable"), min(num_bins, len(first)))
    gaps = [len(rows) * abs(float(first[rows].mean() - second[rows].mean())) for rows in bins]
    return sum(gaps) / len(first)


def agreement(
    rewards: ArrayLike, truths: ArrayLike, groups: Sequence[str], num_resamples: int = 1000, seed: int = 0
) -> Agreement:
    """Measure a reward against the ground truth; images whose reward is NaN are left out.

    Args:
        rewards: [N].
        truths: [N], in [0, 1].
        groups: the prompt of each image.
        num_resamples: of the bootstrap over prompts (95 % percentile intervals).
        seed: of the bootstrap.

    Raises:
        ValueError: the lengths differ, or fewer than two images have a reward.
    """
    first, second = np.asarray(rewards, np.float64), np.asarray(truths, np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(groups) != len(first):
        raise ValueError(f"agreement: expected three of one length, got {first.shape}, {second.shape}, {len(groups)}")
    available = ~np.isnan(first)
    if available.sum() < 2:
        raise ValueError(f"agreement: expected rewards of at least two images, got {int(available.sum())}")
    codes = np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)[available]
    data = (first[available], second[available], codes)
    statistics: list[Statistic] = [
        lambda r, t, g: spearman(r, t),
        lambda r, t, g: pairwise_accuracy(r, t, g)[0],
        lambda r, t, g: calibration_error(r, t),
    ]
    rank, pairs, gap = _bootstrap(statistics, data, num_resamples, seed)
    return Agreement(rank, pairs, gap, int(available.sum()), pairwise_accuracy(*data)[1])


def _bootstrap(
    statistics: Sequence[Statistic], data: tuple[Floats, Floats, NDArray[np.int64]], num_resamples: int, seed: int
) -> list[Estimate]:
    """Percentile intervals over draws of whole groups with replacement; a group drawn twice is two groups."""
    rng = np.random.default_rng(seed)
    members = _members(data[2])
    drawn: list[list[float]] = [[] for _ in statistics]
    for _ in range(num_resamples):
        chosen = [members[i] for i in rng.integers(len(members), size=len(members))]
        rows = np.concatenate(chosen)
        codes = np.repeat(np.arange(len(chosen)), [len(part) for part in chosen])
        for values, statistic in zip(drawn, statistics, strict=True):
            values.append(statistic(data[0][rows], data[1][rows], codes))
    estimates = []
    for values, statistic in zip(drawn, statistics, strict=True):
        low, high = np.nanquantile(values, (0.025, 0.975)) if values else (math.nan, math.nan)
        estimates.append(Estimate(statistic(*data), float(low), float(high)))
    return estimates


def _members(groups: NDArray[Any]) -> list[NDArray[np.int64]]:
    """The rows of each group."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(groups[order][1:] != groups[order][:-1]) + 1
    return np.split(order, starts)
