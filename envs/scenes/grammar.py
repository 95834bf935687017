"""Text-to-image prompts over scenes: GenEval's six skills, varied wording, a split by combination.

A *combination* is what a prompt tests, without its wording: a shape, a (colour, shape), a (count, shape), a pair, a
(shape, relation, shape). Every fifth combination of each skill is held out: no training prompt of any skill contains
it, under any wording or order. A pair of shapes held out for two_object is in no relation and in no colour attribution
of the training split either, and a (colour, shape) held out for colors is in no prompt with more in it. A shape alone
is no combination: the one held out for single_object is never asked for by itself, but beside others or with a colour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any, Literal

import numpy as np

from envs.scenes.world import COLORS, SHAPES, Scene, opposite, pick, place_all, relation_holds

Split = Literal["train", "held_out"]
SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
HELD_OUT_SHARE = 0.2
_COLORS = tuple(COLORS)
_OPENINGS = ("", "", "a picture of ", "an image of ", "a drawing of ", "draw ", "show ", "there is ")
_JOINTS = ("{a} and {b}", "{a} with {b}", "{a} next to {b}", "{a} together with {b}")
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
# Difficulty in [0, 1] by skill, from the order in which the skills are learnt; counting grows with the count.
_DIFFICULTY = {
    "single_object": 0.1,
    "colors": 0.2,
    "two_object": 0.4,
    "counting": 0.4,
    "color_attr": 0.7,
    "position": 0.9,
}

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class SceneTask:
    """A text-to-image prompt with GenEval metadata and its difficulty in [0, 1]."""

    text: str
    metadata: Metadata
    difficulty: float


def article(noun: str) -> str:
    """``noun`` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _all_combinations(skill: str) -> list[tuple[Any, ...]]:
    if skill == "single_object":
        return [(shape,) for shape in SHAPES]
    if skill == "two_object":
        return list(combinations(SHAPES, 2))
    if skill == "counting":
        return list(product(COUNT_WORDS, (None, *_COLORS), SHAPES))
    if skill == "colors":
        return list(product(_COLORS, SHAPES))
    if skill == "position":
        pairs = [(a, b) for a, b in product(SHAPES, SHAPES) if a != b]
        return [(a, relation, b) for (a, b), relation in product(pairs, ("left of", "above"))]
    colors = [(c, d) for c, d in product(_COLORS, _COLORS) if c != d]
    return [((c, a), (d, b)) for (a, b), (c, d) in product(list(combinations(SHAPES, 2)), colors)]


def hold_out(values: Sequence[Any], salt: str) -> dict[Split, list[Any]]:
    """Split values by the order of their hashes: one in five, and at least one, is held out everywhere alike."""

    def order(value: Any) -> str:
        return hashlib.blake2b(f"{salt}/{value!r}".encode(), digest_size=8).hexdigest()

    ranked = sorted(values, key=order)
    held_out = max(1, round(HELD_OUT_SHARE * len(ranked)))
    return {"held_out": ranked[:held_out], "train": ranked[held_out:]}


@cache
def split_combinations(skill: str) -> dict[Split, list[tuple[Any, ...]]]:
    """The combinations of a skill in each split; those that only contain a held-out one are in neither."""
    split = hold_out(_all_combinations(skill), skill)
    return {**split, "train": [chosen for chosen in split["train"] if _is_trained(skill, chosen)]}


@cache
def _held_out() -> frozenset[tuple[str, tuple[Any, ...]]]:
    """Every (skill, combination) that no training prompt may contain."""
    skills = (skill for skill in SKILLS if skill != "single_object")
    return frozenset((s, chosen) for s in skills for chosen in hold_out(_all_combinations(s), s)["held_out"])


def _is_trained(skill: str, chosen: tuple[Any, ...]) -> bool:
    return _held_out().isdisjoint(contained(skill, chosen))


def contained(skill: str, chosen: tuple[Any, ...]) -> set[tuple[str, tuple[Any, ...]]]:
    """A combination and those of other skills that any prompt for it asks for too, as (skill, combination)."""
    found = {(skill, chosen)}
    if skill == "counting" and chosen[1] is not None:
        count, color, shape = chosen
        found |= {("counting", (count, None, shape)), ("colors", (color, shape))}
    elif skill == "position":
        found.add(("two_object", tuple(sorted((chosen[0], chosen[2]), key=SHAPES.index))))
    elif skill == "color_attr":
        found |= {("two_object", tuple(shape for _, shape in chosen)), *(("colors", kind) for kind in chosen)}
    return found


