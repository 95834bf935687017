"""Is the difference between two evaluations of the same prompts more than chance? Pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pdtr.statistics import Interval

# Resamples drawn at once: bounds the memory at this many times the number of prompts.
_RESAMPLES_AT_ONCE = 500


class PairedTest(NamedTuple):
    """A mean difference, its bootstrap interval, and the p-value of the sign-flip test.

    Attributes:
        interval: the mean of the strata's mean differences with its percentile bootstrap interval.
        p_value: how often differences with random signs have a mean as far from 0; NaN where nothing is paired.
        pairs: how many.
    """

    interval: Interval
    p_value: float
    pairs: int


def paired_test(
    differences: Sequence[ArrayLike], confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> PairedTest:
    """Compare two evaluations by the differences of their prompts, in strata (tasks) that count alike.

    The statistic is ``T = (1/S) sum_s mean_{i in s} d_i``, an unweighted mean of tasks as benchmarks have it. The
    bootstrap resamples pairs within their strata. Under the hypothesis that both are the same every ``d_i`` might as
    well have the other sign: ``p = (1 + #{|T*| >= |T|}) / (1 + R)`` over R random choices of signs, a Monte Carlo test.

    Args:
        differences: S arrays [n_s], one difference a prompt; NaN, a pair with a side missing, is left out.
        confidence: two-sided, in (0, 1).
        num_resamples: of the bootstrap, and of the signs.
        seed: of both.

    Returns:
        NaN throughout where a stratum has no pair.

    Raises:
        ValueError: no stratum, an array that is none of [n], or a number out of its range.
    """
    strata = [np.asarray(values, np.float64) for values in differences]
    if not strata or any(values.ndim != 1 for values in strata):
        raise ValueError(f"differences: expected arrays [n], one a stratum, got shapes {[v.shape for v in strata]}")
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"expected confidence in (0, 1) and num_resamples of 1 or more, got {confidence} and {num_resamples}"
        )
    strata = [values[~np.isnan(values)] for values in strata]
    count = sum(len(values) for values in strata)
    if any(len(values) == 0 for values in strata):
        return PairedTest(Interval(math.nan, math.nan, math.nan), math.nan, count)
    value = float(np.mean([values.mean() for values in strata]))
    rng = np.random.default_rng(seed)
    resampled, flipped = _resampled(strata, num_resamples, rng)
    low, high = np.quantile(resampled, ((1 - confidence) / 2, (1 + confidence) / 2))
    # Sums in another order differ in their last bits, and equal magnitudes count.
    extreme = int((np.abs(flipped) >= abs(value) - 1e-12).sum())
    return PairedTest(Interval(value, float(low), float(high)), (1 + extreme) / (1 + num_resamples), count)


def _resampled(
    strata: Sequence[NDArray[np.float64]], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The statistic of ``count`` bootstrap samples, and of as many choices of signs."""
    resampled, flipped = np.zeros(count), np.zeros(count)
    for values in strata:
        size = len(values)
        for start in range(0, count, _RESAMPLES_AT_ONCE):
            stop = min(start + _RESAMPLES_AT_ONCE, count)
            drawn = rng.integers(size, size=(stop - start, size))
            signs = rng.integers(2, size=(stop - start, size)) * 2 - 1
            resampled[start:stop] += values[drawn].mean(axis=1) / len(strata)
            flipped[start:stop] += (signs * values).mean(axis=1) / len(strata)
    return resampled, flipped
