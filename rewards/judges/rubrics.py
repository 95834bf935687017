"""Judgements in words: a rubric of several dimensions that the model fills in as JSON.

VIEScore (arXiv:2312.14867) asks twice, for semantic consistency and for perceptual quality, takes the least of the
dimensions of each, and multiplies: overall = sqrt(SC * PQ), for every sample. ImgEdit (arXiv:2505.20275) takes the mean
of three. An answer that is not the JSON asked for, or out of range, is NaN: it is never repaired by a guess.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rewards.judges.readouts import NAN, Answer, Reading, Unreadable, content, message, shortened

Rule = Literal["min", "mean", "geometric_mean"]
_MAX_REASONING = 1200
"""Characters of reasoning that a schema allows: enough for a few sentences, not for a loop until max_tokens."""


@dataclass(frozen=True)
class Dimension:
    """One thing that is scored, from ``low`` to ``high``, both included; whole numbers are asked for."""

    name: str
    low: int
    high: int

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == "reasoning":
            raise ValueError(f"dimension: expected a name such as edit_success, got {self.name!r}")
        if self.low >= self.high:
            raise ValueError(f"dimension {self.name}: expected low < high, got {self.low}-{self.high}")


@dataclass(frozen=True)
class RubricReadout:
    """Several dimensions and the rule that makes one number of them.

    Attributes:
        dimensions: at least one; their names differ.
        rule: "min" (VIEScore), "mean" (ImgEdit) or "geometric_mean", of the dimensions scaled to [0, 1].

    Raises:
        ValueError: no dimension, two of one name, or an unknown rule.
    """

    dimensions: tuple[Dimension, ...]
    rule: Rule = "min"
    kind: str = "rubric"

    def __post_init__(self) -> None:
        names = [dimension.name for dimension in self.dimensions]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"dimensions: expected one or more different names, got {names}")
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {self.rule!r}")


def response_format(rubric: RubricReadout) -> dict[str, Any]:
    """The ``response_format`` of a request: a JSON schema with the reasoning first, so that scores can follow it."""
    scores = {d.name: {"type": "integer", "minimum": d.low, "maximum": d.high} for d in rubric.dimensions}
    properties = {"reasoning": {"type": "string", "maxLength": _MAX_REASONING}, **scores}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "rubric", "strict": True, "schema": schema}}


def read_rubric(answer: Answer, rubric: RubricReadout) -> Reading:
    """Read a filled-in rubric; its dimensions, unscaled, are the components."""
    try:
        scores = rubric_scores(content(answer), rubric)
    except Unreadable as unreadable:
        cut = isinstance(answer.get("choices"), list) and message(answer).get("finish_reason") == "length"
        return Reading(NAN, {}, f"{unreadable}{' (cut off at max_tokens)' if cut else ''}")
    scaled = [(scores[d.name] - d.low) / (d.high - d.low) for d in rubric.dimensions]
    return Reading(combined(scaled, rubric.rule), scores)


def rubric_scores(text: str, rubric: RubricReadout) -> dict[str, float]:
    """The score of each dimension in a text that holds a JSON object, in a fence or among words.

    Raises:
        Unreadable: no object with every dimension, several that disagree, or a score that is not in its range.
    """
    names = [dimension.name for dimension in rubric.dimensions]
    found = [entry for entry in _objects(text) if all(name in entry for name in names)]
    if not found:
        raise Unreadable(f"expected JSON with {', '.join(names)}, got {shortened(text)}")
    scores = {dimension.name: _in_range(found[0][dimension.name], dimension) for dimension in rubric.dimensions}
    if any([entry[name] for name in names] != [found[0][name] for name in names] for entry in found[1:]):
        raise Unreadable(f"expected one filled-in rubric, got several that disagree: {shortened(text)}")
    return scores


def combined(values: Sequence[float], rule: Rule) -> float:
    """One number of several in [0, 1]: their least, their mean, or (prod v)^(1/n). NaN if any is."""
    if any(math.isnan(value) for value in values):
        return NAN
    if rule == "min":
        return min(values)
    if rule == "mean":
        return math.fsum(values) / len(values)
    return float(math.prod(values) ** (1 / len(values)))


def viescore(consistency: float, quality: float) -> float:
    """Overall = sqrt(SC * PQ) of one sample, SC and PQ in [0, 1]; NaN if either is. VIEScore (arXiv:2312.14867)."""
    return combined((consistency, quality), "geometric_mean")


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    # Not strict: vLLM's grammar of a string lets bare tabs and other control characters through.
    decoder, start = json.JSONDecoder(strict=False), text.find("{")
    while start >= 0:
        try:
            entry, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            entry, end = None, start + 1
        if isinstance(entry, dict):
            yield entry
        start = text.find("{", end)


def _in_range(score: object, dimension: Dimension) -> float:
    # bool is an int to Python, and true is no score. NaN fails the comparison.
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if not is_number or not dimension.low <= score <= dimension.high:  # type: ignore[operator]
        raise Unreadable(f"{dimension.name}: expected {dimension.low} to {dimension.high}, got {shortened(str(score))}")
    return float(score)  # type: ignore[arg-type]
