"""Intervals for means, success rates and paired differences: pure functions of arrays, missing values as NaN."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Resamples drawn at once: bounds the bootstrap's memory at this many times the number of values.
_RESAMPLES_AT_ONCE = 500


class Interval(NamedTuple):
    """An estimate and its confidence interval, all in the estimate's units; NaN where nothing can be said."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 where the whole interval lies above 0, -1 where it lies below, 0 where it does not clear 0."""
        return int(self.low > 0) - int(self.high < 0)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean over independent values, for instance seeds: ``m +- t_{n-1} s / sqrt(n)``.

    Args:
        values: [n]; NaN is left out.
        confidence: two-sided, in (0, 1).

    Returns:
        The mean with its interval; a single value has no interval (NaN), no value no mean either.
    """
    found = _available(values)
    _check_confidence(confidence)
    if len(found) == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(found.mean())
    if len(found) == 1:
        return Interval(mean, math.nan, math.nan)
    half = student_quantile(confidence, len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Interval(mean, mean - half, mean + half)


def student_quantile(confidence: float, degrees: int) -> float:
    """The t with ``P(|T| < t) = confidence`` for Student's T with whole degrees of freedom.

    With ``theta = arctan(t / sqrt(degrees))`` the probability is a finite sum (Abramowitz & Stegun 26.7.3, 26.7.4),
    which is inverted by bisection.
    """
    _check_confidence(confidence)
    if degrees < 1:
        raise ValueError(f"degrees: expected at least 1, got {degrees}")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_probability(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def wilson_interval(successes: float, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a success rate (JASA 22, 1927); unlike Wald's it holds at 0 and at 1.

    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`` around the rate ``p = successes / n``.

    Raises:
        ValueError: ``successes`` is not within 0 and ``count``.
    """
    _check_confidence(confidence)
    if not 0 <= successes <= count:
        raise ValueError(f"wilson_interval: expected 0 <= successes <= count, got {successes} of {count}")
    if count == 0:
        return Interval(math.nan, math.nan, math.nan)
    rate, z = successes / count, NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z * z / count
    centre = (rate + z * z / (2 * count)) / scale
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / scale
    # Rounding must not push the limits past the rate itself, nor out of [0, 1].
    return Interval(rate, max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)))


def success_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval of a mean score over prompts: Wilson's where every score is 0 or 1, the bootstrap's otherwise.

    Args:
        values: [n]; NaN is left out.
        confidence: two-sided, in (0, 1).
    """
    found = _available(values)
    if np.isin(found, (0.0, 1.0)).all():
        return wilson_interval(float(found.sum()), len(found), confidence)
    return bootstrap_interval(found, confidence)


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a mean: the quantiles of the means of ``num_resamples`` draws with replacement.

    Args:
        values: [n]; NaN is left out.
        confidence: two-sided, in (0, 1).
        num_resamples: draws of n values each.
        seed: of the draws.
    """
    found = _available(values)
    _check_confidence(confidence)
    if num_resamples < 1:
        raise ValueError(f"num_resamples: expected at least 1, got {num_resamples}")
    if len(found) == 0:
        return Interval(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        stop = min(start + _RESAMPLES_AT_ONCE, num_resamples)
        means[start:stop] = found[rng.integers(len(found), size=(stop - start, len(found)))].mean(axis=1)
    low, high = np.quantile(means, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(float(found.mean()), float(low), float(high))


def paired_bootstrap(
    after: ArrayLike, before: ArrayLike, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of ``after - before`` over prompts that both have scored, with its percentile bootstrap interval.

    Whole pairs are resampled, so what makes a prompt hard for both cancels.

    Args:
        after: [n], one score a prompt.
        before: [n], the same prompts in the same order; a pair with NaN on either side is left out.
        confidence: two-sided, in (0, 1).
        num_resamples: draws of n pairs each.
        seed: of the draws.

    Raises:
        ValueError: the two differ in length, so they cannot be paired.
    """
    first, second = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"paired_bootstrap: expected two arrays [n] of the same prompts in the same order,"
            f" got shapes {list(first.shape)} and {list(second.shape)}"
        )
    return bootstrap_interval(first - second, confidence, num_resamples, seed)


def _available(values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1:
        raise ValueError(f"values: expected an array [n], got shape {list(found.shape)}")
    return found[~np.isnan(found)]


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected between 0 and 1, got {confidence}")


def _student_probability(theta: float, degrees: int) -> float:
    """``P(|T| < sqrt(degrees) tan(theta))``."""
    is_odd = degrees % 2
    index = np.arange(1, (degrees - is_odd) // 2)
    # Each term is the one before it times (2j)/(2j+1) cos^2 for odd degrees, (2j-1)/(2j) cos^2 for even ones.
    factors = (2 * index - 1 + is_odd) / (2 * index + is_odd) * math.cos(theta) ** 2
    total = 0.0 if degrees == 1 else 1.0 + float(np.cumprod(factors).sum())
    if is_odd:
        return 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    return math.sin(theta) * total