def combination(metadata: Metadata) -> tuple[Any, ...]:
    """The combination that a prompt tests, in the canonical form of :func:`split_combinations`."""
    tag, include = metadata["tag"], metadata["include"]
    first = include[0]
    if tag == "single_object":
        return (first["class"],)
    if tag == "counting":
        return (first["count"], first.get("color"), first["class"])
    if tag == "colors":
        return (first["color"], first["class"])
    if tag == "two_object":
        return tuple(sorted((clause["class"] for clause in include), key=SHAPES.index))
    if tag == "position":
        a, (relation, _), b = include[1]["class"], include[1]["position"], first["class"]
        return (a, relation, b) if relation in ("left of", "above") else (b, opposite(relation), a)
    return _kinds(*((clause["color"], clause["class"]) for clause in include))


def sample_task(rng: np.random.Generator, split: Split = "train", skill: str | None = None) -> SceneTask:
    """Draw a prompt: a skill (uniform unless given), a combination of the split, then the wording."""
    skill = skill or pick(rng, SKILLS)
    choices = split_combinations(skill)[split]
    include, phrase = _phrase(rng, skill, choices[int(rng.integers(len(choices)))], split)
    opening = pick(rng, _OPENINGS)
    text = (
        opening.replace("is", "are", 1) + phrase if skill == "counting" and opening == "there is " else opening + phrase
    )
    metadata: dict[str, Any] = {"tag": skill, "include": include}
    if skill == "counting":
        metadata["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    metadata["prompt"] = text
    return SceneTask(text, metadata, _difficulty(metadata))


def _phrase(
    rng: np.random.Generator, skill: str, chosen: tuple[Any, ...], split: Split
) -> tuple[list[dict[str, Any]], str]:
    if skill == "single_object":
        return [_clause(chosen[0])], article(chosen[0])
    if skill == "colors":
        return [_clause(chosen[1], color=chosen[0])], article(f"{chosen[0]} {chosen[1]}")
    if skill == "counting":
        count, color, shape = chosen
        noun = f"{color} {_plural(shape)}" if color else _plural(shape)
        return [_clause(shape, count, color)], f"{COUNT_WORDS[count]} {noun}"
    if skill == "position":
        return _relation_phrase(rng, chosen, split)
    kinds = [(None, shape) for shape in chosen] if skill == "two_object" else list(chosen)
    if rng.random() < 0.5:
        kinds.reverse()
    names = [article(f"{color} {shape}" if color else shape) for color, shape in kinds]
    joint = pick(rng, _JOINTS).format(a=names[0], b=names[1])
    return [_clause(shape, color=color) for color, shape in kinds], joint


def _relation_phrase(
    rng: np.random.Generator, chosen: tuple[str, str, str], split: Split
) -> tuple[list[dict[str, Any]], str]:
    """Words for "a relation b" or its converse; half of the prompts name both colours as well."""
    a, relation, b = chosen
    if rng.random() < 0.5:
        a, relation, b = b, opposite(relation), a
    colors: list[str | None] = [None, None]
    if rng.random() < 0.5:
        colors = [pick(rng, _COLORS), pick(rng, _COLORS)]
        while split == "train" and not _is_trained("color_attr", _kinds((colors[0], a), (colors[1], b))):
            colors = [pick(rng, _COLORS), pick(rng, _COLORS)]
    names = [article(f"{color} {shape}" if color else shape) for color, shape in zip(colors, (a, b), strict=True)]
    include = [_clause(b, color=colors[1]), {**_clause(a, color=colors[0]), "position": [relation, 0]}]
    return include, f"{names[0]} {pick(rng, _RELATION_WORDS[relation])} {names[1]}"


def _kinds(*kinds: tuple[str | None, str]) -> tuple[tuple[str | None, str], ...]:
    """(colour, shape) pairs in the canonical order."""
    return tuple(sorted(kinds, key=lambda kind: SHAPES.index(kind[1])))


def _clause(shape: str, count: int = 1, color: str | None = None) -> dict[str, Any]:
    return {"class": shape, "count": count, **({"color": color} if color else {})}


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _difficulty(metadata: Metadata) -> float:
    if metadata["tag"] == "counting":
        return _DIFFICULTY["counting"] + 0.2 * (int(metadata["include"][0]["count"]) - 2)
    return _DIFFICULTY[str(metadata["tag"])]


def scene_for(rng: np.random.Generator, metadata: Metadata) -> Scene:
    """Draw a scene that a prompt describes exactly: what is named, where it is named, and nothing else."""
    kinds = [
        (clause.get("color") or pick(rng, _COLORS), clause["class"])
        for clause in metadata["include"]
        for _ in range(clause["count"])
    ]
    while True:
        scene = place_all(rng, kinds)
        if metadata["tag"] != "position":
            return scene
        relation = metadata["include"][1]["position"][0]
        if relation_holds(scene[1].box, scene[0].box, relation):
            return scene
