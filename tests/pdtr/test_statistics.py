"""Intervals against scipy, against values worked out by hand, and against what they promise."""

import math

import numpy as np
import pytest
from scipy import stats

from pdtr.statistics import (
    Interval,
    bootstrap_interval,
    mean_interval,
    paired_bootstrap,
    student_quantile,
    success_interval,
    wilson_interval,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 599])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_student_quantile_is_scipys(degrees: int, confidence: float) -> None:
    expected = stats.t.ppf((1 + confidence) / 2, degrees)
    assert student_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-9)


def test_mean_interval_by_hand() -> None:
    # mean 2, s = 1, t_2 = 4.302653, half = 4.302653 / sqrt(3) = 2.484138.
    found = mean_interval([1.0, 2.0, 3.0, math.nan])
    assert found == pytest.approx((2.0, 2.0 - 2.484138, 2.0 + 2.484138), abs=1e-6)


def test_mean_interval_of_one_value_and_of_none() -> None:
    one, none = mean_interval([0.25]), mean_interval([math.nan])
    assert one.value == 0.25
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert all(math.isnan(entry) for entry in none)
    assert one.sign == none.sign == 0


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (10, 10), (1, 7), (300, 600), (431, 600)])
def test_wilson_is_scipys(successes: int, count: int) -> None:
    expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    found = wilson_interval(successes, count)
    assert found == pytest.approx((successes / count, expected.low, expected.high), abs=1e-12)


def test_wilson_by_hand() -> None:
    # p = .5, n = 100, z^2 = 3.841459: half = z / (2 sqrt(n + z^2)) = 0.979982 / 10.190263 = 0.0961685.
    assert wilson_interval(50, 100) == pytest.approx((0.5, 0.4038315, 0.5961685), abs=5e-7)
    assert all(math.isnan(entry) for entry in wilson_interval(0, 0))


def test_success_interval_takes_wilson_only_for_zeros_and_ones() -> None:
    assert success_interval([1.0, 0.0, math.nan, 1.0]) == wilson_interval(2, 3)
    graded = np.array([0.2, 0.4, 0.9])
    assert success_interval(graded) == bootstrap_interval(graded)


def test_bootstrap_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, size=400)
    half = 1.959964 * values.std() / math.sqrt(400)
    found = bootstrap_interval(values, seed=1)
    assert found == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=0.02)
    assert found == bootstrap_interval(values, seed=1)
    assert found != bootstrap_interval(values, seed=2)


def test_bootstrap_of_two_values_is_exact() -> None:
    # The mean of two draws from {0, 1} is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0], confidence=0.95) == (0.5, 0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5, 0.5)


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=300)
    before, after = difficulty, difficulty + 0.1 + 0.05 * rng.normal(size=300)
    paired = paired_bootstrap(after, before)
    alone = bootstrap_interval(rng.permutation(after) - before)
    assert paired.sign == 1
    assert alone.sign == 0
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    opposite = paired_bootstrap(before, after)
    assert opposite.sign == -1
    assert opposite == pytest.approx((-paired.value, -paired.high, -paired.low), abs=1e-12)


def test_pairs_with_a_missing_side_are_left_out() -> None:
    after, before = [1.0, math.nan, 1.0, 1.0], [0.0, 1.0, math.nan, 1.0]
    assert paired_bootstrap(after, before) == paired_bootstrap([1.0, 1.0], [0.0, 1.0])
    assert paired_bootstrap(after, before).value == 0.5


def test_no_difference_does_not_clear_zero() -> None:
    same = np.array([0.0, 1.0, 1.0])
    assert paired_bootstrap(same, same) == Interval(0.0, 0.0, 0.0)
    assert paired_bootstrap(same, same).sign == 0


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    found = [paired_bootstrap(rng.normal(0.3, 1, 60), rng.normal(0, 1, 60), num_resamples=500) for _ in range(300)]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in found])
    # Three standard errors of a binomial with 300 trials, and the percentile bootstrap's own slight shortness.
    assert 0.89 <= covered <= 0.985


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_bootstrap([1.0], [1.0, 0.0]), r"same prompts in the same order.*\[1\] and \[2\]"),
        (lambda: wilson_interval(3, 2), "got 3 of 2"),
        (lambda: mean_interval([1.0], confidence=95), "between 0 and 1, got 95"),
        (lambda: student_quantile(0.95, 0), "degrees: expected at least 1, got 0"),
        (lambda: mean_interval(np.ones((2, 2))), r"expected an array \[n\], got shape \[2, 2\]"),
        (lambda: bootstrap_interval([1.0], num_resamples=0), "num_resamples: expected at least 1, got 0"),
    ],
)
def test_errors_say_what_was_expected(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
