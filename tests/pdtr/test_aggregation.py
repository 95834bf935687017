"""Several rewards as one: what "normalize_then_sum" (GDPO) is made of, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agents.algorithms.base import Algorithm
from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from agents.functional import group_advantages
from agents.types import Rollout
from pdtr.adaptive import Adaptive
from pdtr.aggregation import Aggregation, summed, weighted
from pdtr.config import TrainConfig
from pdtr.curriculum import Curriculum, Joint, SingleTask, Staged
from pdtr.stages import Constant, Linear, Schedule, Stage, Step
from rewards.base import Images, Prompt, Scores
from rewards.compose import WeightedSum
from rewards.scoring import score

GDPO: Aggregation = "normalize_then_sum"


def make_rollout(rewards: list[float], **components: list[float]) -> Rollout:
    """Groups of four, without images."""
    values = {name: torch.tensor(value) for name, value in components.items()}
    ids, zeros = torch.arange(len(rewards)) // 4, torch.zeros(len(rewards))
    return Rollout((), torch.tensor(rewards), values, ids, zeros)


def one_stage(task: str = "t2i", num_iterations: int = 4, **reward_weights: Schedule) -> Staged:
    return Staged((Stage("one", {task: 1.0}, num_iterations, reward_weights=reward_weights),))


def config_of(curriculum: Curriculum, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"curriculum": curriculum, "aggregation": GDPO, **changes})


def loud(images: Images, prompts: list[Prompt]) -> Any:
    """Range 30."""
    return np.array([30, 0, 30, 0], np.float32)


def soft(images: Images, prompts: list[Prompt]) -> Any:
    """Range 0.3, and against the other."""
    return np.array([0, 0.3, 0, 0.3], np.float32)


def opposed() -> Rollout:
    """What a sum of both gives for one group."""
    reward = WeightedSum({"loud": loud, "soft": soft}, {"loud": 1.0, "soft": 1.0})  # type: ignore[dict-item]
    prompt = Prompt("a")
    found: Scores = score(reward, np.zeros((4, 2, 2, 3), np.uint8), [prompt] * 4)
    return make_rollout(found.total.tolist(), **{name: part.tolist() for name, part in found.components.items()})


def test_opposed_members_of_a_sum_cancel_whatever_their_ranges() -> None:
    (found,) = weighted([opposed()], {"loud": 1.0, "soft": 1.0}, GDPO)
    assert group_advantages(found.rewards, 4, "global").abs().max() < 1e-3
    (with_total,) = weighted([opposed()], {"loud": 1.0, "soft": 1.0, "total": 1.0}, GDPO)
    # The total is nearly all of the louder one's.
    assert with_total.rewards.tolist() == pytest.approx([1, -1, 1, -1], rel=1e-3)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 0.5}, [0.5, -0.5, 0.5, -0.5]),
        ({"a": 0.5, "total": 0.0}, [0.5, -0.5, 0.5, -0.5]),
        ({"a": 0.5, "total": 1.0}, [1.5, -1.5, -0.5, 0.5]),
        ({"a": 0.5, "total": -2.0}, [-1.5, 1.5, 2.5, -2.5]),
        ({"a": 0.0, "total": 1.0}, [1.0, -1.0, -1.0, 1.0]),
        ({"a": 0.5, "b": 1.0}, [1.5, -0.5, -0.5, -0.5]),
    ],
)
def test_the_total_counts_where_it_is_named(weights: Mapping[str, float], expected: list[float]) -> None:
    rollout = make_rollout([3.0, 1.0, 1.0, 3.0], a=[9.0, 5.0, 9.0, 5.0], b=[2.0, 1.0, 0.0, 1.0])
    if "b" in weights:
        expected = [0.5 + math.sqrt(2), -0.5, 0.5 - math.sqrt(2), -0.5]
    (found,) = weighted([rollout], weights, GDPO)
    assert found.rewards.tolist() == pytest.approx(expected)


def test_a_sum_has_the_total_unless_it_is_weighed() -> None:
    rollout = make_rollout([3.0, 1.0, 1.0, 3.0], a=[9.0, 5.0, 9.0, 5.0])
    for weights, expected in (
        ({}, [3, 1, 1, 3]),
        ({"a": 1.0}, [12, 6, 10, 8]),
        ({"a": 1.0, "total": 0.0}, [9, 5, 9, 5]),
    ):
        assert weighted([rollout], weights)[0].rewards.tolist() == expected


def test_summed_are_the_terms_that_are_normalised() -> None:
    """What is logged is a sum of what is learnt from, and missing where that is."""
    rollout = make_rollout([math.nan, 1.0, 1.0, 3.0], a=[9.0, math.nan, 9.0, 5.0])
    for weights in ({"a": 1.0}, {"a": 1.0, "total": 1.0}, {"a": 0.0, "total": 1.0}):
        (before,), (after,) = summed([rollout], weights, GDPO), weighted([rollout], weights, GDPO)
        assert before.rewards.isnan().tolist() == after.rewards.isnan().tolist()
    assert summed([rollout], {"a": 2.0}, GDPO)[0].rewards[2:].tolist() == [18, 10]
    assert summed([rollout], {"a": 2.0, "total": 1.0}, GDPO)[0].rewards[2:].tolist() == [19, 13]


def test_a_task_with_none_of_the_components_has_its_total() -> None:
    edit = make_rollout([0.0, 0.0, 2.0, 2.0], preservation=[1.0, 0.0, 1.0, 0.0])
    t2i = make_rollout([0.0, 0.0, 2.0, 2.0], official=[0.0, 1.0, 0.0, 1.0])
    first, second = weighted([edit, t2i], {"preservation": 1.0}, GDPO)
    assert first.rewards.tolist() == pytest.approx([1, -1, 1, -1])
    assert second.rewards.tolist() == pytest.approx([-1, -1, 1, 1])
    assert summed([edit, t2i], {"preservation": 1.0}, GDPO)[1].rewards.tolist() == [0, 0, 2, 2]
    # Not where it is said not to count.
    assert weighted([edit, t2i], {"preservation": 1.0, "total": 0.0}, GDPO)[1].rewards.tolist() == [0] * 4


@pytest.mark.parametrize("weights", [{}, {"total": 1.0}])
def test_a_plan_without_weights_of_components_is_refused(weights: Mapping[str, float]) -> None:
    """A curriculum of one's own has no stages that could be looked at before the run."""
    with pytest.raises(ValueError, match="it would normalise the finished total, not its members; weigh these by name"):
        weighted([opposed()], weights, GDPO)
    assert weighted([opposed()], weights)[0].rewards.tolist() == opposed().rewards.tolist()


