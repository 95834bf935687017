import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from envs.prompts import PromptPool, load_prompts, save_prompts
from envs.scenes.edits import EDIT_SKILLS, OPERATIONS, operation_combination, sample_edit, split_operations
from envs.scenes.grammar import SKILLS, combination, sample_task, split_combinations
from envs.scenes.render import render
from envs.scenes.suite import TASKS, ScenesPool, edit_prompts, t2i_prompts
from envs.scenes.world import SHAPES, SceneObject
from rewards.base import Prompt

MAKERS = {"t2i": t2i_prompts, "edit": edit_prompts}


def flat(prompt: Prompt) -> tuple[object, ...]:
    return prompt.text, prompt.metadata, prompt.id, prompt.group, [image.tobytes() for image in prompt.source_images]


def edit_combinations(metadata: dict[str, object]) -> set[tuple[object, ...]]:
    scene = tuple(SceneObject(**entry) for entry in metadata["scene"])  # type: ignore[attr-defined]
    return {(o["op"], *operation_combination(o, scene)) for o in metadata["ops"]}  # type: ignore[attr-defined]


@pytest.mark.parametrize("skill", SKILLS)
def test_no_held_out_combination_is_trained_on(skill: str) -> None:
    rng = np.random.default_rng(0)
    seen = {
        split: {combination(sample_task(rng, split, skill).metadata) for _ in range(6000)}
        for split in ("train", "held_out")
    }
    assert not seen["train"] & seen["held_out"]
    assert seen["held_out"] == set(split_combinations(skill)["held_out"])
    assert seen["train"] <= set(split_combinations(skill)["train"])
    # Hundreds of colour pairs are many to meet by chance, the others are all met.
    assert len(seen["train"]) > 0.99 * len(split_combinations(skill)["train"])


def asked_for(prompt: Prompt) -> set[tuple[str, object]]:
    """All that a prompt asks for, read off its metadata: whatever its own skill is."""
    include = prompt.metadata["include"]
    kinds = [(clause.get("color"), clause["class"]) for clause in include]
    found: set[tuple[str, object]] = {("colors", kind) for kind in kinds if kind[0]}
    if include[0]["count"] > 1:
        counted = (include[0]["count"], *kinds[0])
        found |= {("counting", counted), ("counting", (counted[0], None, counted[2]))}
    if len(include) == 2:
        ordered = tuple(sorted(kinds, key=lambda kind: SHAPES.index(kind[1])))
        found |= {("two_object", tuple(shape for _, shape in ordered)), ("color_attr", ordered)}
    if prompt.metadata["tag"] == "position":
        found.add(("position", combination(prompt.metadata)))
    return found


def test_no_training_prompt_contains_what_a_held_out_one_of_another_skill_tests() -> None:
    # A shape alone is no combination: see the module.
    skills = [skill for skill in SKILLS if skill != "single_object"]
    held_out = {(skill, chosen) for skill in skills for chosen in split_combinations(skill)["held_out"]}
    train, tested = (ScenesPool("t2i", split).draw(np.random.default_rng(2), 6000) for split in ("train", "held_out"))
    assert not set().union(*map(asked_for, train)) & held_out
    # The check can see: the held-out prompts contain nearly all of it (60 pairs of colours are not all met).
    assert len(set().union(*map(asked_for, tested)) & held_out) > 0.95 * len(held_out)


@pytest.mark.parametrize("skill", EDIT_SKILLS)
def test_no_held_out_operation_is_trained_on(skill: str) -> None:
    rng = np.random.default_rng(1)
    seen: dict[str, set[tuple[object, ...]]] = {"train": set(), "held_out": set()}
    for split in ("train", "held_out"):
        for _ in range(1500):
            seen[split] |= edit_combinations(dict(sample_edit(rng, split, skill).metadata))
    assert not seen["train"] & seen["held_out"]
    names = OPERATIONS if skill == "compound" else [skill]
    for split in ("train", "held_out"):
        allowed = {(name, *chosen) for name in names for chosen in split_operations(name)[split]}
        assert seen[split] <= allowed
        assert len(seen[split]) > 0.4 * len(allowed)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_numbered_sets(task: str, split: str) -> None:
    make, skills = MAKERS[task], SKILLS if task == "t2i" else EDIT_SKILLS
    prompts = make(split, 30, 7)
    assert [flat(p) for p in make(split, 13, 7)] == [flat(p) for p in prompts[:13]]
    assert [p.metadata["tag"] for p in prompts] == [skills[i % 6] for i in range(30)]
    assert prompts[12].id == f"{task}/{split}/7/00012"
    assert [p.text for p in make(split, 30, 8)] != [p.text for p in prompts]
    assert all(0 <= p.metadata["difficulty"] <= 1 for p in prompts)
    assert all(len(p.source_images) == (task == "edit") for p in prompts)


