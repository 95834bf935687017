"""Schedules by golden numbers, and every rule by which a stage ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtr.stages import Constant, Linear, Stage, StageProgress, Step, nearest_name


def run(stage: Stage, scores: list[float], start: float | None = None) -> int | None:
    """How many iterations a stage lasts with one evaluation of "edit" after each; None if the scores do not end it."""
    progress = stage.start({} if start is None else {"edit": start})
    for index, score in enumerate(scores):
        progress = StageProgress(index + 1, progress.best, progress.evaluations_since_best, progress.at_target)
        progress = stage.evaluated(progress, {"edit": score})
        if stage.ended(progress):
            return index + 1
    return None


def test_constant_is_its_value() -> None:
    assert [Constant(0.7).at(i) for i in (0, 5, 10**6)] == [0.7, 0.7, 0.7]


def test_linear_rises_to_its_end_and_stays() -> None:
    schedule = Linear(0.2, 1.0, 4)
    assert [schedule.at(i) for i in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert schedule.at(4) == 1.0


def test_linear_may_fall() -> None:
    assert [Linear(1.0, 0.0, 2).at(i) for i in range(3)] == [1.0, 0.5, 0.0]


def test_step_changes_at_its_boundaries() -> None:
    schedule = Step((1.0, 2.0, 5.0), (3, 5))
    assert [schedule.at(i) for i in range(7)] == [1.0, 1.0, 1.0, 2.0, 2.0, 5.0, 5.0]


@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(1, 50), st.integers(0, 100))
def test_linear_stays_between_its_ends(start: float, end: float, length: int, iteration: int) -> None:
    low, high = sorted((start, end))
    assert low - 1e-9 <= Linear(start, end, length).at(iteration) <= high + 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(math.nan), "expected value to be a finite number"),
        (lambda: Linear(0.0, math.inf, 3), "expected end to be a finite number"),
        (lambda: Linear(0.0, 1.0, 0), "expected num_iterations of at least 1, got 0"),
        (lambda: Step((1.0, 2.0), (3, 5)), "got 2 values and 2 boundaries"),
        (lambda: Step((1.0, 2.0, 3.0), (5, 5)), "expected boundaries that rise"),
        (lambda: Step((1.0, 2.0), (0,)), "rise from above 0"),
        (lambda: Stage("", {"edit": 1.0}, 3), "expected a name"),
        (lambda: Stage("a", {}, 3), "positive share"),
        (lambda: Stage("a", {"edit": 1.0, "t2i": 0.0}, 3), "leave out the tasks"),
        (lambda: Stage("a", {"edit": math.nan}, 3), "positive share"),
        (lambda: Stage("a", {"edit": 1.0}, 0), "expected num_iterations of at least 1, got 0"),
        (lambda: Stage("a", {"edit": 1.0}, 3, plateau=0), "expected plateau of at least 1, got 0"),
        (lambda: Stage("a", {"edit": 1.0}, 3, target=math.nan), "expected target to be a finite number"),
        (lambda: Stage("a", {"edit": 1.0}, 3, learning_rate_scale=0.0), "learning_rate_scale above 0"),
        (lambda: Stage("a", {"edit": 1.0}, 3, decay_share=1.5), "decay_share between 0 and 1"),
        (lambda: Stage("a", {"edit": 1.0}, 3, min_improvement=-0.1), "expected min_improvement of at least 0"),
        (lambda: Stage("a", {"edit": 1.0}, 3, cycle=("edt",)), "did you mean 'edit'"),
        (lambda: Stage("a", {"edit": 1, "t2i": 1}, 3, cycle=("edit", "edit", "t2i")), "make them agree"),
        (lambda: Stage("a", {"edit": 1, "t2i": 1}, 3, cycle=("edit",)), "make them agree"),
    ],
)
def test_a_wrong_value_is_named_at_construction(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_shares_are_normalised() -> None:
    assert Stage("a", {"t2i": 8, "edit": 2}, 3).shares(0) == pytest.approx({"t2i": 0.8, "edit": 0.2})


def test_a_cycle_takes_turns() -> None:
    stage = Stage("a", {"edit": 1, "t2i": 2}, 9, cycle=("edit", "t2i", "t2i"))
    assert [next(iter(stage.shares(i))) for i in range(5)] == ["edit", "t2i", "t2i", "edit", "t2i"]


def test_weights_follow_their_schedules() -> None:
    stage = Stage("a", {"edit": 1.0}, 3, reward_weights={"judge": Linear(0.0, 1.0, 2), "pixel": Constant(0.5)})
    assert [stage.weights(i) for i in range(2)] == [{"judge": 0.0, "pixel": 0.5}, {"judge": 0.5, "pixel": 0.5}]


def test_a_stage_ends_after_its_iterations() -> None:
    stage = Stage("a", {"edit": 1.0}, 3)
    assert [stage.ended(StageProgress(i)) for i in range(5)] == [False, False, False, True, True]


def test_a_stage_ends_at_its_target() -> None:
    assert run(Stage("a", {"edit": 1.0}, 9, target=0.6), [0.5, 0.59, 0.6, 0.7]) == 3
    assert run(Stage("a", {"edit": 1.0}, 9, target=0.8), [0.5, 0.59, 0.6, 0.7]) is None


def test_a_target_of_zero_is_a_target() -> None:
    assert run(Stage("a", {"edit": 1.0}, 9, target=0.0), [-0.5, 0.0]) == 2


def test_a_target_met_before_the_stage_needs_an_evaluation_in_it() -> None:
    stage = Stage("a", {"edit": 1.0}, 9, target=0.6)
    assert not stage.ended(stage.start({"edit": 0.9}))
    assert not stage.ended(stage.evaluated(StageProgress(), {"edit": 0.9}))
    assert run(stage, [0.9], start=0.9) == 1


def test_a_stage_ends_at_a_plateau() -> None:
    stage = Stage("a", {"edit": 1.0}, 9, plateau=2)
    assert run(stage, [0.5, 0.6, 0.6, 0.55, 0.9]) == 4
    assert run(stage, [0.5, 0.6, 0.6, 0.61, 0.6, 0.62]) is None


def test_a_plateau_is_measured_from_the_evaluation_before_the_stage() -> None:
    stage = Stage("a", {"edit": 1.0}, 9, plateau=2)
    assert run(stage, [0.5, 0.6, 0.8], start=0.7) == 2
    assert run(stage, [0.5, 0.6, 0.8], start=None) is None


def test_an_improvement_has_to_be_large_enough() -> None:
    stage = Stage("a", {"edit": 1.0}, 9, plateau=2, min_improvement=0.05)
    assert run(stage, [0.50, 0.52, 0.54, 0.70]) == 3


def test_nan_is_no_evaluation() -> None:
    stage = Stage("a", {"edit": 1.0}, 9, plateau=2, target=0.9)
    assert run(stage, [0.5, math.nan, math.nan, math.nan]) is None
    assert run(stage, [0.5, math.nan, 0.4, math.nan, 0.4]) == 5


def test_the_measure_is_the_main_task() -> None:
    scores = {"edit": 0.2, "t2i": 0.6}
    assert Stage("a", {"t2i": 0.8, "edit": 0.2}, 9, target=0.5).measure(scores) == 0.6
    assert Stage("a", {"t2i": 1, "edit": 1}, 9, target=0.5).measure(scores) == pytest.approx(0.4)
    assert Stage("a", {"t2i": 1.0}, 9).measure({}) is None


def test_a_missing_evaluation_is_named() -> None:
    with pytest.raises(ValueError, match="needs the held-out score of 't2i', got scores of \\['edit'\\]"):
        Stage("a", {"t2i": 1.0}, 9, plateau=1).measure({"edit": 0.3})


def test_nearest_name() -> None:
    assert nearest_name("editing", ["t2i", "edit"]) == "edit"
    assert nearest_name("x", []) == ""
