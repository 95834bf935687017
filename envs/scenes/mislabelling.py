"""Pairs of text and picture that do not fit: one thing in the text is not as in the picture.

Pairs mined at scale are wrong now and then, and a policy that is fitted to them is wrong as often, whatever it knows.
Rewards can tell; so this is what reinforcement has to mend in the embedded world.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.scenes.edits import SIDES, Operation, operation_combination, split_operations
from envs.scenes.grammar import COUNT_WORDS, Metadata
from envs.scenes.world import COLORS, SHAPES, Scene, opposite, pick
from rewards.relations import RELATIONS

# Changes tried until one asks for nothing that is held out.
_ATTEMPTS = 8


def wrong_metadata(rng: np.random.Generator, metadata: Metadata) -> dict[str, Any]:
    """GenEval metadata with one class, colour, count or relation changed: what the picture shows."""
    wrong: dict[str, Any] = copy.deepcopy(dict(metadata))
    clause = pick(rng, wrong["include"])
    keys = ["class", *(key for key in ("color", "position") if key in clause)]
    key = pick(rng, keys if metadata["tag"] != "counting" else [*keys, "count"])
    if key == "position":
        clause["position"] = [opposite(clause["position"][0]), 0]
    else:
        values = {"class": SHAPES, "color": COLORS, "count": COUNT_WORDS}[key]
        # A second clause of the same class would make the two one.
        taken = [other.get(key) for other in (wrong["include"] if key == "class" else [clause])]
        clause[key] = pick(rng, [value for value in list(values) if value not in taken])
    return wrong


def wrong_operations(rng: np.random.Generator, operations: Sequence[Operation], scene: Scene) -> list[Operation]:
    """An instruction's operations with one object, colour, shape or place changed: what the text says.

    Nothing that is held out is asked for; where no such change was found the operations come back as they are.
    """
    named = {operation.get(key) for operation in operations for key in ("object", "anchor")}
    free = [index for index in range(len(scene)) if index not in named]
    for _ in range(_ATTEMPTS):
        wrong = [dict(operation) for operation in operations]
        changed = pick(rng, wrong)
        options: dict[str, list[Any]] = {
            "object": free,
            "color": list(COLORS),
            "shape": list(SHAPES),
            "where": list(RELATIONS if "anchor" in changed else SIDES),
        }
        key = pick(rng, [key for key in options if key in changed and (key != "object" or free)] or [""])
        if not key:
            continue
        changed[key] = pick(rng, [value for value in options[key] if value != changed[key]])
        if operation_combination(changed, scene) in split_operations(changed["op"])["train"]:
            return wrong
    return list(operations)
