"""What is logged of rollouts, by hand; the whole row is in test_trainer.py."""

import math

import pytest
import torch

from agents.types import Rollout
from pdtr.metrics import rollout_metrics

NAN = float("nan")


def row(rewards: list[float]) -> dict[str, float]:
    values = torch.tensor(rewards)
    groups = torch.arange(len(values)) // 2
    return rollout_metrics("t2i", Rollout((), values, {}, groups, torch.zeros_like(values)), group_size=2)


def test_a_group_without_any_reward_is_no_group_of_equal_rewards() -> None:
    """Deviations of the two groups that have rewards: 0.5 and 0; the third has none."""
    found = row([0.0, 1.0, 0.5, 0.5, NAN, NAN])
    assert found["group_std/t2i"] == pytest.approx(0.25)
    assert found["zero_std_ratio/t2i"] == 0.5
    assert found["missing_ratio/t2i"] == pytest.approx(1 / 3)


def test_a_group_with_one_reward_teaches_nothing() -> None:
    assert row([0.0, 1.0, NAN, 0.5])["zero_std_ratio/t2i"] == 0.5


def test_without_any_reward_there_is_no_group_to_tell_of() -> None:
    found = row([NAN, NAN, NAN, NAN])
    assert math.isnan(found["group_std/t2i"])
    assert math.isnan(found["zero_std_ratio/t2i"])
    assert found["missing_ratio/t2i"] == 1.0