@pytest.mark.parametrize(
    "curriculum",
    [
        SingleTask("t2i", 4),
        Joint(4),
        one_stage(total=Constant(1.0)),
        one_stage(a=Constant(0.0), total=Constant(1.0)),
        one_stage(a=Linear(0.0, 0.0, 3)),
        Staged((*one_stage(a=Constant(1.0)).stages, Stage("two", {"edit": 1.0}, 2))),
        Adaptive(SingleTask("t2i", 4)),
        Adaptive(Adaptive(one_stage(total=Constant(1.0)))),
    ],
    ids=repr,
)
def test_no_weighed_component_is_refused_at_construction(curriculum: Curriculum) -> None:
    with pytest.raises(
        ValueError, match=r"^stage '\w+': aggregation \"normalize_then_sum\" expects weights for com"
    ) as e:
        config_of(curriculum)
    assert str(e.value).endswith('in the stage\'s reward_weights, or choose "sum_then_normalize"')
    assert "\n" not in str(e.value)
    config_of(curriculum, aggregation="sum_then_normalize")


def test_an_iteration_with_nothing_to_normalise_is_refused_at_construction() -> None:
    for schedule, iteration in ((Linear(0.0, 1.0, 2), 0), (Step((1.0, 0.0), (3,)), 3)):
        with pytest.raises(
            ValueError, match=rf"stage 'one': .*got {{'a': 0.0}} in iteration {iteration}; change the sch"
        ):
            config_of(one_stage(a=schedule))
        config_of(one_stage(a=schedule, total=Constant(0.5)))
        config_of(one_stage(a=schedule, b=Constant(0.5)))
    # The schedule's end is after the stage's.
    config_of(one_stage(num_iterations=3, a=Step((1.0, 0.0), (3,))))


@pytest.mark.parametrize("algorithm", [FlowGRPO(), DiffusionNFT()], ids=["flow_grpo", "diffusion_nft"])
def test_a_second_division_by_the_groups_deviation_is_refused(algorithm: Algorithm) -> None:
    curriculum = one_stage(a=Constant(1.0))
    grouped = replace(algorithm, advantage_std="group")  # type: ignore[type-var]
    with pytest.raises(
        ValueError, match=r'algorithm.advantage_std: expected "global", GDPO\'s, or "none" .*got "group"'
    ):
        config_of(curriculum, algorithm=grouped)
    config_of(curriculum, algorithm=grouped, aggregation="sum_then_normalize")
    for std in ("global", "none"):
        config_of(curriculum, algorithm=replace(algorithm, advantage_std=std))  # type: ignore[type-var]


def test_why_it_is_refused() -> None:
    """A group that hardly differs stays quiet beside one that does, unless it is divided by its deviation once more."""
    rollout = make_rollout([0.0] * 8, a=[3e-4, 0.0, 3e-4, 0.0, 1.0, 0.0, 1.0, 0.0])
    (found,) = weighted([rollout], {"a": 1.0}, GDPO)
    assert group_advantages(found.rewards, rollout.group_ids, "global")[:4].abs().max() < 0.01
    assert group_advantages(found.rewards, rollout.group_ids, "group")[:4].abs().max() > 0.9


def test_the_floor_is_the_run_s() -> None:
    """A reward on a hundredth of the scale counts as much as another with a hundredth of the floor."""
    values = [1.0, 0.0, 1.0, 0.0]
    small = make_rollout([0.0] * 4, a=[value / 100 for value in values])
    (full,) = weighted([make_rollout([0.0] * 4, a=values)], {"a": 1.0}, GDPO)
    (low,) = weighted([small], {"a": 1.0}, GDPO, std_floor=0.0005)
    (shrunk,) = weighted([small], {"a": 1.0}, GDPO)
    torch.testing.assert_close(low.rewards, full.rewards)
    torch.testing.assert_close(shrunk.rewards, full.rewards / 10)  # 0.005 over 0.05.
    with pytest.raises(ValueError, match="reward_std_floor: expected a number above 0, got 0"):
        config_of(one_stage(a=Constant(1.0)), reward_std_floor=0.0)