def test_sources_are_the_rendered_scenes() -> None:
    for prompt in edit_prompts("train", 12, 0):
        scene = tuple(SceneObject(**entry) for entry in prompt.metadata["scene"])
        np.testing.assert_array_equal(prompt.source_images[0], render([scene])[0])


def rounded(value: object) -> object:
    """JSON with its floats to six places: the last bit of a sum is the compiler's."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value


@pytest.mark.parametrize("task", TASKS)
def test_sets_are_the_same_on_every_machine(task: str) -> None:
    """The digest of texts and metadata: whoever changes the world changes every published number with it."""
    rows = [[p.text, p.metadata] for split in ("train", "held_out") for p in MAKERS[task](split, 60, 3)]
    digest = hashlib.sha256(json.dumps(rounded(rows), sort_keys=True).encode()).hexdigest()[:16]
    assert digest == {"t2i": "ed17aaa75ae8e4ef", "edit": "c6fa86df903d453e"}[task]


@pytest.mark.parametrize("task", TASKS)
def test_export_and_import(task: str, tmp_path: Path) -> None:
    prompts = MAKERS[task]("held_out", 18, 5)
    save_prompts(tmp_path / "set.jsonl", prompts)
    loaded = load_prompts(tmp_path / "set.jsonl")
    assert loaded.problems == ()
    assert [flat(p) for p in loaded.prompts] == [flat(p) for p in prompts]
    assert combination_or_operations(task, loaded.prompts[0])


def combination_or_operations(task: str, prompt: Prompt) -> object:
    return combination(prompt.metadata) if task == "t2i" else edit_combinations(dict(prompt.metadata))


@pytest.mark.parametrize("task", TASKS)
def test_pool_is_seeded_and_names_every_draw(task: str) -> None:
    pool = ScenesPool(task, "held_out")
    assert isinstance(pool, PromptPool)
    first, again = (pool.draw(np.random.default_rng(4), 40) for _ in range(2))
    assert [flat(p) for p in first] == [flat(p) for p in again]
    assert len({p.id for p in first}) == 40
    assert first[0].id.startswith(f"{task}/held_out/{first[0].metadata['tag']}/")
    assert len({p.metadata["tag"] for p in first}) == 6
    assert pool.draw(np.random.default_rng(4), 0) == []


@pytest.mark.parametrize(
    ("task", "difficulty", "tags"),
    [
        ("t2i", (0.0, 0.15), {"single_object"}),
        ("t2i", (0.6, 0.6), {"counting"}),
        ("t2i", (0.85, 1.0), {"position"}),
        ("edit", (0.0, 0.3), {"recolor", "remove"}),
        ("edit", (0.8, 1.0), {"compound"}),
    ],
)
def test_difficulty_chooses_the_prompts(task: str, difficulty: tuple[float, float], tags: set[str]) -> None:
    drawn = ScenesPool(task).draw(np.random.default_rng(0), 20, difficulty)
    assert set(Counter(p.metadata["tag"] for p in drawn)) == tags
    assert all(difficulty[0] <= p.metadata["difficulty"] <= difficulty[1] for p in drawn)


@pytest.mark.parametrize("task", TASKS)
def test_a_difficulty_without_prompts(task: str) -> None:
    with pytest.raises(ValueError, match=f"expected a range that some {task} prompt is in"):
        ScenesPool(task).draw(np.random.default_rng(0), 1, (0.95, 0.96))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="got 'edits'; did you mean 'edit'"):
        ScenesPool("edits")
    with pytest.raises(ValueError, match="did you mean 'held_out'"):
        ScenesPool("t2i", "heldout")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected integers of at least 0"):
        t2i_prompts("train", -1, 0)
