"""Curricula as sequences of plans: what is practised, when a stage follows, and that a resume repeats it."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtr.adaptive import Adaptive
from pdtr.curriculum import (
    Alternating,
    Curriculum,
    Joint,
    Plan,
    SingleTask,
    Staged,
    pdtr_curriculum,
    reversed_order,
    split_prompts,
)
from pdtr.stages import Linear, Stage
from rewards.base import Prompt


class Pool:
    """Prompts of a task, uniform in difficulty within what is asked for."""

    def __init__(self, task: str) -> None:
        self.task = task

    def draw(self, rng: np.random.Generator, count: int, difficulty: tuple[float, float] = (0.0, 1.0)) -> list[Prompt]:
        return [Prompt(self.task, metadata={"difficulty": float(d)}) for d in rng.uniform(*difficulty, count)]


POOLS = {task: Pool(task) for task in ("edit", "t2i")}


def skill(prompts: tuple[Prompt, ...]) -> np.ndarray:
    """A policy that succeeds at everything below 0.3, half the time up to 0.6, and never above."""
    rows = [[1, 1] if d < 0.3 else [1, 0] if d < 0.6 else [0, 0] for d in (p.metadata["difficulty"] for p in prompts)]
    return np.array(rows, dtype=np.float32)


def step(curriculum: Curriculum, iteration: int, num_prompts: int = 10) -> Plan | None:
    plan = curriculum.propose(POOLS, num_prompts, np.random.default_rng([7, iteration]))
    if plan is not None:
        curriculum.observe(plan, {part.task: skill(part.prompts) for part in plan.parts})
        curriculum.observe_evaluation({"edit": iteration / 10, "t2i": 0.5})
    return plan


def run(curriculum: Curriculum, num_prompts: int = 10, first: int = 0, limit: int = 100) -> list[Plan]:
    plans = []
    for iteration in range(first, limit):
        plan = step(curriculum, iteration, num_prompts)
        if plan is None:
            return plans
        plans.append(plan)
    raise AssertionError(f"not finished after {limit} iterations")


def counts(plan: Plan) -> dict[str, int]:
    return {part.task: len(part.prompts) for part in plan.parts}


MAKE: dict[str, Callable[[], Curriculum]] = {
    "pdtr": lambda: pdtr_curriculum(3, 4, rehearsal=0.2),
    "reversed": lambda: reversed_order(3, 4),
    "joint": lambda: Joint(5),
    "alternating": lambda: Alternating(6, ("edit", "t2i", "t2i")),
    "single": lambda: SingleTask("t2i", 9, plateau=3),
    "band": lambda: Adaptive(pdtr_curriculum(3, 4)),
    "progress": lambda: Adaptive(Joint(6), signal="learning_progress"),
    "target": lambda: Staged((Stage("a", {"edit": 1.0}, 50, target=0.3), Stage("b", {"t2i": 1.0}, 50, plateau=2))),
}


def test_pdtr_edits_first_and_draws_second() -> None:
    plans = run(pdtr_curriculum(2, 3))
    assert [counts(plan) for plan in plans] == [{"edit": 10}] * 2 + [{"t2i": 10}] * 3
    assert [plan.stage_name for plan in plans] == ["edit"] * 2 + ["t2i"] * 3
    assert [plan.stage for plan in plans] == [0, 0, 1, 1, 1]
    assert [plan.starts_stage for plan in plans] == [True, False, True, False, False]
    assert [plan.reset_reference for plan in plans] == [True, False, True, False, False]
    assert [plan.keep_optimizer for plan in plans] == [False, True, False, True, True]


def test_reversed_order_is_the_other_way_round() -> None:
    assert [counts(plan) for plan in run(reversed_order(3, 2))] == [{"t2i": 10}] * 3 + [{"edit": 10}] * 2


def test_a_later_stage_rehearses() -> None:
    assert [counts(plan) for plan in run(pdtr_curriculum(1, 2, rehearsal=0.2))] == [
        {"edit": 10},
        {"t2i": 8, "edit": 2},
        {"t2i": 8, "edit": 2},
    ]


def test_a_stage_says_what_it_keeps() -> None:
    stages = (
        Stage("a", {"edit": 1.0}, 1, reset_reference=False),
        Stage(
            "b",
            {"t2i": 1.0},
            2,
            reset_reference=False,
            keep_optimizer=True,
            learning_rate_scale=0.5,
            algorithm={"beta": 2.0},
        ),
    )
    plans = run(Staged(stages))
    assert [plan.algorithm for plan in plans] == [{}, {"beta": 2.0}, {"beta": 2.0}]
    assert [plan.reset_reference for plan in plans] == [False, False, False]
    assert [plan.keep_optimizer for plan in plans] == [False, True, True]
    assert [plan.learning_rate_scale for plan in plans] == [1.0, 0.5, 0.5]


def test_the_learning_rate_falls_over_the_last_share_of_each_stage() -> None:
    falling = Stage("a", {"edit": 1.0}, 8, decay_share=0.5, learning_rate_scale=2.0)
    plans = run(Staged((falling, replace(falling, name="b", num_iterations=4, decay_share=1.0))))
    scales = [plan.learning_rate_scale for plan in plans]
    assert scales == pytest.approx([2, 2, 2, 2, 2, 1.5, 1, 0.5, 2, 1.5, 1, 0.5])


def test_reward_weights_count_within_their_stage() -> None:
    weights = {"judge": Linear(0.0, 1.0, 2)}
    stages = (Stage("a", {"edit": 1.0}, 2, reward_weights=weights), Stage("b", {"t2i": 1.0}, 3, reward_weights=weights))
    assert [plan.reward_weights["judge"] for plan in run(Staged(stages))] == [0.0, 0.5, 0.0, 0.5, 1.0]


def test_joint_has_every_task_in_every_iteration() -> None:
    assert [counts(plan) for plan in run(Joint(3, {"edit": 1, "t2i": 2}))] == [{"edit": 3, "t2i": 7}] * 3


def test_alternating_takes_turns() -> None:
    assert [counts(plan) for plan in run(Alternating(3))] == [{"edit": 10}, {"t2i": 10}, {"edit": 10}]


def test_a_single_task_ends_at_a_plateau() -> None:
    # t2i stands still at 0.5: the first evaluation is the best, and two more end it.
    assert [counts(plan) for plan in run(SingleTask("t2i", 50, plateau=2))] == [{"t2i": 10}] * 3


def test_a_stage_follows_when_the_target_is_met() -> None:
    # edit scores iteration / 10, so 0.3 is met after iteration 3; t2i was at 0.5 already, so two evaluations end it.
    assert [plan.stage_name for plan in run(MAKE["target"]())] == ["a"] * 4 + ["b"] * 2


def test_a_finished_curriculum_stays_finished() -> None:
    curriculum = Joint(1)
    assert [step(curriculum, i) is None for i in range(4)] == [False, True, True, True]


@pytest.mark.parametrize("name", MAKE)
def test_the_whole_batch_is_used(name: str) -> None:
    assert all(sum(counts(plan).values()) == 11 for plan in run(MAKE[name](), num_prompts=11))


@pytest.mark.parametrize("name", MAKE)
def test_a_resume_repeats_the_run_from_any_iteration(name: str) -> None:
    whole = run(MAKE[name]())
    first = MAKE[name]()
    for iteration in range(len(whole) + 1):
        resumed = MAKE[name]()
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert resumed.state_dict() == first.state_dict()
        assert run(resumed, first=iteration) == whole[iteration:]
        step(first, iteration)


@pytest.mark.parametrize("name", MAKE)
def test_a_state_is_not_changed_by_going_on(name: str) -> None:
    curriculum = MAKE[name]()
    step(curriculum, 0)
    state = curriculum.state_dict()
    before = json.dumps(state)
    for iteration in (1, 2):
        step(curriculum, iteration)
    assert json.dumps(state) == before
    other = MAKE[name]()
    other.load_state_dict(state)
    step(other, 1)
    assert json.dumps(state) == before


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("other", MAKE)
def test_a_foreign_state_is_rejected(name: str, other: str) -> None:
    if name == other:
        assert MAKE[name]().load_state_dict(MAKE[other]().state_dict()) is None
        return
    with pytest.raises(ValueError, match="expected a state with"):
        MAKE[name]().load_state_dict(MAKE[other]().state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curriculum": "Stages"}, "Staged: expected a state with curriculum 'Staged', got 'Stages'"),
        ({"stages": ["edit"]}, r"expected a state with stages \['edit', 't2i'\], got \['edit'\]"),
        ({"stage": 3}, r"expected a state with stage in 0\.\.2, got 3"),
        ({"stage": "edit"}, r"expected a state with stage in 0\.\.2, got 'edit'"),
        ({"progress": {"iterations": 1}}, "expected a state with progress"),
    ],
)
def test_a_wrong_state_is_named(change: dict, message: str) -> None:
    curriculum = pdtr_curriculum(2, 2)
    with pytest.raises(ValueError, match=message):
        curriculum.load_state_dict({**curriculum.state_dict(), **change})


@pytest.mark.parametrize("key", ["curriculum", "stages", "stage", "progress", "scores"])
def test_a_missing_part_of_a_state_is_named(key: str) -> None:
    curriculum = pdtr_curriculum(2, 2)
    state = curriculum.state_dict()
    del state[key]
    with pytest.raises(ValueError, match=key):
        curriculum.load_state_dict(state)


def test_a_finished_run_may_be_made_longer() -> None:
    short, long = pdtr_curriculum(2, 2), pdtr_curriculum(2, 5)
    for iteration in range(4):
        step(short, iteration)
    long.load_state_dict(short.state_dict())
    assert [counts(plan) for plan in run(long, first=4)] == [{"t2i": 10}] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Staged(()), "at least one stage"),
        (lambda: Staged((Stage("a", {"edit": 1.0}, 1), Stage("a", {"t2i": 1.0}, 1))), "got 'a' twice"),
        (lambda: pdtr_curriculum(0, 3), "expected num_iterations of at least 1, got 0"),
        (lambda: pdtr_curriculum(1, 3, rehearsal=1.0), r"in \[0, 1\), got 1.0"),
        (lambda: Joint(3, {}), "positive share"),
        (lambda: Alternating(3, ()), "positive share"),
        (lambda: SingleTask("edit", -1), "expected num_iterations of at least 1"),
        (lambda: Adaptive(Joint(1), signal="succes_band"), "did you mean 'success_band'"),
        (lambda: Adaptive(Joint(1), edges=(0.0, 0.5)), "edges: expected at least three"),
        (lambda: Adaptive(Joint(1), edges=(0.0, 0.5, 0.5, 1.0)), "edges"),
        (lambda: Adaptive(Joint(1), edges=(0.0, 0.5, 1.5)), "edges"),
        (lambda: Adaptive(Joint(1), band=(0.8, 0.2)), "band: expected"),
        (lambda: Adaptive(Joint(1), rate=0.0), "rate: expected"),
        (lambda: Adaptive(Joint(1), exploration=0.0), "exploration: expected"),
        (lambda: Adaptive(Joint(1), success_threshold=math.nan), "success_threshold: expected"),
    ],
)
def test_a_wrong_value_is_named_at_construction(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_misspelt_task_of_the_last_stage_is_found_at_the_first_iteration() -> None:
    curriculum = Staged((Stage("a", {"edit": 1.0}, 9), Stage("b", {"t2": 1.0}, 9)))
    with pytest.raises(ValueError, match=r"stage 'b'.*got 't2'; did you mean 't2i'\?"):
        step(curriculum, 0)


def test_too_few_prompts_for_a_later_stage_are_found_at_the_first_iteration() -> None:
    with pytest.raises(ValueError, match=r"of 4 task 'edit' with the share 0.1 gets none; 10 are enough"):
        step(pdtr_curriculum(5, 5, rehearsal=0.1), 0, num_prompts=4)


def test_a_pool_that_gives_too_little_is_named() -> None:
    class Empty(Pool):
        def draw(self, rng, count, difficulty=(0.0, 1.0)):
            return super().draw(rng, count, difficulty)[1:]

    with pytest.raises(ValueError, match="pool of 'edit': expected 10 prompts as asked, got 9"):
        SingleTask("edit", 1).propose({"edit": Empty("edit")}, 10, np.random.default_rng(0))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("break_it", [lambda r: {}, lambda r: {t: v[:, 0] for t, v in r.items()}])
def test_rewards_of_the_wrong_shape_are_named(name: str, break_it) -> None:
    curriculum = MAKE[name]()
    plan = curriculum.propose(POOLS, 10, np.random.default_rng(0))
    assert plan is not None
    with pytest.raises(ValueError, match="rewards"):
        curriculum.observe(plan, break_it({part.task: skill(part.prompts) for part in plan.parts}))


@pytest.mark.parametrize(
    ("num_prompts", "shares", "expected"),
    [
        (10, {"a": 0.5, "b": 0.5}, [5, 5]),
        (11, {"a": 0.5, "b": 0.5}, [6, 5]),
        (10, {"a": 0.7, "b": 0.3}, [7, 3]),
        (10, {"a": 1, "b": 2}, [3, 7]),
        (7, {"a": 1, "b": 1, "c": 1}, [3, 2, 2]),
        (10, {"a": 4.6, "b": 4.7, "c": 0.7}, [4, 5, 1]),
    ],
)
def test_split_by_largest_remainder(num_prompts: int, shares: dict[str, float], expected: list[int]) -> None:
    assert list(split_prompts(num_prompts, shares).values()) == expected


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(1, 300))
def test_a_split_keeps_its_quotas(shares: list[float], extra: int) -> None:
    by_task = {str(index): share for index, share in enumerate(shares)}
    num_prompts = math.ceil(sum(shares) / min(shares)) + extra
    split = split_prompts(num_prompts, by_task)
    assert sum(split.values()) == num_prompts
    for task, share in by_task.items():
        assert abs(split[task] - num_prompts * share / sum(shares)) < 1 + 1e-6


def adaptive_after(signal: str, rewards: list[float]) -> Adaptive:
    """An adaptive curriculum over three bins of "edit", all of which were practised once with these success rates."""
    curriculum = Adaptive(SingleTask("edit", 99), signal=signal, rate=0.5)  # type: ignore[arg-type]
    observe(curriculum, rewards)
    return curriculum


def observe(curriculum: Adaptive, rewards: list[float]) -> None:
    plan = curriculum.propose({"edit": Pool("edit")}, 3, np.random.default_rng(0))
    assert plan is not None
    prompts = tuple(Prompt("", metadata={"difficulty": d}) for d in (0.1, 0.4, 1.0))
    part = type(plan.parts[0])("edit", prompts)
    samples = np.array([[reward, reward] for reward in rewards], dtype=np.float32)
    for row, reward in zip(samples, rewards, strict=True):
        row[:] = (1, 0) if reward == 0.5 else reward
    curriculum.observe(Plan(0, "edit", (part,), {}, False, False, True), {"edit": samples})


def test_untried_bins_are_alike() -> None:
    curriculum = Adaptive(SingleTask("edit", 9))
    assert curriculum.bin_probabilities("edit") == pytest.approx([1 / 3] * 3)


def test_the_band_is_preferred() -> None:
    assert adaptive_after("success_band", [1, 0.5, 0]).bin_probabilities("edit") == pytest.approx(
        [1 / 30, 28 / 30, 1 / 30]
    )


def test_an_untried_bin_counts_as_in_the_band() -> None:
    assert adaptive_after("success_band", [1, math.nan, 0]).bin_probabilities("edit")[1] == pytest.approx(28 / 30)


def test_without_a_bin_in_the_band_the_nearest_is_preferred() -> None:
    curriculum = adaptive_after("success_band", [1, 0, 0])
    assert curriculum.bin_probabilities("edit") == pytest.approx([1 / 3] * 3)
    observe(curriculum, [1, 0, 0])
    curriculum._fast["edit"][1] = 0.1
    assert curriculum.bin_probabilities("edit") == pytest.approx([1 / 30, 28 / 30, 1 / 30])


def test_learning_progress_follows_change_in_either_direction() -> None:
    curriculum = adaptive_after("learning_progress", [0, 1, 0.5])
    assert curriculum.bin_probabilities("edit") == pytest.approx([1 / 3] * 3)
    observe(curriculum, [1, 0, 0.5])
    # By hand: fast moves by 1/2, slow by 1/4 of the way, so |fast - slow| = 1/4, 1/4, 0.
    assert curriculum.bin_probabilities("edit") == pytest.approx([0.45 + 1 / 30, 0.45 + 1 / 30, 1 / 30])


def test_learning_progress_tries_what_is_untried_first() -> None:
    curriculum = adaptive_after("learning_progress", [0, math.nan, 0])
    assert curriculum.bin_probabilities("edit") == pytest.approx([1 / 30, 28 / 30, 1 / 30])


@pytest.mark.parametrize("signal", ["success_band", "learning_progress"])
def test_nan_rewards_teach_nothing(signal: str) -> None:
    curriculum = adaptive_after(signal, [1, 0.5, 0])
    before = curriculum.state_dict()["fast"]
    observe(curriculum, [math.nan] * 3)
    assert curriculum.state_dict()["fast"] == before


def test_adaptive_settles_on_the_difficulty_that_teaches() -> None:
    plans = run(Adaptive(Joint(20)), num_prompts=40)
    late = [p.metadata["difficulty"] for plan in plans[5:] for part in plan.parts for p in part.prompts]
    assert np.mean([0.3 <= d < 0.6 for d in late]) > 0.85
    uniform = [p.metadata["difficulty"] for plan in run(Joint(20), 40) for part in plan.parts for p in part.prompts]
    assert np.mean([0.3 <= d < 0.6 for d in uniform]) < 0.4


def test_adaptive_keeps_the_inner_stages() -> None:
    inner, outer = run(pdtr_curriculum(3, 4, rehearsal=0.2)), run(Adaptive(pdtr_curriculum(3, 4, rehearsal=0.2)))
    assert [(p.stage_name, counts(p), p.starts_stage) for p in outer] == [
        (p.stage_name, counts(p), p.starts_stage) for p in inner
    ]


def test_adaptive_within_adaptive_stays_within_both() -> None:
    curriculum = Adaptive(Adaptive(SingleTask("edit", 9), edges=(0.0, 0.1, 0.2)), edges=(0.0, 0.15, 1.0))
    plan = step(curriculum, 0, 50)
    assert plan is not None
    assert all(p.metadata["difficulty"] <= 0.2 for p in plan.parts[0].prompts)


def test_prompts_without_difficulty_are_named() -> None:
    curriculum = Adaptive(SingleTask("edit", 9))
    plan = curriculum.propose(POOLS, 1, np.random.default_rng(0))
    assert plan is not None
    bare = Plan(0, "edit", (type(plan.parts[0])("edit", (Prompt("", id="edit/3"),)),), {}, True, True, False)
    with pytest.raises(ValueError, match=r"prompt 'edit/3': Adaptive expects metadata\['difficulty'\]"):
        curriculum.observe(bare, {"edit": np.ones((1, 2), np.float32)})


@pytest.mark.parametrize("module", ["pdtr", "pdtr.curriculum", "pdtr.adaptive", "pdtr.checkpoint"])
def test_importing_is_light(module: str) -> None:
    program = f"import sys, {module}; print(*({{'torch', 'safetensors', 'gymnasium'}} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []
