"""Which of two images is better: both orders averaged, and the win rates of a group.

Pref-GRPO (arXiv:2508.20751) rewards an image with the share of its group that it beats. Differs: every pair is asked
in both orders, because judges prefer a position; probabilities are used in place of verdicts; and a pair without an
answer is left out, not split half and half. An image that has lost too many of its pairs has no win rate: over others
it was never compared with, it would not be on the scale of its group.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rewards.base import Scores, Values
from rewards.judges.readouts import Reading

Pair = tuple[int, int]


def ordered_pairs(count: int) -> list[Pair]:
    """Every (first, second) of a group, both orders: G (G - 1) of them."""
    return [(first, second) for first in range(count) for second in range(count) if first != second]


def preferences(readings: Mapping[Pair, Reading], count: int) -> NDArray[np.float64]:
    """P(i is better than j) = (p_ij + 1 - p_ji) / 2, [G, G]; NaN where an order is missing, and on the diagonal.

    ``p_ij`` is the probability that the first of (i, j) is called better. A judge that prefers a position by b says
    p_ij + b and p_ji + b, and b cancels.
    """
    first = np.full((count, count), np.nan)
    for (i, j), reading in readings.items():
        first[i, j] = reading.value
    np.fill_diagonal(first, np.nan)
    return np.asarray((first + 1 - first.T) / 2)


def win_rates(preferred: NDArray[np.float64]) -> Values:
    """The mean of each row over the pairs that there are: [G, G] -> float32 [G]; NaN for a row without one.

    Where every pair is there the rates of a group have the mean 0.5, whatever its quality: they are no progress to log.
    """
    return row_means(preferred)


def order_agreement(readings: Mapping[Pair, Reading], count: int) -> Values:
    """The share of an image's pairs whose two orders name the same winner, float32 [G]; NaN where a pair is missing.

    0.5 is a coin's; a judge that always names one position has 0.
    """
    sides = np.full((count, count), np.nan)
    for (i, j), reading in readings.items():
        sides[i, j] = np.sign(reading.value - 0.5)
    agree = np.where(np.isnan(sides + sides.T), np.nan, sides == -sides.T)
    np.fill_diagonal(agree, np.nan)
    has_all = np.isnan(agree).sum(1) == 1
    return np.where(has_all, row_means(agree), np.nan).astype(np.float32)


def group_scores(readings: Mapping[Pair, Reading], count: int, max_missing: float) -> Scores:
    """Win rates of a group, with ``order_agreement``, ``missing_pairs`` (a share) and ``label_mass`` of each image.

    ``order_agreement`` is NaN for an image that lacks a pair: no cache keeps an answer with a gap, so that the lost
    pair is asked for again.

    Args:
        readings: of the ordered pairs.
        count: images of the group.
        max_missing: largest share of an image's pairs that may be missing; above it there is no win rate.
    """
    if count == 1:
        return Scores(np.full(1, np.nan, np.float32), {}, {0: "a group of one has no pair to compare"})
    preferred = preferences(readings, count)
    missing = (np.isnan(preferred).sum(1) - 1) / max(count - 1, 1)
    total = np.where(missing > max_missing, np.nan, win_rates(preferred)).astype(np.float32)
    components = {"order_agreement": order_agreement(readings, count), "missing_pairs": missing.astype(np.float32)}
    mass = np.full((count, count), np.nan)
    for pair, reading in readings.items():
        mass[pair] = reading.components.get("label_mass", np.nan)
    if not np.isnan(mass).all():
        # An image is shown first in its row and second in its column.
        components["label_mass"] = row_means(np.concatenate([mass, mass.T], axis=1))
    reasons = {
        int(i): f"{missing[i]:.0%} of this image's pairs lack an answer in one order or both, and "
        f"max_missing_pairs is {max_missing:g}: {_first_reason(readings, int(i))}"
        for i in np.flatnonzero(np.isnan(total))
    }
    return Scores(total, components, reasons)


def row_means(values: NDArray[np.float64]) -> Values:
    """The mean of each row over what is not NaN, float32; NaN for a row that has nothing else."""
    present = ~np.isnan(values)
    sums, counts = np.where(present, values, 0).sum(1), present.sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)


def _first_reason(readings: Mapping[Pair, Reading], image: int) -> str:
    reasons = [reading.reason for pair, reading in readings.items() if image in pair and reading.reason]
    return reasons[0] if reasons else "none was asked"
