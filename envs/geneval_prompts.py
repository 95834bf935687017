"""Training prompts of GenEval's form, none of them in the benchmark's test set.

GenEval's templates (arXiv:2310.11513) over COCO's 80 classes and ten colours, mixed as in Flow-GRPO (arXiv:2505.05470):
position, counting, two coloured objects, one coloured object, two objects, one object as 7 : 5 : 3 : 1 : 1 : 0, 50,000
prompts in all. A combination that is in the test set is left out, in whichever order its objects are named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rewards.colors import COLORS
from rewards.geneval import TAGS, validate_metadata
from rewards.relations import RELATIONS

CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""COCO's classes under GenEval's names."""
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
RATIO = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}
"""Flow-GRPO's mixture."""
_OPPOSITE = {"left of": "right of", "above": "below"}
# A colour makes no sense of a person; GenEval leaves those out.
_COLORED = CLASSES[1:]

Row = dict[str, Any]


@dataclass(frozen=True)
class _Skill:
    """All prompts of one skill, numbered: ``make`` takes one index for each of ``sizes``; None is no prompt."""

    sizes: tuple[int, ...]
    make: Callable[..., Row | None]

    def __len__(self) -> int:
        return prod(self.sizes)

    def row(self, number: int) -> Row | None:
        """The prompt of a number from 0 on."""
        return self.make(*(int(index) for index in np.unravel_index(number, self.sizes)))


def training_prompts(
    count: int,
    seed: int,
    test_rows: Sequence[Mapping[str, Any]] = (),
    ratio: Mapping[str, int] = RATIO,
) -> list[Row]:
    """Draw ``count`` prompts with GenEval's metadata, shuffled; a function of the arguments alone.

    A skill's prompts are drawn without repeats where it has as many, and with repeats otherwise (counting has 240 in
    all), as Flow-GRPO does. Counts follow the ratio, the largest remainders rounded up.

    Args:
        count: of prompts.
        seed: of the draw.
        test_rows: metadata of prompts to keep out; two with the same objects, numbers, colours and relations are the
            same whatever order they stand in ("a left of b" is "b right of a").
        ratio: how many of each skill, relative to each other.

    Raises:
        ValueError: an unknown skill, a negative number, or a skill of which the test set has every prompt.
    """
    unknown = sorted(set(ratio) - set(TAGS))
    if unknown or min(ratio.values(), default=0) < 0 or sum(ratio.values()) == 0 or count < 1 or seed < 0:
        raise ValueError(
            f"training_prompts: expected count of 1 or more, seed of 0 or more, and shares of {', '.join(TAGS)} that "
            f"are not all 0, got {count}, {seed} and {dict(ratio)}"
        )
    excluded = {combination(row) for row in test_rows}
    rng = np.random.default_rng(seed)
    rows = []
    for tag, number in shares(count, ratio).items():
        rows += _draw(tag, number, excluded, rng)
    return [rows[index] for index in rng.permutation(len(rows))]


