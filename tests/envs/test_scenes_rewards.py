"""The edit reward of the scenes: what is right scores full, what is untouched, lost or wrong scores nothing."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from envs.scenes.edit_goals import read_edit
from envs.scenes.edit_reading import NEAR_RAMP
from envs.scenes.edits import EDIT_SKILLS, EditTask, sample_edit
from envs.scenes.render import render
from envs.scenes.rewards import edit_reward
from envs.scenes.world import COLORS, SHAPES, Scene, SceneObject, overlaps, place
from rewards.base import Prompt, Scores
from rewards.checker import check_reward
from rewards.scoring import score

Images = NDArray[np.uint8]
COUNT = 200


@cache
def edits(skill: str) -> tuple[EditTask, ...]:
    rng = np.random.default_rng(EDIT_SKILLS.index(skill))
    return tuple(sample_edit(rng, "train" if i % 2 else "held_out", skill) for i in range(COUNT))


def prompts_of(tasks: Sequence[EditTask]) -> list[Prompt]:
    sources = render([task.source for task in tasks])
    return [Prompt(task.text, (image,), task.metadata) for task, image in zip(tasks, sources, strict=True)]


def judged(tasks: Sequence[EditTask], scenes: Sequence[Scene]) -> Scores:
    return score(edit_reward, render(scenes), prompts_of(tasks))


def damaged(images: Images, blur: float, noise: float) -> Images:
    smooth = ndimage.gaussian_filter(images.astype(np.float32), (0, blur, blur, 0), mode="nearest")
    smooth += np.random.default_rng(7).normal(0, noise, images.shape)
    rounded: Images = np.rint(smooth).clip(0, 255).astype(np.uint8)
    return rounded


def after(task: EditTask, done: Sequence[int]) -> Scene:
    """The source with only some operations of the target carried out."""
    operations = task.metadata["ops"]
    removed = [op["object"] for op in operations if op["op"] == "remove"]
    stay = [i for i in range(len(task.source)) if i not in removed]
    finished = dict(zip(stay, task.target, strict=False))
    chosen = [operations[i] for i in done]
    changed = {op["object"]: finished.get(op["object"]) for op in chosen if op["op"] != "add"}
    scene = [changed.get(i, o) for i, o in enumerate(task.source)]
    return (*(o for o in scene if o), *(task.target[len(stay) :] if any(op["op"] == "add" for op in chosen) else ()))


def kept_of(task: EditTask) -> list[SceneObject]:
    return [task.source[i] for i in read_edit(task.metadata).kept]


def disjoint(scene: Scene) -> bool:
    return not any(overlaps(o.box, [p.box for p in scene[:i]]) for i, o in enumerate(scene))


@pytest.mark.parametrize("skill", EDIT_SKILLS)
def test_the_target_is_strictly_right(skill: str) -> None:
    tasks = edits(skill)
    scores = judged(tasks, [task.target for task in tasks])
    assert not scores.reasons
    assert scores.components["strict"].mean() >= 0.99
    assert (scores.total >= 0.9).mean() >= 0.99


@pytest.mark.parametrize("skill", EDIT_SKILLS)
def test_the_untouched_source_scores_nothing(skill: str) -> None:
    tasks = edits(skill)
    scores = judged(tasks, [task.source for task in tasks])
    assert (scores.total == 0).all()
    assert (scores.components["strict"] == 0).all()
    assert (scores.components["preservation"] == 1).all()


def test_an_untouched_source_that_the_detector_doubts_scores_nothing() -> None:
    tasks = [task for skill in EDIT_SKILLS for task in edits(skill)[:50]]
    for blur, noise in ((1.0, 12.0), (1.5, 20.0)):
        images = damaged(render([task.source for task in tasks]), blur, noise)
        prompts = [Prompt(task.text, (image,), task.metadata) for task, image in zip(tasks, images, strict=True)]
        scores = score(edit_reward, images, prompts)
        assert (scores.total == 0).all()
        assert (scores.components["strict"] == 0).all()


def test_a_noisy_copy_of_the_source_scores_next_to_nothing() -> None:
    tasks = [task for skill in EDIT_SKILLS for task in edits(skill)[:50]]
    images = damaged(render([task.source for task in tasks]), 0.7, 8)
    assert score(edit_reward, images, prompts_of(tasks)).total.max() < 0.1


@pytest.mark.parametrize("skill", EDIT_SKILLS)
def test_what_is_wanted_without_the_rest_scores_next_to_nothing(skill: str) -> None:
    tasks = [task for task in edits(skill) if kept_of(task)]
    assert len(tasks) >= 100
    alone = [tuple(o for o in task.target if o not in kept_of(task)) for task in tasks]
    scores = judged(tasks, alone)
    assert scores.total.max() < 0.2
    assert scores.components["strict"].max() == 0


@pytest.mark.parametrize("skill", EDIT_SKILLS)
def test_a_repainted_scene_scores_next_to_nothing(skill: str) -> None:
    """All objects of the target are there, those that nobody named anywhere else."""
    rng = np.random.default_rng(5)
    tasks, scenes = [], []
    for task in edits(skill):
        kept = kept_of(task)
        scene = [o for o in task.target if o not in kept]
        for o in kept:
            draws = [place(rng, o.kind, [p.box for p in scene]) for _ in range(20)]
            far = [d for d in draws if d is not None and math.dist((d.x, d.y), (o.x, o.y)) > NEAR_RAMP[0] + 1]
            scene += far[:1]
        if kept and len(scene) == len(task.target):
            tasks.append(task)
            scenes.append(tuple(scene))
    assert len(tasks) >= 100
    assert judged(tasks, scenes).total.max() < 0.2


def test_half_of_a_compound_earns_little() -> None:
    pairs = [(task, after(task, [half])) for task in edits("compound") for half in (0, 1)]
    pairs = [(task, scene) for task, scene in pairs if disjoint(scene)]
    scores = judged([task for task, _ in pairs], [scene for _, scene in pairs])
    assert scores.components["strict"].max() == 0
    assert scores.total.min() >= 0
    assert scores.total.max() < 0.6
    assert 0.2 < np.median(scores.total) < 0.4


@pytest.mark.parametrize(("blur", "noise"), [(0.0, 8.0), (0.7, 0.0), (0.7, 8.0), (1.0, 12.0)])
def test_slight_damage_costs_little(blur: float, noise: float) -> None:
    tasks = [task for skill in EDIT_SKILLS for task in edits(skill)[:60]]
    scores = score(edit_reward, damaged(render([task.target for task in tasks]), blur, noise), prompts_of(tasks))
    assert (scores.total > 0.6).mean() >= 0.99
    assert scores.components["strict"].mean() >= 0.98


@pytest.mark.parametrize("skill", ["recolor", "add", "replace"])
def test_a_wrong_color_scores_low(skill: str) -> None:
    scenes = []
    for task in edits(skill):
        (operation,) = task.metadata["ops"]
        old = task.source[operation["object"]].color if "object" in operation else None
        wrong = next(c for c in COLORS if c not in (operation["color"], old))
        index = operation.get("object", len(task.source))
        scenes.append(tuple(replace(o, color=wrong) if i == index else o for i, o in enumerate(task.target)))
    assert judged(edits(skill), scenes).total.max() < 0.3


@pytest.mark.parametrize("skill", ["recolor", "remove", "replace"])
def test_editing_the_wrong_object_scores_low(skill: str) -> None:
    scenes = []
    for task in edits(skill):
        (operation,) = task.metadata["ops"]
        scene: list[SceneObject | None] = list(task.source)
        other = (operation["object"] + 1) % len(scene)
        shape = operation.get("shape", task.source[other].shape)
        changed = replace(task.source[other], color=operation.get("color", "red"), shape=shape)
        scene[other] = None if skill == "remove" else changed
        scenes.append(tuple(o for o in scene if o is not None))
    assert judged(edits(skill), scenes).total.max() < 0.3


# A scene with room to spare, worked by hand: preservation is 1 wherever the blue square, bottom right, is as it was.
RED_CIRCLE = SceneObject("circle", "red", 12.0, 12.0, 7.0)
BLUE_SQUARE = SceneObject("square", "blue", 36.0, 36.0, 7.0)
GREEN_CROSS = SceneObject("cross", "green", 36.0, 11.0, 6.5)
RECOLOR = {"op": "recolor", "object": 0, "color": "green"}
REMOVE = {"op": "remove", "object": 0}
MOVE = {"op": "move", "object": 0, "where": "bottom"}
MOVE_RIGHT = {"op": "move", "object": 0, "where": "right of", "anchor": 1}
ADD = {"op": "add", "color": "green", "shape": "cross", "where": "right"}
REPLACE = {"op": "replace", "object": 0, "color": "green", "shape": "cross"}
SCENE = (RED_CIRCLE, BLUE_SQUARE)
MOVED = replace(RED_CIRCLE, y=36.0)


def example(*operations: Mapping[str, Any], scene: Scene = SCENE) -> Prompt:
    metadata = {"tag": "any", "ops": list(operations), "scene": [asdict(o) for o in scene]}
    return Prompt("an edit", (render([scene])[0],), metadata)


@pytest.mark.parametrize(
    ("operations", "scene", "total", "strict"),
    [
        ((RECOLOR,), (replace(RED_CIRCLE, color="green"), BLUE_SQUARE), 1.0, 1.0),
        # The shape alone is right, as in the source: no gain.
        ((RECOLOR,), (replace(RED_CIRCLE, color="black"), BLUE_SQUARE), 0.0, 0.0),
        ((RECOLOR,), (BLUE_SQUARE,), 0.0, 0.0),
        ((REMOVE,), (BLUE_SQUARE,), 1.0, 1.0),
        # Something else stands there.
        ((REMOVE,), (replace(RED_CIRCLE, color="green"), BLUE_SQUARE), 0.0, 0.0),
        # Shape or colour alone: a quarter.
        ((REPLACE,), (replace(RED_CIRCLE, color="green"), BLUE_SQUARE), 0.25, 0.0),
        ((REPLACE,), (replace(RED_CIRCLE, shape="cross"), BLUE_SQUARE), 0.25, 0.0),
        ((ADD,), (*SCENE, GREEN_CROSS), 1.0, 1.0),
        # One extra: half, and its paint does damage, 133 pixels of some 1900, .48 deep: exp(-.34) / 2.
        ((ADD,), (*SCENE, GREEN_CROSS, replace(GREEN_CROSS, x=12.0, y=36.0)), 0.36, 0.0),
        ((MOVE,), (MOVED, BLUE_SQUARE), 1.0, 1.0),
        # Deleted, not moved.
        ((MOVE,), (BLUE_SQUARE,), 0.0, 0.0),
        # One operation of two: (0 + 1/2) / 2.
        ((REMOVE, ADD), (BLUE_SQUARE,), 0.25, 0.0),
        ((REMOVE, ADD), (*SCENE, GREEN_CROSS), 0.25, 0.0),
        ((REMOVE, ADD), (BLUE_SQUARE, GREEN_CROSS), 1.0, 1.0),
        # A new object where the removed one stood.
        ((REMOVE, {**ADD, "where": "left"}), (replace(GREEN_CROSS, x=12.0), BLUE_SQUARE), 1.0, 1.0),
    ],
)
def test_edits_worked_by_hand(
    operations: Sequence[Mapping[str, Any]], scene: Scene, total: float, strict: float
) -> None:
    scores = score(edit_reward, render([scene]), [example(*operations)])
    assert scores.total[0] == pytest.approx(total, abs=0.01)
    assert scores.components["strict"][0] == strict


def test_a_copy_is_no_move() -> None:
    """Half of the credit, less what the source has, where it stands at the wrong end: (1/2 - b) / (1 - b), b < 0.2."""
    scores = score(edit_reward, render([(RED_CIRCLE, MOVED, BLUE_SQUARE)]), [example(MOVE)])
    assert 0.2 < scores.total[0] < 0.5
    assert scores.components["strict"][0] == 0


def test_paint_that_is_left_is_not_removed() -> None:
    source, target = render([SCENE, (BLUE_SQUARE,)])
    smear = damaged(source[None], 4.0, 0.0)[0]
    image = target.copy()
    image[:22, :22] = smear[:22, :22]
    scores = score(edit_reward, np.stack([image, target]), [example(REMOVE)] * 2)
    assert scores.total[0] < 0.6
    assert scores.components["strict"].tolist() == [0, 1]


def test_removing_and_adding_the_same_again_is_not_the_source() -> None:
    again = {"op": "add", "color": "red", "shape": "circle", "where": "left"}
    scenes = [SCENE, (BLUE_SQUARE, replace(RED_CIRCLE, y=37.0))]
    scores = score(edit_reward, render(scenes), [example(REMOVE, again)] * 2)
    assert scores.total.tolist() == pytest.approx([0, 1])
    assert scores.components["strict"].tolist() == [0, 1]


def lost(task: EditTask, level: int) -> Scene:
    return tuple(o for o in task.target if o not in kept_of(task)[:level])


def shifted(task: EditTask, level: int) -> Scene:
    first = kept_of(task)[0]
    return tuple(replace(o, x=o.x + 2 * level * (1 if o.x < 24 else -1)) if o == first else o for o in task.target)


def crowded(task: EditTask, level: int) -> Scene:
    rng, scene = np.random.default_rng(0), list(task.target)
    for shape in SHAPES[:level]:
        extra = place(rng, ("purple", shape), [o.box for o in scene], 6.0)
        scene += [extra] if extra is not None else []
    return tuple(scene)


@pytest.mark.parametrize("worse", [lost, shifted, crowded])
def test_more_damage_to_the_unnamed_scores_less(worse: Callable[[EditTask, int], Scene]) -> None:
    skills = ("recolor", "remove", "replace")
    tasks = [task for skill in skills for task in edits(skill)[:100] if len(kept_of(task)) >= 2]
    totals = np.stack([judged(tasks, [worse(task, level) for task in tasks]).total for level in range(3)])
    assert (np.diff(totals.mean(axis=1)) < -0.03).all()
    assert np.diff(totals, axis=0).max() < 1e-6


def test_more_paint_on_the_canvas_scores_less() -> None:
    tasks = [task for skill in EDIT_SKILLS for task in edits(skill)[:30]]
    clean = render([task.target for task in tasks]).astype(np.float32)
    texture = np.random.default_rng(2).uniform(-1, 1, (48, 48, 3)).astype(np.float32)
    totals = []
    for strength in (0, 30, 60, 90, 120):
        images = np.rint(clean + strength * texture).clip(0, 255).astype(np.uint8)
        totals.append(score(edit_reward, images, prompts_of(tasks)).total.mean())
    assert (np.diff(totals) < 0).all()
    assert totals[1] > 0.9
    assert totals[-1] < 0.5


def mixed_edits() -> tuple[Images, list[Prompt]]:
    tasks = [task for skill in EDIT_SKILLS for task in edits(skill)[:8]]
    scenes = [(task.target, task.source, task.target[1:], after(task, [0]))[i % 4] for i, task in enumerate(tasks)]
    return damaged(render(scenes), 0.9, 8), prompts_of(tasks)


def test_the_contract_and_the_speed() -> None:
    images, prompts = mixed_edits()
    check_reward(edit_reward, images, prompts)
    durations = []
    for _ in range(7):
        start = time.perf_counter()
        score(edit_reward, images, prompts)
        durations.append(time.perf_counter() - start)
    # The fastest of several, since other processes can only add.
    assert min(durations) / len(images) < 2e-3


def test_a_group_scores_as_its_members_do() -> None:
    """Samples that share one prompt object are judged against one reading of its source."""
    task = edits("move")[0]
    images = render([task.target, task.source, task.target])
    shared = score(edit_reward, images, prompts_of([task]) * 3).total
    assert shared.tolist() == score(edit_reward, images, prompts_of([task] * 3)).total.tolist()


OTHER = example(RECOLOR)


def with_scene(entry: Mapping[str, Any]) -> Prompt:
    return replace(OTHER, metadata={**OTHER.metadata, "scene": [entry]})


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (replace(OTHER, source_images=()), "expected the picture to edit, got none"),
        (replace(OTHER, source_images=(np.zeros((8, 8, 3), np.uint8),)), r"expected uint8 \[48, 48, 3\].*\[8, 8, 3\]"),
        (replace(OTHER, source_images=(np.zeros((48, 48, 3), np.float32),)), "expected uint8.*got float32"),
        (replace(OTHER, metadata={}), "scene: expected a list of mappings, got None"),
        (replace(OTHER, metadata={**OTHER.metadata, "ops": []}), "ops: expected at least one operation"),
        (example({"op": "recolour", "object": 0, "color": "red"}), "did you mean 'recolor'"),
        (example({**RECOLOR, "color": "grene"}), "did you mean 'green'"),
        (example({**RECOLOR, "object": 2}), r"index of the scene's 2 objects, got 2"),
        (example({**RECOLOR, "color": "red"}), "expected a change"),
        (example({**ADD, "where": "above"}), r"ops\[0\].anchor: expected an index"),
        (example(RECOLOR, REMOVE), "name another object"),
        (example(MOVE_RIGHT, {"op": "remove", "object": 1}), r"anchor: expected an object that no operation changes"),
        (example({"op": "move", "object": 0, "where": "left"}), r"ops\[0\]: expected something to do"),
        (with_scene({**asdict(RED_CIRCLE), "radius": 0}), "expected a number above 0"),
        (with_scene({"shape": "circle"}), r"scene\[0\].x: expected a fin"),
    ],
)
def test_an_edit_that_cannot_be_judged_is_masked(broken: Prompt, reason: str) -> None:
    right = render([(replace(RED_CIRCLE, color="green"), BLUE_SQUARE)] * 3)
    scores = score(edit_reward, right, [OTHER, broken, OTHER])
    for values in (scores.total, *scores.components.values()):
        assert np.isnan(values).tolist() == [False, True, False]
    assert scores.total[[0, 2]] == pytest.approx(1)
    assert list(scores.reasons) == [1]
    assert re.search(reason, scores.reasons[1])
    assert np.isnan(score(edit_reward, right[:1], [broken]).total).all()
