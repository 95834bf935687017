from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from agents.policies.scenes import ScenesPolicy
from agents.samplers import ODE
from envs.prompts import FixedPool
from envs.scenes.rewards import edit_reward
from envs.scenes.suite import edit_prompts
from pdtr.evaluate import Evaluation, evaluate, mean
from pdtr.metrics import evaluation_row
from pdtr.tasks import Task
from rewards.base import Images, Prompt, Reward, Scores

WORDS = ("a red circle", "two squares", "the blue square", "make the circle red", "remove the circle")
PROMPTS = [Prompt(WORDS[i], (), {"tag": "odd" if i % 2 else "even", "number": i}, f"p{i}") for i in range(5)]


def brightness(images: Images, prompts: Sequence[Prompt]) -> Scores:
    """The prompt's number and the picture's brightness; prompt 3 cannot be judged, prompts 0 and 1 succeed."""
    numbers = np.array([prompt.metadata["number"] for prompt in prompts], np.float32)
    light = images.mean((1, 2, 3), dtype=np.float32) / 255
    missing = np.where(numbers == 3, np.nan, 0).astype(np.float32)
    return Scores(10 * numbers + light + missing, {"strict": (numbers < 2).astype(np.float32) + missing})


def found(policy: ScenesPolicy, chunk_size: int, prompts: Sequence[Prompt] = PROMPTS, **options: Any) -> Evaluation:
    reward: Reward = options.pop("reward", brightness)
    task = Task(options.pop("name", "t2i"), FixedPool(PROMPTS), reward, prompts, prompts, (48, 48))
    return evaluate(policy, task.make_envs(chunk_size), prompts, ODE(2), **options)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 8, 16])
def test_the_chunk_size_changes_nothing(tiny_policy: ScenesPolicy, chunk_size: int) -> None:
    whole, chunked = found(tiny_policy, 5), found(tiny_policy, chunk_size)
    assert chunked.ids == whole.ids == ("p0", "p1", "p2", "p3", "p4")
    assert chunked.skills == whole.skills == ("even", "odd", "even", "odd", "even")
    np.testing.assert_array_equal(chunked.strict, [1, 1, 0, np.nan, 0])
    # The tens are the prompt's number: each row belongs to its own prompt, and what filled the chunk up is gone.
    np.testing.assert_array_equal(chunked.reward // 10, [0, 1, 2, np.nan, 4])
    np.testing.assert_allclose(chunked.reward, whole.reward, atol=1e-3)
    # A level of 255 may be rounded the other way: a product's last bits depend on the batch.
    difference = np.abs(chunked.images.astype(int) - whole.images.astype(int))
    assert chunked.images.shape == (5, 48, 48, 3)
    assert difference.max() <= 1
    assert len({image.tobytes() for image in whole.images}) == 5


def test_what_was_evaluated_before_changes_nothing(tiny_policy: ScenesPolicy) -> None:
    prompts = edit_prompts("held_out", 4, 1)
    options: dict[str, Any] = {"name": "edit", "reward": edit_reward}
    first = found(tiny_policy, 3, prompts, **options)
    found(tiny_policy, 2)
    again = found(tiny_policy, 3, prompts, **options)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.reward, again.reward)
    np.testing.assert_array_equal(first.strict, again.strict)


def test_the_first_prompts_of_a_set_are_a_set_of_their_own(tiny_policy: ScenesPolicy) -> None:
    np.testing.assert_array_equal(found(tiny_policy, 1, PROMPTS[:2]).images, found(tiny_policy, 1).images[:2])


def test_missing_rows_are_left_out_of_every_mean(tiny_policy: ScenesPolicy) -> None:
    evaluation = found(tiny_policy, 2)
    assert evaluation.score == 0.5
    assert list(evaluation.by_skill().items()) == [("even", pytest.approx(1 / 3)), ("odd", 1.0)]
    row = evaluation_row(evaluation, "t2i", "tune", "base")
    assert (row["count"], row["missing"], row["strict"]) == (5, 1, 0.5)
    assert row["reward"] == pytest.approx(np.nanmean(evaluation.reward))
    assert (row["task"], row["set"], row["label"]) == ("t2i", "tune", "base")


def test_where_nothing_is_left_there_is_no_score() -> None:
    nothing = np.full(2, np.nan, np.float32)
    evaluation = Evaluation(("a", "b"), ("x", ""), nothing, nothing, np.zeros((2, 1, 1, 3), np.uint8))
    assert math.isnan(evaluation.score)
    assert all(math.isnan(value) for value in evaluation.by_skill().values())
    assert math.isnan(mean(np.empty(0, np.float32)))
    assert mean(np.array([1, np.nan, 2], np.float32)) == 1.5


def test_success_is_the_named_component_and_else_the_total(tiny_policy: ScenesPolicy) -> None:
    total = found(tiny_policy, 5, success="no such component")
    np.testing.assert_array_equal(total.strict, total.reward)
    assert total.score > 1


def test_no_prompts(tiny_policy: ScenesPolicy) -> None:
    with pytest.raises(ValueError, match="expected at least one prompt, got none"):
        found(tiny_policy, 2, [])
