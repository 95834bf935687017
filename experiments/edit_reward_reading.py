"""Rendered edits, right and wrong in many ways, with all that the renderer knows: for a tiny model to learn reading.

Nothing here is drawn by a policy. What stands in each cell of a grid over the picture is known before the edit and as
the instruction would have it; after it the detector reads it, as it does a policy's edits. The instructions are of both
splits: a judge is an instrument, and the split is there to test the policy. A judge that never sees certain things
removed learns that they are not, whatever the words say (LOG.md, 2026-11-28). The policy's own edits, which a judge is
tested on, have pictures that it never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.scenes.detector import detect
from envs.scenes.edit_reading import CONFIDENT
from envs.scenes.edits import EditTask, sample_edit
from envs.scenes.render import render
from envs.scenes.rewards import edit_reward
from envs.scenes.world import CANVAS, COLORS, RADIUS_RANGE, SHAPES, Scene, SceneObject, centroid_of, pick, place
from rewards.base import Prompt
from rewards.edit_reward_data import DIMENSIONS, ScoredEdit

NOTHING, UNKNOWN = 0, -100
"""A cell's label where no object's centre lies in it, and where nobody can say."""
# Shares of candidates: as asked, as asked and one thing more, a near miss, something else, untouched, half way.
_KINDS = {"right": 0.27, "careless": 0.2, "miss": 0.23, "other": 0.12, "untouched": 0.06, "faded": 0.12}
_MAX_OBJECTS = 5
# As many as there are combinations: every fifth is held out.
_HELD_OUT_SHARE = 0.2


_KIND_INDEX = {(color, shape): (i, j) for i, color in enumerate(COLORS, 1) for j, shape in enumerate(SHAPES, 1)}


@dataclass(frozen=True)
class RenderedEdit:
    """An edit with its truth.

    Attributes:
        instruction: what was asked for.
        source: the picture before, uint8 [H, W, 3].
        image: the picture after.
        scores: by the ground truth, for each of ``DIMENSIONS``.
        cells: [3, 2, G * G]: before, after (as the detector reads it), as asked; colour and shape, counted from 1,
            ``NOTHING`` or ``UNKNOWN``.
    """

    instruction: str
    source: NDArray[np.uint8]
    image: NDArray[np.uint8]
    scores: dict[str, float]
    cells: NDArray[np.int64]


def rendered_edits(rng: np.random.Generator, count: int, grid: int) -> list[RenderedEdit]:
    """Draw ``count`` edits or a few less, with cells of a grid of ``grid`` by ``grid``."""
    return [edit for edit in _candidates(rng, _tasks(rng, count), grid) if edit is not None]


def rendered_pairs(rng: np.random.Generator, count: int, grid: int) -> list[tuple[RenderedEdit, RenderedEdit]]:
    """Draw ``count`` pairs of edits of one picture by one instruction, or a few less."""
    found = _candidates(rng, [task for task in _tasks(rng, count) for _ in range(2)], grid)
    pairs = zip(found[::2], found[1::2], strict=True)
    return [(first, second) for first, second in pairs if first is not None and second is not None]


def _tasks(rng: np.random.Generator, count: int) -> list[EditTask]:
    return [sample_edit(rng, "held_out" if rng.random() < _HELD_OUT_SHARE else "train") for _ in range(count)]


def _candidates(rng: np.random.Generator, tasks: Sequence[EditTask], grid: int) -> list[RenderedEdit | None]:
    """An edit of each task; None for the few that the ground truth cannot judge: their source fulfils it already."""
    kinds = [str(kind) for kind in rng.choice(list(_KINDS), len(tasks), p=list(_KINDS.values()))]
    scenes = [_jittered(rng, candidate(rng, task, kind)) for task, kind in zip(tasks, kinds, strict=True)]
    sources = render([task.source for task in tasks])
    images = render(scenes)
    for row, kind in enumerate(kinds):
        share = rng.uniform(0.15, 0.85) if kind == "faded" else 1.0
        images[row] = _damaged(rng, sources[row], images[row], share)
    prompts = [Prompt(t.text, (s,), t.metadata) for t, s in zip(tasks, sources, strict=True)]
    found = edit_reward(images, prompts)
    values = {**found.components, "total": found.total}
    after = detected_cells(images, grid)
    return [
        None
        if np.isnan(found.total[row])
        else RenderedEdit(
            task.text,
            sources[row],
            images[row],
            {name: float(values[name][row]) for name in DIMENSIONS},
            _edit_cells(task, after[row], grid),
        )
        for row, task in enumerate(tasks)
    ]


def scene_cells(scene: Scene, grid: int) -> NDArray[np.int64]:
    """Colour and shape of what has its centre in each cell, row by row: [2, G * G]."""
    cells = np.full((2, grid * grid), NOTHING, np.int64)
    for thing in scene:
        cells[:, _cell(thing.x, thing.y, grid)] = _KIND_INDEX[thing.kind]
    return cells


def detected_cells(images: NDArray[np.uint8], grid: int) -> NDArray[np.int64]:
    """The same of any pictures [B, H, W, 3], as the world's detector reads them: [B, 2, G * G].

    Where it is not sure of a shape, the way the ground truth is not, there is a colour and no shape.
    """
    cells = np.full((len(images), 2, grid * grid), NOTHING, np.int64)
    for row, found in enumerate(detect(images)):
        for thing in reversed(found):  # The surest last: it has the cell.
            if thing.color is not None:
                kind = _KIND_INDEX[thing.color, thing.label]
                place = _cell(*centroid_of(thing.label, thing.box), grid)
                cells[row, :, place] = kind[0], kind[1] if thing.confidence > CONFIDENT else NOTHING
    return cells


def drawn_cells(edits: Sequence[ScoredEdit], grid: int) -> NDArray[np.int64]:
    """A policy's edits before and after, as the detector reads them, and nobody says what was asked: [B, 3, 2, G * G].

    Differs from :class:`RenderedEdit`: there what was asked is known.
    """
    pictures = [np.stack([edit.source for edit in edits]), np.stack([edit.image for edit in edits])]
    before, after = (detected_cells(images, grid) for images in pictures)
    return np.stack([before, after, np.full_like(before, UNKNOWN)], 1)


def _cell(x: float, y: float, grid: int) -> int:
    column, row = (min(grid - 1, max(0, int(side * grid / CANVAS))) for side in (x, y))
    return row * grid + column


def _edit_cells(task: EditTask, after: NDArray[np.int64], grid: int) -> NDArray[np.int64]:
    before, asked = (scene_cells(scene, grid) for scene in (task.source, task.target))
    if any("where" in operation for operation in task.metadata["ops"]):
        # The place of what is added or moved is free: nobody can say of a free cell whether it should stay so.
        old = scene_cells(tuple(thing for thing in task.target if thing in task.source), grid)
        asked[(old == NOTHING) & (before == NOTHING)] = UNKNOWN
        asked[(old == NOTHING) & (before != NOTHING) & (asked != NOTHING)] = UNKNOWN
    return np.stack([before, after, asked])


def candidate(rng: np.random.Generator, task: EditTask, kind: str) -> Scene:
    """The scene of a candidate of this kind."""
    if kind in ("right", "faded"):
        return task.target
    if kind == "careless":
        return changed(rng, task.target, range(len(task.target)))
    if kind == "miss":
        done = [index for index, thing in enumerate(task.target) if thing not in task.source]
        return changed(rng, task.target, done) if done else changed(rng, task.source, range(len(task.source)))
    if kind == "other":
        scene = task.source
        for _ in range(int(rng.integers(1, 3))):
            scene = changed(rng, scene, range(len(scene)))
        return scene
    return task.source


def changed(rng: np.random.Generator, scene: Scene, among: Sequence[int]) -> Scene:
    """A scene with one thing different: an object recoloured, reshaped, moved, taken away, or one more."""
    objects = list(scene)
    name = pick(rng, ("color", "shape", "both", "move", "remove", "add"))
    index = pick(rng, among) if among else -1
    if name == "add" or index < 0:
        added = _placed(rng, (pick(rng, list(COLORS)), pick(rng, SHAPES)), objects, None)
        return (*objects, added) if added is not None and len(objects) < _MAX_OBJECTS else scene
    subject = objects.pop(index)
    if name == "remove":
        return tuple(objects)
    if name == "move":
        moved = _placed(rng, subject.kind, objects, subject.radius)
        objects.insert(index, moved or subject)
        return tuple(objects)
    color = pick(rng, [c for c in COLORS if c != subject.color]) if name != "shape" else subject.color
    shape = pick(rng, [s for s in SHAPES if s != subject.shape]) if name != "color" else subject.shape
    objects.insert(index, replace(subject, color=color, shape=shape))
    return tuple(objects)


def _placed(
    rng: np.random.Generator, kind: tuple[str, str], others: Sequence[SceneObject], radius: float | None
) -> SceneObject | None:
    return place(rng, kind, [other.box for other in others], radius)


def _jittered(rng: np.random.Generator, scene: Scene) -> Scene:
    """A policy never puts things back exactly: half of the time all are a little off."""
    if rng.random() < 0.5:
        return scene
    low, high = RADIUS_RANGE
    return tuple(
        replace(
            thing,
            x=thing.x + rng.normal(0, 0.6),
            y=thing.y + rng.normal(0, 0.6),
            radius=float(np.clip(thing.radius * rng.normal(1, 0.04), low - 1, high + 1)),
        )
        for thing in scene
    )


def _damaged(
    rng: np.random.Generator, source: NDArray[np.uint8], image: NDArray[np.uint8], share: float
) -> NDArray[np.uint8]:
    """A candidate between source and image, and in two cases of five with noise, blur or a smeared patch."""
    from scipy.ndimage import gaussian_filter

    pixels: NDArray[Any] = source + share * (image.astype(np.float32) - source)
    damages: list[Callable[[NDArray[np.float32]], NDArray[Any]]] = [
        lambda p: p + rng.normal(0, rng.uniform(2, 14), p.shape),
        lambda p: gaussian_filter(p, (s := rng.uniform(0.4, 1.4), s, 0)),
        lambda p: _smeared(rng, p),
    ]
    if rng.random() < 0.4:
        pixels = pick(rng, damages)(pixels)
    rounded: NDArray[np.uint8] = np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
    return rounded


def _smeared(rng: np.random.Generator, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    side = int(rng.integers(6, 17))
    top, left = (int(rng.integers(0, CANVAS - side)) for _ in range(2))
    spot = pixels[top : top + side, left : left + side]
    colour = np.array(pick(rng, list(COLORS.values())), np.float32)
    mixed = pixels.copy()
    mixed[top : top + side, left : left + side] = spot + rng.uniform(0.2, 0.8) * (colour - spot)
    return mixed
