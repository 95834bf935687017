"""Edit instructions over scenes: recolour, remove, add, move, replace, and two of them in one instruction.

The metadata of an edit is plain JSON: the source scene and the operations, by the index of the object they name. An
operation's *combination* is what it asks, without wording (shape and both colours of a recolouring; colour, shape
and place of an addition or a move; ...); every fifth is held out, a compound only of its split's operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from envs.scenes.grammar import Split, article, hold_out
from envs.scenes.world import (
    CANVAS,
    COLORS,
    HALF_EXTENTS,
    MARGIN,
    RADIUS_RANGE,
    SHAPES,
    Scene,
    SceneObject,
    overlaps,
    pick,
    place_all,
    relation_holds,
)
from rewards.relations import RELATIONS, Box

OPERATIONS = ("recolor", "remove", "add", "move", "replace")
EDIT_SKILLS = (*OPERATIONS, "compound")
SIDES = ("left", "right", "top", "bottom")
_COLORS = tuple(COLORS)
_WORDS = {
    "recolor": ("make {object} {color}", "turn {object} {color}", "change the color of {object} to {color}"),
    "remove": ("remove {object}", "delete {object}", "take away {object}"),
    "add": ("add {new} {where}", "put {new} {where}", "insert {new} {where}"),
    "move": ("move {object} {where}", "shift {object} {where}"),
    "replace": ("replace {object} with {new}", "swap {object} for {new}", "change {object} into {new}"),
}
_WHERE_WORDS = {
    "left": ("to the left side", "on the left edge"),
    "right": ("to the right side", "on the right edge"),
    "top": ("to the top", "at the top"),
    "bottom": ("to the bottom", "at the bottom"),
    "left of": ("to the left of {anchor}", "left of {anchor}"),
    "right of": ("to the right of {anchor}", "right of {anchor}"),
    "above": ("above {anchor}", "over {anchor}"),
    "below": ("below {anchor}", "under {anchor}"),
}
_JOINTS = (" and ", ", then ", " and then ")
# Places tried for an addition or a move before the whole edit is drawn again.
_PLACES = 64
DIFFICULTY = {"recolor": 0.2, "remove": 0.2, "replace": 0.4, "add": 0.5, "move": 0.7, "compound": 0.9}

Operation = dict[str, Any]


@dataclass(frozen=True)
class EditTask:
    """An instruction, the scene it starts from, one scene that fulfils it, JSON metadata, difficulty in [0, 1]."""

    text: str
    source: Scene
    target: Scene
    metadata: Mapping[str, Any]
    difficulty: float


def is_at(box: Box, where: str, anchor: Box | None) -> bool:
    """Whether a box lies where an instruction asks: in the outer third on a side, or in a relation to ``anchor``."""
    if anchor is not None:
        return relation_holds(box, anchor, where)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    third = CANVAS / 3
    return {"left": x < third, "right": x > CANVAS - third, "top": y < third, "bottom": y > CANVAS - third}[where]


@cache
def split_operations(operation: str) -> dict[Split, list[tuple[Any, ...]]]:
    """The combinations of an operation in each split."""
    kinds = list(product(_COLORS, SHAPES))
    places = (*SIDES, *RELATIONS)
    every: dict[str, list[tuple[Any, ...]]] = {
        "recolor": [(s, a, b) for s, a, b in product(SHAPES, _COLORS, _COLORS) if a != b],
        "remove": list(kinds),
        "add": [(*kind, where) for kind, where in product(kinds, places)],
        "move": [(*kind, where) for kind, where in product(kinds, places)],
        "replace": [(a, b) for a, b in product(kinds, kinds) if a != b],
    }
    return hold_out(every[operation], operation)


@cache
def _arguments(operation: str, split: Split) -> Mapping[Any, Sequence[tuple[Any, ...]]]:
    """What an operation of the split may ask of each subject (color, shape); of None where it adds an object.

    The tuples are (color,), (), (color, shape) for a replacement, (color, shape, where) for an addition, (where,).
    """
    found: dict[Any, list[tuple[Any, ...]]] = {}
    for chosen in split_operations(operation)[split]:
        if operation == "recolor":
            kind, arguments = (chosen[1], chosen[0]), (chosen[2],)
        elif operation == "add":
            kind, arguments = None, chosen
        elif operation == "replace":
            kind, arguments = chosen
        else:
            kind, arguments = chosen[:2], chosen[2:]
        found.setdefault(kind, []).append(arguments)
    return found


def operation_combination(operation: Operation, scene: Scene) -> tuple[Any, ...]:
    """The combination that an operation asks of a scene, in the form of :func:`split_operations`."""
    name = operation["op"]
    if name == "add":
        return (operation["color"], operation["shape"], operation["where"])
    subject = scene[operation["object"]]
    if name == "recolor":
        return (subject.shape, subject.color, operation["color"])
    if name == "remove":
        return subject.kind
    if name == "move":
        return (*subject.kind, operation["where"])
    return (subject.kind, (operation["color"], operation["shape"]))


def sample_edit(rng: np.random.Generator, split: Split = "train", skill: str | None = None) -> EditTask:
    """Draw an edit: a skill (uniform unless given), a scene of two to four objects, operations of the split."""
    skill = skill or EDIT_SKILLS[int(rng.integers(len(EDIT_SKILLS)))]
    while True:
        edit = _attempt(rng, split, skill)
        if edit is not None:
            return edit


def _attempt(rng: np.random.Generator, split: Split, skill: str) -> EditTask | None:
    names = [skill]
    if skill == "compound":
        names = [OPERATIONS[i] for i in rng.choice(len(OPERATIONS), 2, replace=False)]
    source = _source(rng, int(rng.integers(2, 5 - names.count("add"))))
    free = [int(i) for i in rng.permutation(len(source))]
    subjects: list[int | None] = []
    for name in names:
        subject = _take_subject(_arguments(name, split), source, free) if name != "add" else None
        if subject is None and name != "add":
            return None
        subjects.append(subject)
    operations: list[Operation] = []
    target: list[SceneObject | None] = list(source)
    for name, subject in zip(names, subjects, strict=True):
        asked = _arguments(name, split)[source[subject].kind if subject is not None else None]
        operation = _operation(rng, name, subject, asked, free)
        if operation is None or not _apply(rng, operation, target):
            return None
        operations.append(operation)
    return _edit_task(rng, skill, source, target, operations)


def _take_subject(asked: Mapping[Any, Sequence[tuple[Any, ...]]], source: Scene, free: list[int]) -> int | None:
    """Take the first free object that the split has something to ask of, or None."""
    for index in free:
        if source[index].kind in asked:
            free.remove(index)
            return index
    return None


def _source(rng: np.random.Generator, count: int) -> Scene:
    """A scene of objects that differ in colour or shape, so that each can be named."""
    picks = rng.choice(len(_COLORS) * len(SHAPES), count, replace=False)
    return place_all(rng, [(_COLORS[i // len(SHAPES)], SHAPES[i % len(SHAPES)]) for i in picks])


def _operation(
    rng: np.random.Generator, name: str, subject: int | None, asked: Sequence[tuple[Any, ...]], anchors: Sequence[int]
) -> Operation | None:
    """An operation with one of the arguments in ``asked``; half of the places are relations where there is an anchor.

    None where every place in ``asked`` is a relation and there is nothing to relate to.
    """
    operation: Operation = {"op": name}
    if subject is not None:
        operation["object"] = subject
    if name in ("add", "move"):
        wanted = RELATIONS if anchors and rng.random() < 0.5 else SIDES
        possible = [arguments for arguments in asked if anchors or arguments[-1] in SIDES]
        asked = [arguments for arguments in possible if arguments[-1] in wanted] or possible
        if not asked:
            return None
    arguments = asked[int(rng.integers(len(asked)))]
    if name in ("recolor", "replace", "add"):
        operation["color"] = arguments[0]
    if name in ("replace", "add"):
        operation["shape"] = arguments[1]
    if name in ("add", "move"):
        operation["where"] = arguments[-1]
        if arguments[-1] in RELATIONS:
            operation["anchor"] = anchors[0]
    return operation


def _apply(rng: np.random.Generator, operation: Operation, target: list[SceneObject | None]) -> bool:
    """Carry an operation out on ``target`` in place; False where it changes nothing or finds no room."""
    name = operation["op"]
    subject = None if name == "add" else target[operation["object"]]
    if name == "remove":
        target[operation["object"]] = None
        return True
    if name == "recolor":
        assert subject is not None
        target[operation["object"]] = replace(subject, color=operation["color"])
        return bool(subject.color != operation["color"])
    if name == "replace":
        assert subject is not None
        changed = replace(subject, color=operation["color"], shape=operation["shape"])
        target[operation["object"]] = changed
        return changed != subject and _fits(changed, [o for o in target if o is not None and o is not changed])
    moved = _placed(rng, operation, subject, target)
    if moved is None:
        return False
    if name == "add":
        target.append(moved)
    else:
        target[operation["object"]] = moved
    return True


def _fits(changed: SceneObject, others: Sequence[SceneObject]) -> bool:
    x0, y0, x1, y1 = changed.box
    inside = min(x0, y0) >= 0 and max(x1, y1) <= CANVAS
    return inside and not any(
        x0 < o.box[2] + 1 and o.box[0] < x1 + 1 and y0 < o.box[3] + 1 and o.box[1] < y1 + 1 for o in others
    )


def _placed(
    rng: np.random.Generator, operation: Operation, subject: SceneObject | None, target: Sequence[SceneObject | None]
) -> SceneObject | None:
    """A free place that the instruction allows and the source does not already fulfil."""
    anchor = target[operation["anchor"]] if "anchor" in operation else None
    anchor_box = anchor.box if anchor is not None else None
    if subject is not None and is_at(subject.box, operation["where"], anchor_box):
        return None
    kind = subject.kind if subject is not None else (operation["color"], operation["shape"])
    if subject is None and any(o is not None and o.kind == kind for o in target):
        return None
    taken = [o.box for o in target if o is not None and o is not subject]
    smallest, largest = RADIUS_RANGE
    for across, down, growth in rng.random((_PLACES, 3)).tolist():
        radius = subject.radius if subject is not None else smallest + growth * (largest - smallest)
        candidate = _at_share(kind, across, down, radius)
        box = candidate.box
        if is_at(box, operation["where"], anchor_box) and not overlaps(box, taken):
            return candidate
    return None


def _at_share(kind: tuple[str, str], across: float, down: float, radius: float) -> SceneObject:
    """An object at these shares, in [0, 1], of the room that its size leaves on the canvas."""
    half_width, above, below = (extent * radius + MARGIN for extent in HALF_EXTENTS[kind[1]])
    x = half_width + across * (CANVAS - 2 * half_width)
    y = above + down * (CANVAS - above - below)
    return SceneObject(kind[1], kind[0], x, y, radius)


def _edit_task(
    rng: np.random.Generator,
    skill: str,
    source: Scene,
    target: Sequence[SceneObject | None],
    operations: list[Operation],
) -> EditTask:
    text = instruction(rng, operations, source)
    metadata = {"tag": skill, "prompt": text, "ops": operations, "scene": [asdict(o) for o in source]}
    return EditTask(text, source, tuple(o for o in target if o is not None), metadata, DIFFICULTY[skill])


def instruction(rng: np.random.Generator, operations: Sequence[Operation], source: Scene) -> str:
    """Words for operations on a scene."""
    return pick(rng, _JOINTS).join(_words(rng, operation, source) for operation in operations)


def _words(rng: np.random.Generator, operation: Operation, source: Scene) -> str:
    """The instruction's wording; an object goes by its shape alone where that is enough, half of the time."""

    def name(index: int) -> str:
        subject = source[index]
        alone = sum(o.shape == subject.shape for o in source) == 1 and rng.random() < 0.5
        return f"the {subject.shape}" if alone else f"the {subject.color} {subject.shape}"

    where = operation.get("where", "")
    if where:
        anchor = name(operation["anchor"]) if "anchor" in operation else ""
        where = pick(rng, _WHERE_WORDS[where]).format(anchor=anchor)
    return pick(rng, _WORDS[operation["op"]]).format(
        object=name(operation["object"]) if "object" in operation else "",
        color=operation.get("color", ""),
        new=article(f"{operation['color']} {operation['shape']}") if "shape" in operation else "",
        where=where,
    )
