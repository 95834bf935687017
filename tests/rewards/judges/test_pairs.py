"""Preferences and win rates, worked by hand; a missing pair is left out and a group of one has none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.judges.pairs import Pair, group_scores, ordered_pairs, preferences, win_rates
from rewards.judges.readouts import NAN, Reading
from rewards.judges.settings import JudgeSettings


def readings(values: dict[Pair, float]) -> dict[Pair, Reading]:
    return {
        pair: Reading(value, {"label_mass": 0.9}) if value == value else Reading(NAN, {}, f"lost {pair}")
        for pair, value in values.items()
    }


HAND = {(0, 1): 0.9, (1, 0): 0.3, (0, 2): 0.8, (2, 0): 0.4, (1, 2): 0.5, (2, 1): 0.7}


def test_both_orders_are_averaged_by_hand() -> None:
    """(0.9 + 0.7) / 2 = 0.8; (0.8 + 0.6) / 2 = 0.7; (0.5 + 0.3) / 2 = 0.4."""
    found = preferences(readings(HAND), 3)
    np.testing.assert_allclose(found, [[NAN, 0.8, 0.7], [0.2, NAN, 0.4], [0.3, 0.6, NAN]])


def test_win_rates_are_the_means_of_the_rows() -> None:
    scores = group_scores(readings(HAND), 3, max_missing=0)
    np.testing.assert_allclose(scores.total, [0.75, 0.3, 0.45], rtol=1e-6)
    assert scores.total.dtype == np.float32
    assert scores.reasons == {}
    np.testing.assert_allclose(scores.components["label_mass"], 0.9)
    np.testing.assert_array_equal(scores.components["missing_pairs"], [0, 0, 0])
    # 0 beats 1 and 2 in both orders; of (1, 2) the first order is a tie, the second names 2.
    np.testing.assert_allclose(scores.components["order_agreement"], [1, 0.5, 0.5])


def test_a_missing_pair_is_left_out_and_never_a_half() -> None:
    """Without (2, 1) the pair of 1 and 2 is gone: its one order has the position's bias."""
    scores = group_scores(readings({**HAND, (2, 1): NAN}), 3, max_missing=0.5)
    np.testing.assert_allclose(scores.total, [0.75, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(scores.components["missing_pairs"], [0, 0.5, 0.5])
    # A gap that keeps the group out of a cache.
    np.testing.assert_allclose(scores.components["order_agreement"], [1, NAN, NAN])
    assert scores.reasons == {}


def test_too_many_missing_pairs_leave_no_rate() -> None:
    """Half of the pairs of 1 and 2 are gone: the one that is left is no rate in the group."""
    scores = group_scores(readings({**HAND, (2, 1): NAN}), 3, max_missing=0.49)
    np.testing.assert_allclose(scores.total, [0.75, NAN, NAN], rtol=1e-6)
    assert list(scores.reasons) == [1, 2]
    assert scores.reasons[1] == (
        "50% of this image's pairs lack an answer in one order or both, and max_missing_pairs is 0.49: lost (2, 1)"
    )


@pytest.mark.parametrize(("count", "may_be_lost"), [(2, 0), (3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (16, 3)])
def test_how_many_pairs_may_be_lost_unless_told_otherwise(count: int, may_be_lost: int) -> None:
    share = JudgeSettings().max_missing_pairs
    for lost in (may_be_lost, may_be_lost + 1):
        values = {pair: NAN if 0 in pair and sum(pair) <= lost else 0.5 for pair in ordered_pairs(count)}
        scores = group_scores(readings(values), count, share)
        assert scores.components["missing_pairs"][0] == pytest.approx(lost / (count - 1))
        assert np.isnan(scores.total[0]) == (lost > may_be_lost)


def test_an_image_without_a_pair_has_no_rate() -> None:
    lost = {pair: NAN for pair in HAND if 2 in pair}
    scores = group_scores(readings({**HAND, **lost}), 3, max_missing=1)
    np.testing.assert_allclose(scores.total, [0.8, 0.2, NAN], rtol=1e-6)
    assert list(scores.reasons) == [2]
    assert scores.reasons[2].startswith("100% of this image's pairs lack an answer")
    assert scores.reasons[2].endswith(": lost (0, 2)")


def test_a_group_of_one_has_no_pair() -> None:
    scores = group_scores({}, 1, max_missing=1)
    assert np.isnan(scores.total).tolist() == [True]
    assert scores.reasons == {0: "a group of one has no pair to compare"}


def test_an_empty_group() -> None:
    assert group_scores({}, 0, max_missing=0).total.shape == (0,)


def test_every_pair_in_both_orders() -> None:
    assert ordered_pairs(3) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert len(ordered_pairs(16)) == 240


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(-0.3, 0.3))
def test_a_judge_s_bias_for_a_position_cancels(strengths: list[float], bias: float) -> None:
    count = len(strengths)
    fair = {(i, j): 0.5 + (strengths[i] - strengths[j]) / 5 for i, j in ordered_pairs(count)}
    leaning = {pair: value + bias for pair, value in fair.items()}
    expected = win_rates(preferences(readings(fair), count))
    found = win_rates(preferences(readings(leaning), count))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.mean() == pytest.approx(0.5, abs=1e-6)


def test_a_judge_that_always_names_the_first_agrees_with_itself_nowhere() -> None:
    scores = group_scores(readings(dict.fromkeys(ordered_pairs(4), 0.95)), 4, max_missing=0)
    np.testing.assert_allclose(scores.total, 0.5)
    np.testing.assert_array_equal(scores.components["order_agreement"], 0)
