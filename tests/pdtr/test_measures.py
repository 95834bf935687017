"""What evaluations count as success, as people are told of it."""

from __future__ import annotations

import math

import pytest

from pdtr.measures import REWARD, Measure


@pytest.mark.parametrize(
    ("success", "name", "axis"),
    [
        ("strict", "strict success", "strict success, %"),
        ("strict_not_comparable", "strict not comparable", "strict not comparable, %"),
        (REWARD, "mean reward", "mean reward"),
    ],
)
def test_a_measure_has_a_name_and_a_unit(success: str, name: str, axis: str) -> None:
    assert (Measure(success).name, Measure(success).axis) == (name, axis)


@pytest.mark.parametrize(
    ("success", "value", "sign", "told"),
    [
        ("strict", 0.125, "", "12.5"),
        ("strict", 0.125, "+", "+12.5"),
        ("strict", -0.0004, "+", "+0.0"),
        (REWARD, -3.5367, "", "-3.537"),
        (REWARD, 0.25, "+", "+0.250"),
        (REWARD, -0.0004, "+", "+0.000"),
        ("strict", math.nan, "", "–"),
        (REWARD, math.nan, "+", "–"),
    ],
)
def test_shares_are_told_in_percent_and_rewards_as_they_are(success: str, value: float, sign: str, told: str) -> None:
    assert Measure(success).told(value, sign) == told
