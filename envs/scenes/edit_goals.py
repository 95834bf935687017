"""Reading an edit's metadata (see ``envs.scenes.edits``) into goals, with every mistake in it named."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from envs.scenes.edits import OPERATIONS, SIDES
from envs.scenes.world import COLORS, SHAPES, Scene, SceneObject, box_of
from rewards.relations import RELATIONS, Box

Spot = tuple[float, float]


@dataclass(frozen=True)
class Wanted:
    """An object that an instruction asks for.

    Attributes:
        color: its colour.
        shape: its shape.
        spot: where its box's centre (x, y) should be, or None where ``where`` says it.
        where: a side or a relation; empty where ``spot`` says it.
        anchor: index of the object that a relation refers to.
        stale: where objects of this kind stood that other operations name. "Remove the red circle and add a red
            circle" is not fulfilled by the old one.
    """

    color: str
    shape: str
    spot: Spot | None = None
    where: str = ""
    anchor: int | None = None
    stale: tuple[Spot, ...] = ()


@dataclass(frozen=True)
class Goal:
    """What one operation asks: an object that should be there, and the index of one that should have left its place."""

    wanted: Wanted | None
    gone: int | None


@dataclass(frozen=True)
class Edit:
    """A source scene, one goal an operation, and the indices of the objects that no operation names."""

    scene: Scene
    goals: tuple[Goal, ...]
    kept: tuple[int, ...]


def center(box: Box) -> Spot:
    """Centre (x, y) of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def read_edit(metadata: Mapping[str, Any]) -> Edit:
    """Read the metadata of an edit.

    Args:
        metadata: ``ops``, one mapping or more, and ``scene``, as ``envs.scenes.edits`` writes them.

    Raises:
        ValueError: names the key, what was expected and what came.
    """
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata: expected a mapping, got {metadata!r}")
    scene = tuple(_object(f"scene[{i}]", entry) for i, entry in enumerate(_mappings(metadata, "scene")))
    operations = _mappings(metadata, "ops")
    if not operations:
        raise ValueError("ops: expected at least one operation, got none")
    goals = tuple(_goal(f"ops[{i}]", operation, scene) for i, operation in enumerate(operations))
    named = [operation["object"] for operation in operations if operation["op"] != "add"]
    if len(set(named)) < len(named):
        raise ValueError(f"ops: expected every operation to name another object, got the objects {named}")
    for i, goal in enumerate(goals):
        if goal.wanted is not None and goal.wanted.anchor in named:
            raise ValueError(f"ops[{i}].anchor: expected an object that no operation changes, got {goal.wanted.anchor}")
    goals = tuple(_with_stale(goal, [scene[i] for i in named]) for goal in goals)
    return Edit(scene, goals, tuple(i for i in range(len(scene)) if i not in named))


def _with_stale(goal: Goal, named: Sequence[SceneObject]) -> Goal:
    if goal.wanted is None or goal.gone is not None or goal.wanted.spot is not None:
        return goal
    spots = tuple(center(o.box) for o in named if o.kind == (goal.wanted.color, goal.wanted.shape))
    return replace(goal, wanted=replace(goal.wanted, stale=spots))


def _goal(path: str, operation: Mapping[str, Any], scene: Scene) -> Goal:
    name = _name(f"{path}.op", operation.get("op"), OPERATIONS)
    if name == "add":
        return Goal(_placed(path, operation, _color(path, operation), _shape(path, operation), scene), None)
    index = _index(f"{path}.object", operation.get("object"), scene)
    subject = scene[index]
    if name == "remove":
        return Goal(None, index)
    if name == "move":
        return Goal(_placed(path, operation, subject.color, subject.shape, scene), index)
    color = _color(path, operation)
    shape = subject.shape if name == "recolor" else _shape(path, operation)
    if (color, shape) == subject.kind:
        raise ValueError(f"{path}: expected a change, got {color} {shape} for an object that is one already")
    return Goal(Wanted(color, shape, center(box_of(shape, subject.x, subject.y, subject.radius))), None)


def _placed(path: str, operation: Mapping[str, Any], color: str, shape: str, scene: Scene) -> Wanted:
    where = _name(f"{path}.where", operation.get("where"), (*SIDES, *RELATIONS))
    if where in SIDES:
        return Wanted(color, shape, where=where)
    return Wanted(color, shape, where=where, anchor=_index(f"{path}.anchor", operation.get("anchor"), scene))


def _object(path: str, entry: Mapping[str, Any]) -> SceneObject:
    numbers = []
    for key in ("x", "y", "radius"):
        value = entry.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{path}.{key}: expected a finite number, got {value!r}")
        numbers.append(float(value))
    if numbers[2] <= 0:
        raise ValueError(f"{path}.radius: expected a number above 0, got {numbers[2]}")
    return SceneObject(_shape(path, entry), _color(path, entry), *numbers)


def _color(path: str, entry: Mapping[str, Any]) -> str:
    return _name(f"{path}.color", entry.get("color"), COLORS)


def _shape(path: str, entry: Mapping[str, Any]) -> str:
    return _name(f"{path}.shape", entry.get("shape"), SHAPES)


def _mappings(metadata: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    entries = metadata.get(key)
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"{key}: expected a list of mappings, got {entries!r}")
    return entries


def _index(path: str, value: Any, scene: Scene) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(scene):
        raise ValueError(f"{path}: expected an index of the scene's {len(scene)} objects, got {value!r}")
    return value


def _name(path: str, value: Any, names: Collection[str]) -> str:
    if isinstance(value, str) and value in names:
        return value
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{path}: expected one of {', '.join(map(repr, names))}, got {value!r}{hint}")
