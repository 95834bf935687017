"""Agreement with a ground truth: each figure by hand, then the properties of their intervals."""

import numpy as np
import pytest

from rewards.agreement import agreement, calibration_error, pairwise_accuracy, spearman


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 (0 + 1 + 1 + 0) / (4 * 15).
    assert spearman([10, 20, 30, 40], [0.1, 0.5, 0.3, 0.9]) == pytest.approx(0.8)


def test_spearman_gives_ties_their_mean_rank() -> None:
    # Truths have ranks 1.5 1.5 3.5 3.5, rewards 1 2 3 4: covariance 4 over sqrt(5 * 4).
    assert spearman([1, 2, 3, 4], [0, 0, 1, 1]) == pytest.approx(4 / np.sqrt(20))
    assert np.isnan(spearman([1, 2, 3], [0, 0, 0]))


def test_spearman_sees_order_alone() -> None:
    rng = np.random.default_rng(0)
    rewards, truths = rng.normal(size=(2, 50))
    assert spearman(np.exp(rewards), truths) == pytest.approx(spearman(rewards, truths))


def test_pairs_of_a_group_that_differ_are_counted() -> None:
    rewards, truths = [0.9, 0.1, 0.5, 0.2, 0.2], [1.0, 0.0, 0.98, 0.0, 1.0]
    # Group a: 0-1 and 2-1 are in order, 0-2 does not differ; group b: 3-4 is a tie of rewards.
    share, count = pairwise_accuracy(rewards, truths, ["a", "a", "a", "b", "b"])
    assert (share, count) == (pytest.approx(2.5 / 3), 3)


def test_no_pairs_is_no_share() -> None:
    share, count = pairwise_accuracy([1, 2], [0, 1], ["a", "b"])
    assert np.isnan(share)
    assert count == 0


def test_calibration_error_by_hand() -> None:
    # Bins {0.1, 0.2} and {0.8, 0.9}: |0.15 - 0.5| and |0.85 - 1.0|, half each.
    assert calibration_error([0.1, 0.9, 0.2, 0.8], [0, 1, 1, 1], num_bins=2) == pytest.approx((0.35 + 0.15) / 2)


def test_intervals_hold_the_figures_and_shrink() -> None:
    rng = np.random.default_rng(1)
    groups = [str(i // 4) for i in range(800)]
    truths = rng.random(800)
    rewards = truths + 0.3 * rng.normal(size=800)
    many = agreement(rewards, truths, groups, 100)
    few = agreement(rewards[:80], truths[:80], groups[:80], 100)
    assert many.spearman.low < many.spearman.value < many.spearman.high
    assert many.pairwise.low < many.pairwise.value < many.pairwise.high
    assert many.spearman.high - many.spearman.low < few.spearman.high - few.spearman.low
    assert many == agreement(rewards, truths, groups, 100)


def test_missing_rewards_are_left_out() -> None:
    found = agreement([0.1, np.nan, 0.9, 0.5], [0, 1, 1, 0.5], ["a", "a", "a", "a"], 10)
    assert found.count == 3
    assert found.spearman.value == pytest.approx(1)
    with pytest.raises(ValueError, match="at least two"):
        agreement([np.nan, np.nan], [0, 1], ["a", "a"])
    with pytest.raises(ValueError, match="one length"):
        agreement([1, 2], [0, 1], ["a"])
