"""The paired test against hand-made truths: an exact p-value, coverage, and its level under no difference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pdtr.paired import paired_test

NAN = float("nan")


def test_the_statistic_weighs_strata_alike() -> None:
    test = paired_test([[0.1, 0.3], [0.8]], num_resamples=100)
    assert test.interval.value == pytest.approx(0.5)
    assert test.pairs == 3


def test_the_p_value_is_that_of_all_choices_of_signs() -> None:
    differences = np.array([0.5, -0.1, 0.3, 0.4, 0.2, -0.2, 0.6])
    means = [np.mean(np.array(signs) * differences) for signs in itertools.product((-1, 1), repeat=len(differences))]
    exact = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    assert paired_test([differences], num_resamples=40_000).p_value == pytest.approx(exact, abs=0.01)


def test_no_difference_at_all_has_the_p_value_one() -> None:
    test = paired_test([np.zeros(20)], num_resamples=200)
    assert (test.p_value, test.interval) == (1.0, (0.0, 0.0, 0.0))


def test_a_pair_without_a_side_is_left_out() -> None:
    assert paired_test([[1.0, NAN, 1.0]], num_resamples=50).pairs == 2


def test_a_stratum_without_pairs_says_nothing() -> None:
    test = paired_test([[1.0], [NAN]], num_resamples=50)
    assert math.isnan(test.interval.value)
    assert math.isnan(test.p_value)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        test = paired_test([rng.normal(0.2, 1, 40), rng.normal(0.6, 2, 40)], 0.9, 300, trial)
        covered += test.interval.low <= 0.4 <= test.interval.high
    # Binomial with 0.9: three deviations are 0.064.
    assert 0.82 <= covered / 200 <= 0.96


def test_under_no_difference_few_p_values_are_small() -> None:
    rng = np.random.default_rng(1)
    small = sum(paired_test([rng.normal(0, 1, 30)], num_resamples=300, seed=s).p_value <= 0.1 for s in range(200))
    assert small / 200 <= 0.17


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="one a stratum"):
        paired_test([])
    with pytest.raises(ValueError, match="one a stratum"):
        paired_test([[[1.0, 2.0]]])
    with pytest.raises(ValueError, match="confidence"):
        paired_test([[1.0]], confidence=1.0)