def shares(count: int, ratio: Mapping[str, int]) -> dict[str, int]:
    """``count`` split in a ratio; what rounding down leaves goes to the largest remainders, the first among equals."""
    total = sum(ratio.values())
    whole = {name: count * part // total for name, part in ratio.items()}
    by_remainder = sorted(ratio, key=lambda name: -(count * ratio[name] % total))
    for name in by_remainder[: count - sum(whole.values())]:
        whole[name] += 1
    return whole


def combination(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a prompt asks for, in one form for every order of its objects.

    Raises:
        ValueError: the metadata is not GenEval's.
    """
    validate_metadata(row)
    clauses = row["include"]
    placed = [clause for clause in clauses if "position" in clause]
    objects = sorted((clause["class"], clause["count"], clause.get("color", "")) for clause in clauses)
    relations = []
    for clause in placed:
        relation, index = clause["position"]
        first, second = clause["class"], clauses[index]["class"]
        if relation not in _OPPOSITE:
            relation = next(name for name, other in _OPPOSITE.items() if other == relation)
            first, second = second, first
        relations.append((first, relation, second))
    return (row["tag"], tuple(objects), tuple(sorted(relations)))


def _draw(tag: str, number: int, excluded: set[tuple[Any, ...]], rng: np.random.Generator) -> list[Row]:
    if number == 0:
        return []
    skill = _SKILLS[tag]
    # Not a prompt (an object beside itself), or of the test set: found where they are drawn, for a skill has 554,580.
    order = rng.permutation(len(skill))
    found: list[Row] = []
    for index in order:
        row = skill.row(int(index))
        if row is not None and combination(row) not in excluded:
            found.append(row)
        if len(found) == number:
            return found
    if not found:
        raise ValueError(f"training_prompts: expected {tag} prompts outside the test set, got none; set its share to 0")
    # Too few for so many: with replacement, as in Flow-GRPO.
    return [found[index] for index in rng.integers(len(found), size=number)]


def article(noun: str) -> str:
    """A noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(noun: str) -> str:
    # GenEval's own rule, by which two benches are "two benchs": training has the words that the test has.
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _row(tag: str, include: list[Row], words: str, exclude: list[Row] | None = None) -> Row:
    return {
        "tag": tag,
        "include": include,
        **({"exclude": exclude} if exclude else {}),
        "prompt": f"a photo of {words}",
    }


def _clause(name: str, count: int = 1, color: str = "") -> Row:
    return {"class": name, "count": count, **({"color": color} if color else {})}


def _single(a: int) -> Row:
    return _row("single_object", [_clause(CLASSES[a])], article(CLASSES[a]))


def _two(a: int, b: int) -> Row | None:
    if a == b:
        return None
    names = CLASSES[a], CLASSES[b]
    return _row("two_object", [_clause(name) for name in names], " and ".join(map(article, names)))


def _counting(a: int, extra: int) -> Row:
    name, count = CLASSES[a], 2 + extra
    words = f"{COUNT_WORDS[count]} {_plural(name)}"
    return _row("counting", [_clause(name, count)], words, [_clause(name, count + 1)])


def _colors(a: int, c: int) -> Row:
    name, color = _COLORED[a], COLORS[c]
    return _row("colors", [_clause(name, color=color)], f"{article(color)} {name}")


def _position(a: int, b: int, r: int) -> Row | None:
    if a == b:
        return None
    name, reference, relation = CLASSES[a], CLASSES[b], RELATIONS[r]
    include = [_clause(reference), {**_clause(name), "position": [relation, 0]}]
    return _row("position", include, f"{article(name)} {relation} {article(reference)}")


def _color_attr(a: int, b: int, c: int, d: int) -> Row | None:
    if a == b or c == d:
        return None
    kinds = [(_COLORED[a], COLORS[c]), (_COLORED[b], COLORS[d])]
    words = " and ".join(f"{article(color)} {name}" for name, color in kinds)
    return _row("color_attr", [_clause(name, color=color) for name, color in kinds], words)


_SKILLS = {
    "single_object": _Skill((len(CLASSES),), _single),
    "two_object": _Skill((len(CLASSES), len(CLASSES)), _two),
    "counting": _Skill((len(CLASSES), len(COUNT_WORDS)), _counting),
    "colors": _Skill((len(_COLORED), len(COLORS)), _colors),
    "position": _Skill((len(CLASSES), len(CLASSES), len(RELATIONS)), _position),
    "color_attr": _Skill((len(_COLORED), len(_COLORED), len(COLORS), len(COLORS)), _color_attr),
}


def load_rows(path: Path) -> list[Row]:
    """The rows of a file of GenEval's metadata, for instance its test set.

    Raises:
        ValueError: a line is not GenEval's; its number is named.
        OSError: the file cannot be read.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            validate_metadata(row)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected GenEval's metadata, got {line[:80]!r}: {error}"
            ) from error
        rows.append(row)
    return rows


def save_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as GenEval's ``evaluation_metadata.jsonl`` has them; ``envs.prompts.load_prompts`` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
