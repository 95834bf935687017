"""Which of two images is better: both orders averaged, and the win rates of a group.

Pref-GRPO (arXiv:2508.20751) rewards an image with the share of its group that it beats. Differs: every pair is asked
in both orders, because judges prefer a position; probabilities are used in place of verdicts; and a pair without an
answer is left out, not split half and half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    """The share of an image's pairs whose two orders name the same winner, float32 [G]; NaN without a pair.

    0.5 is a coin's; a judge that always names one position has 0.
    """
    sides = np.full((count, count), np.nan)
    for (i, j), reading in readings.items():
        sides[i, j] = np.sign(reading.value - 0.5)
    agree = np.where(np.isnan(sides + sides.T), np.nan, sides == -sides.T)
    np.fill_diagonal(agree, np.nan)
    return row_means(agree)


def group_scores(readings: Mapping[Pair, Reading], count: int) -> Scores:
    """Win rates of a group, with ``order_agreement``, ``missing_pairs`` (a share) and ``label_mass`` of each image."""
    if count == 1:
        return Scores(np.full(1, np.nan, np.float32), {}, {0: "a group of one has no pair to compare"})
    preferred = preferences(readings, count)
    total = win_rates(preferred)
    missing = (np.isnan(preferred).sum(1) - 1) / max(count - 1, 1)
    components = {"order_agreement": order_agreement(readings, count), "missing_pairs": missing.astype(np.float32)}
    mass = np.full((count, count), np.nan)
    for pair, reading in readings.items():
        mass[pair] = reading.components.get("label_mass", np.nan)
    if not np.isnan(mass).all():
        # An image is shown first in its row and second in its column.
        components["label_mass"] = row_means(np.concatenate([mass, mass.T], axis=1))
    reasons = {int(i): _reason(readings, int(i)) for i in np.flatnonzero(np.isnan(total))}
    return Scores(total, components, reasons)


def row_means(values: NDArray[np.float64]) -> Values:
    """The mean of each row over what is not NaN, float32; NaN for a row that has nothing else."""
    present = ~np.isnan(values)
    sums, counts = np.where(present, values, 0).sum(1), present.sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)


def _reason(readings: Mapping[Pair, Reading], image: int) -> str:
    reasons: Sequence[str] = [reading.reason for pair, reading in readings.items() if image in pair and reading.reason]
    return f"no pair of this image has both of its answers: {reasons[0] if reasons else 'none was asked'}"
