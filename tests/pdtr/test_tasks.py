from collections import Counter
from typing import Any

import numpy as np
import pytest

from envs.prompts import FixedPool
from envs.scenes.edit_goals import read_edit
from envs.scenes.grammar import SKILLS, combination, split_combinations
from envs.scenes.rewards import edit_reward, t2i_reward
from envs.scenes.suite import edit_prompts
from pdtr.tasks import Task, scenes_tasks
from rewards.base import Prompt
from rewards.pixel import redness

NUM_TUNE, NUM_FINAL = 60, 240


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return scenes_tasks(NUM_TUNE, NUM_FINAL)


def key(prompt: Prompt) -> tuple[Any, ...]:
    return (prompt.text, *(image.tobytes() for image in prompt.source_images))


def tags(prompts: Any) -> Counter[str]:
    return Counter(prompt.metadata["tag"] for prompt in prompts)


@pytest.mark.parametrize("name", ["t2i", "edit"])
def test_both_sets_have_the_asked_size_and_every_skill_alike(tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    assert (task.name, len(task.tune), len(task.final)) == (name, NUM_TUNE, NUM_FINAL)
    assert set(tags(task.tune).values()) == {NUM_TUNE // 6}
    assert set(tags(task.final).values()) == {NUM_FINAL // 6}
    assert [p.metadata["tag"] for p in task.final[:6]] == [p.metadata["tag"] for p in task.tune[:6]]
    assert len({p.id for p in [*task.tune, *task.final]}) == NUM_TUNE + NUM_FINAL


def test_no_edit_of_the_final_set_is_in_the_tuning_set(tasks: dict[str, Task]) -> None:
    assert not {key(p) for p in tasks["edit"].final} & {key(p) for p in tasks["edit"].tune}
    # Nothing had to be replaced: the set is the suite's own.
    assert [p.id for p in tasks["edit"].final] == [p.id for p in edit_prompts("held_out", NUM_FINAL, 3)]


def test_t2i_texts_of_the_final_set_are_new_where_there_are_enough(tasks: dict[str, Task]) -> None:
    seen = {p.text for p in tasks["t2i"].tune}
    repeated = tags(p for p in tasks["t2i"].final if p.text in seen)
    # One shape is held out, and eight openings (two of them alike) make seven texts of it.
    assert len({p.text for p in tasks["t2i"].final if p.metadata["tag"] == "single_object"}) <= 7
    assert set(repeated) <= {"single_object"}


def test_both_sets_are_held_out(tasks: dict[str, Task]) -> None:
    train = {skill: split_combinations(skill)["train"] for skill in SKILLS}
    for prompt in [*tasks["t2i"].tune, *tasks["t2i"].final]:
        assert combination(prompt.metadata) not in train[prompt.metadata["tag"]]
    for task in tasks.values():
        assert all(p.id.startswith(f"{task.name}/held_out/") for p in [*task.tune, *task.final])
        drawn = task.pool.draw(np.random.default_rng(0), 200)
        assert all(p.id.startswith(f"{task.name}/train/") for p in drawn)
        assert not {p.text for p in drawn if p.metadata["tag"] != "compound"} & {
            p.text for p in task.final if task.name == "t2i"
        }
    assert all(read_edit(p.metadata) for p in tasks["edit"].final)


def test_the_sets_are_the_same_every_time_and_short_ones_begin_long_ones(tasks: dict[str, Task]) -> None:
    again = scenes_tasks(NUM_TUNE, NUM_FINAL)
    for name, task in tasks.items():
        for first, second in ((task.tune, again[name].tune), (task.final, again[name].final)):
            assert [p.id for p in first] == [p.id for p in second]
            assert [key(p) for p in first] == [key(p) for p in second]


def test_without_a_tuning_set_nothing_is_taken_away() -> None:
    task = scenes_tasks(0, 12)["t2i"]
    assert (len(task.tune), [p.id for p in task.final]) == (0, [f"t2i/held_out/3/{i:05d}" for i in range(12)])


def test_another_reward_is_trained_on_and_the_truth_still_measured() -> None:
    tasks = scenes_tasks(6, 6, {"t2i": redness})
    t2i, edit = tasks["t2i"], tasks["edit"]
    assert (t2i.reward, t2i.held_out_reward, edit.reward, edit.held_out_reward) == (
        redness,
        t2i_reward,
        edit_reward,
        None,
    )
    images = np.full((2, 48, 48, 3), (200, 0, 0), np.uint8)
    found = {}
    for is_evaluation in (False, True):
        first, second = t2i.make_envs(2, is_evaluation)
        assert first is not second
        first.reset(options={"prompts": t2i.final[:2]})
        _, rewards, *_, infos = first.step(images)
        found[is_evaluation] = (rewards.round(4).tolist(), sorted(infos["components"]))
    assert found[False] == ([0.7843, 0.7843], [])
    assert found[True][1] == ["official", "strict", "trained"]
    assert max(found[True][0]) < 0.5


def test_each_task_has_its_own_environment() -> None:
    source = np.zeros((16, 16, 3), np.uint8)
    for name, prompt in {"t2i": Prompt("a"), "edit": Prompt("a", (source,))}.items():
        task = Task(name, FixedPool([prompt]), redness, [prompt], [prompt], (16, 16))
        observation, _ = task.make_envs(3)[1].reset(seed=0)
        assert ("source_image" in observation) == (name == "edit")


def test_a_reward_for_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected rewards for \['edit', 't2i'\], got one for 'text'"):
        scenes_tasks(1, 1, {"text": redness})
