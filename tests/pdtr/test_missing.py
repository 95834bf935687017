"""Rewards that are not available: what they mask, and when a run gives up."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from agents.types import Condition, Rollout, Trajectory
from pdtr.missing import MissingSettings, MissingWatch, TooManyMissing, commonest_reason, masked

NAN = math.nan


def rollout(rewards: list[float], reasons: dict[int, str] | None = None) -> Rollout:
    """Groups of two."""
    count = len(rewards)
    latents = torch.zeros(count, 1, 1, 1)
    steps = torch.zeros(count, 0, 1, 1, 1)
    chain = Trajectory(Condition({"x": latents}), latents, torch.ones(2), (), steps, steps, torch.zeros(count, 0))
    ids = torch.arange(count) // 2
    return Rollout((chain,), torch.tensor(rewards), {}, ids, torch.zeros(count), reasons=reasons or {})


def test_dropping_samples_leaves_their_groups() -> None:
    found = masked(rollout([1.0, NAN, 2.0, 3.0]), "drop_sample").rewards
    assert found.isnan().tolist() == [False, True, False, False]


def test_dropping_groups_leaves_the_other_groups() -> None:
    found = masked(rollout([1.0, NAN, 2.0, 3.0]), "drop_group").rewards
    assert found.isnan().tolist() == [True, True, False, False]
    assert found[2:].tolist() == [2.0, 3.0]


def test_raising_names_how_many_and_why() -> None:
    with pytest.raises(TooManyMissing, match=r"1 of 4 rewards .*\(no answer\).*choose 'drop_sample'"):
        masked(rollout([1.0, NAN, 2.0, 3.0], {1: "no answer"}), "raise")


@pytest.mark.parametrize("on_missing", ["drop_sample", "drop_group", "raise"])
def test_where_nothing_is_missing_nothing_changes(on_missing: Any) -> None:
    assert masked(rollout([1.0, 2.0]), on_missing).rewards.tolist() == [1.0, 2.0]


def test_the_commonest_reason() -> None:
    assert commonest_reason([rollout([NAN, 1.0], {0: "a"}), rollout([NAN, NAN], {0: "b", 1: "b"})]) == "b"
    assert commonest_reason([rollout([1.0, 1.0])]) == ""


def test_the_watch_counts_over_its_window_and_forgets() -> None:
    watch = MissingWatch(MissingSettings(max_share=0.5, window=2))
    for rewards in ([NAN, 1.0], [NAN, 1.0], [1.0, 1.0], [NAN, NAN], [1.0, 1.0], [NAN, NAN]):
        watch.observe({"t2i": rollout(rewards)})
    assert watch.shares == {"t2i": [0.0, 1.0]}
    with pytest.raises(TooManyMissing, match="last 2 iterations 75% are not available"):
        watch.observe({"t2i": rollout([NAN, 1.0])})


def test_a_judge_that_never_answers_stops_a_run_before_its_window_is_over() -> None:
    watch = MissingWatch(MissingSettings(max_share=0.5, window=10))
    for _ in range(5):
        watch.observe({"t2i": rollout([NAN, NAN])})
    with pytest.raises(TooManyMissing, match=r"last 6 iterations 100% are not available.*no reason was given"):
        watch.observe({"t2i": rollout([NAN, NAN])})


def test_a_dead_judge_of_the_smaller_task_stops_a_run() -> None:
    watch = MissingWatch(MissingSettings(max_share=0.5, window=4))
    both = {"t2i": rollout([1.0] * 8), "edit": rollout([NAN, NAN], {0: "no answer"})}
    for rollouts in (both, {"t2i": rollout([1.0, 1.0])}, both):
        watch.observe(rollouts)
    # Of all rewards a fifth is missing; the iteration without edits says nothing of their judge.
    with pytest.raises(TooManyMissing, match=r"^edit: of the rewards of its last 3 iterations 100% .*: no answer;"):
        watch.observe(both)
    assert watch.shares["t2i"] == [0.0] * 4


def test_a_restored_watch_goes_on() -> None:
    first, second = (MissingWatch(MissingSettings(window=2)) for _ in range(2))
    first.observe({"edit": rollout([NAN, NAN])})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(TooManyMissing):
        second.observe({"edit": rollout([NAN, 1.0])})


def test_a_watch_goes_on_with_a_shorter_window() -> None:
    watch = MissingWatch(MissingSettings(max_share=0.5, window=2))
    watch.load_state_dict({"shares": {"edit": [1.0, 1.0, 1.0, 0.0, 0.5]}})
    assert watch.shares == {"edit": [0.0, 0.5]}
    watch.observe({"edit": rollout([NAN, 1.0])})


def test_a_watch_goes_on_from_a_checkpoint_that_counted_all_tasks_together() -> None:
    watch = MissingWatch(MissingSettings(max_share=0.5, window=2))
    watch.load_state_dict({"shares": [0.5, 0.5]})
    watch.observe({"edit": rollout([NAN, NAN]), "t2i": rollout([1.0, 1.0])})
    assert watch.shares == {"edit": [1.0], "t2i": [0.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_missing": "drop_samples"}, "got 'drop_samples'; did you mean 'drop_sample'"),
        ({"max_share": 1.5}, r"max_share in \[0, 1\]"),
        ({"window": 0}, "window of 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MissingSettings(**changes)
