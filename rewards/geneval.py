"""The GenEval rule over detections: is what the prompt asks for in the image?

Two readings of the same metadata, both pure functions of the boxes that some detector found:

- *official*: the benchmark's evaluation (Ghosh et al., GenEval, arXiv:2310.11513): at least the requested count,
  judged on the most confident boxes, right or wrong.
- *dense*: the training reward of Flow-GRPO (Liu et al., arXiv:2505.05470): exact counts with partial credit, and
  beside it *strict*, true when every equality holds.

Metadata is a line of GenEval's ``evaluation_metadata.jsonl``::

    {"tag": "position", "include": [{"class": "sink", "count": 1},
                                    {"class": "tie", "count": 1, "position": ["above", 0]}]}

``position`` names a relation and the index of an earlier clause, the reference: here the tie is above the sink.
A clause may carry ``color`` and ``position`` together.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rewards.names import hint
from rewards.relations import RELATIONS, Box, relative_position

logger = logging.getLogger(__name__)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CLAUSE_KEYS = ("class", "count", "color", "position")

Metadata: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Detection:
    """One object that a detector found.

    Attributes:
        label: class name, compared literally with the metadata's ``class``.
        box: (x0, y0, x1, y1) in pixels, y pointing down.
        color: colour name as the detector's classifier decided it; None if unknown, which matches no request.
        confidence: the detector's score in [0, 1].
    """

    label: str
    box: Box
    color: str | None
    confidence: float


Detections: TypeAlias = Sequence[Detection]
"""Everything found in one image, in any order."""


class HasMetadata(Protocol):
    """What the rewards below need of a prompt."""

    @property
    def metadata(self) -> Metadata:
        """GenEval metadata of the prompt."""


Detector: TypeAlias = Callable[[NDArray[np.uint8]], Sequence[Detections]]
"""Images uint8 [B,H,W,3] to the detections of each image, in order."""

GenEvalReward: TypeAlias = Callable[[NDArray[np.uint8], Sequence[HasMetadata]], NDArray[np.float32]]
"""Images uint8 [B,H,W,3] and B prompts to float32 [B]; NaN marks a masked sample."""


@dataclass(frozen=True)
class GenEvalResult:
    """Outcome of the dense rule for one image.

    Attributes:
        score: mean of the clause terms, in [0, 1] (below 0 only with ``published_quirks``).
        strict: whether every count, colour and position is exactly as requested.
        reasons: what is wrong, one sentence per violated clause; empty if and only if ``strict``.
    """

    score: float
    strict: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class GenEvalRule:
    """The thresholds of GenEval and its two readings. The defaults are the benchmark's.

    Attributes:
        threshold: a detection counts if its confidence is strictly above this.
        counting_threshold: the same for every class of an image whose tag is "counting".
        max_objects: how many detections of one class are kept, the most confident first.
        position_threshold: see ``relative_position``.
        published_quirks: reproduce Flow-GRPO's published reward to the letter, for comparison with its numbers. Its
            count term is not clamped (3 objects for 1 give -1); a wrong position adds the terms 0 *and* 1, so half a
            point; a clause with colour and position that fails before the position is reached loses that term
            instead of scoring 0 for it; and ``strict`` ignores ``exclude``.

    Raises:
        ValueError: a threshold outside its range.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1
    published_quirks: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name in ("threshold", "counting_threshold", "position_threshold"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
        if not _is_count(self.max_objects):
            raise ValueError(f"max_objects: expected an integer of at least 1, got {self.max_objects!r}")

    def official(self, detections: Detections, metadata: Metadata) -> bool:
        """Whether the image is correct under the benchmark's evaluation; see ``official_reasons``."""
        return not self.official_reasons(detections, metadata)

    def official_reasons(self, detections: Detections, metadata: Metadata) -> tuple[str, ...]:
        """Says what is wrong with an image under the benchmark's evaluation.

        A clause holds if at least ``count`` boxes of its class exist and, of the ``count`` most confident, all have
        the requested colour and all stand in the requested relation to all boxes of the reference clause, which must
        hold itself. An ``exclude`` clause fails at ``count`` boxes or more.

        Returns:
            One sentence per violated clause; empty if and only if the image is correct.

        Raises:
            ValueError: invalid metadata, see ``validate_metadata``.
        """
        validate_metadata(metadata)
        objects = self._objects(detections, metadata["tag"])
        reasons: list[str] = []
        groups: list[Detections | None] = []
        for clause in metadata["include"]:
            found = objects.get(clause["class"], [])[: clause["count"]]
            reason = self._official_clause(clause, found, groups)
            groups.append(None if reason else found)
            reasons.append(reason)
        return tuple(filter(None, [*reasons, *_exclude_reasons(objects, metadata)]))

    def dense(self, detections: Detections, metadata: Metadata) -> GenEvalResult:
        """Scores an image with partial credit, as Flow-GRPO does in training (arXiv:2505.05470).

        The score is the mean of one term per request of every ``include`` clause, over *all* boxes of its class:

        - count: ``max(0, 1 - |count - n_found| / count)``, with n_found counted over every colour of the class;
        - colour: ``1 - |count - n_of_that_color| / count`` if n_found = count, else 0;
        - position: 1 if count and colour hold, the reference clause holds, and every pair of boxes stands in the
          relation, else 0.

        ``exclude`` enters ``strict`` only: for GenEval's own prompts the exact count implies it. So ``strict``
        implies ``official``.

        Raises:
            ValueError: invalid metadata, see ``validate_metadata``.
        """
        validate_metadata(metadata)
        objects = self._objects(detections, metadata["tag"])
        terms: list[float] = []
        reasons: list[str] = []
        groups: list[Detections | None] = []
        for clause in metadata["include"]:
            found = objects.get(clause["class"], [])
            clause_terms, reason = self._dense_clause(clause, found, groups)
            groups.append(None if reason else found)
            terms += clause_terms
            reasons.append(reason)
        if not self.published_quirks:
            reasons += _exclude_reasons(objects, metadata)
        wrong = tuple(filter(None, reasons))
        return GenEvalResult(sum(terms) / len(terms), not wrong, wrong)

    def _objects(self, detections: Detections, tag: str) -> dict[str, list[Detection]]:
        threshold = self.counting_threshold if tag == "counting" else self.threshold
        objects: dict[str, list[Detection]] = {}
        for detection in sorted(detections, key=lambda found: -found.confidence):
            kept = objects.setdefault(detection.label, [])
            if detection.confidence > threshold and len(kept) < self.max_objects:
                kept.append(detection)
        return objects

    def _official_clause(self, clause: Metadata, found: Detections, groups: Sequence[Detections | None]) -> str:
        if len(found) < clause["count"]:
            return f"expected {clause['class']} >= {clause['count']}, found {len(found)}"
        return _color_reason(clause, found) or self._position_reason(clause, found, groups)

    def _dense_clause(
        self, clause: Metadata, found: Detections, groups: Sequence[Detections | None]
    ) -> tuple[list[float], str]:
        count = clause["count"]
        closeness = 1 - abs(count - len(found)) / count
        terms = [closeness if self.published_quirks else max(0.0, closeness)]
        if len(found) != count:
            unreached = ("color" in clause) + ("position" in clause)
            terms += [0.0] * (min(unreached, 1) if self.published_quirks else unreached)
            return terms, f"expected {clause['class']} = {count}, found {len(found)}"
        if "color" in clause:
            terms.append(sum(detection.color == clause["color"] for detection in found) / count)
        if "position" not in clause:
            return terms, _color_reason(clause, found)
        if reason := _color_reason(clause, found):
            return terms + ([] if self.published_quirks else [0.0]), reason
        reason = self._position_reason(clause, found, groups)
        has_reference = groups[clause["position"][1]] is not None
        if reason and has_reference and self.published_quirks:
            return [*terms, 0.0, 1.0], reason
        return [*terms, 0.0 if reason else 1.0], reason

    def _position_reason(self, clause: Metadata, found: Detections, groups: Sequence[Detections | None]) -> str:
        if "position" not in clause:
            return ""
        relation, index = clause["position"]
        targets = groups[index]
        if targets is None:
            return f"no reference for {clause['class']} to be {relation}: include[{index}] does not hold"
        for target in targets:
            for detection in found:
                if relation not in relative_position(detection.box, target.box, self.position_threshold):
                    return f"expected {clause['class']} {relation} {target.label}, and it is not"
        return ""


def _color_reason(clause: Metadata, found: Detections) -> str:
    colors = [detection.color for detection in found]
    if "color" not in clause or all(color == clause["color"] for color in colors):
        return ""
    seen = ", ".join(sorted(str(color) for color in colors))
    return f"expected every {clause['class']} {clause['color']}, found {seen}"


def _exclude_reasons(objects: Mapping[str, Detections], metadata: Metadata) -> list[str]:
    found = [(clause, len(objects.get(clause["class"], []))) for clause in metadata.get("exclude", [])]
    return [
        f"expected {clause['class']} < {clause['count']}, found {number}"
        for clause, number in found
        if number >= clause["count"]
    ]


def validate_metadata(metadata: Metadata) -> None:
    """Checks that metadata is GenEval's and can be satisfied.

    Requires ``tag`` (one of ``TAGS``: it chooses the threshold) and ``include`` (one clause or more); ``exclude`` is
    optional and further keys, such as ``prompt``, are free. Clauses hold ``CLAUSE_KEYS`` and nothing else, so that a
    misspelt ``color`` is not silently ignored. Each class has one ``include`` clause: every clause sees all boxes of
    its class, so a red and a blue circle can only be asked for by different classes.

    Raises:
        ValueError: names the key, what was expected, what came and the nearest valid name.
    """
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata: expected a mapping, got {metadata!r}")
    _expect_name("tag", metadata.get("tag"), TAGS)
    clauses = _clauses(metadata, "include")
    if not clauses:
        raise ValueError(f"include: expected at least one clause, got none among the keys {list(metadata)}")
    for index, clause in enumerate(clauses):
        _validate_clause(f"include[{index}]", clause, CLAUSE_KEYS)
        if "position" in clause:
            _validate_position(f"include[{index}].position", clause["position"], index)
        if clause["class"] in [earlier["class"] for earlier in clauses[:index]]:
            raise ValueError(
                f"include[{index}].class: expected a class that no earlier clause has, got {clause['class']!r}; "
                "both clauses would count the same boxes, so merge them into one"
            )
    for index, clause in enumerate(_clauses(metadata, "exclude")):
        _validate_clause(f"exclude[{index}]", clause, ("class", "count"))


def _clauses(metadata: Metadata, key: str) -> Sequence[Any]:
    clauses = metadata.get(key, ())
    if not isinstance(clauses, (list, tuple)):
        raise ValueError(f"{key}: expected a list of clauses, got {clauses!r}")
    return clauses


def _validate_clause(where: str, clause: Any, keys: Sequence[str]) -> None:
    if not isinstance(clause, Mapping):
        raise ValueError(f"{where}: expected a mapping with the keys 'class' and 'count', got {clause!r}")
    for key in clause:
        _expect_name(f"{where}, key", key, keys)
    for key in sorted({"class", "color"} & {"class", *clause}):
        if not isinstance(clause.get(key), str) or not clause[key]:
            raise ValueError(f"{where}.{key}: expected a non-empty string, got {clause.get(key)!r}")
    if not _is_count(clause.get("count")):
        raise ValueError(f"{where}.count: expected an integer of at least 1, got {clause.get('count')!r}")


def _validate_position(where: str, position: Any, index: int) -> None:
    if not isinstance(position, (list, tuple)) or len(position) != 2:
        raise ValueError(f"{where}: expected [relation, index of an earlier clause], got {position!r}")
    relation, target = position
    _expect_name(f"{where}[0]", relation, RELATIONS)
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < index:
        allowed = f"from 0 to {index - 1}" if index else "of an earlier clause, and the first clause has none"
        raise ValueError(f"{where}[1]: expected an index {allowed}, got {target!r}; put the reference object first")


def _expect_name(where: str, value: Any, names: Collection[str]) -> None:
    if isinstance(value, str) and value in names:
        return
    near = hint(str(value), names)
    raise ValueError(f"{where}: expected one of {', '.join(map(repr, names))}, got {value!r}{near}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def geneval_reward(detector: Detector, rule: GenEvalRule | None = None) -> GenEvalReward:
    """Makes the dense GenEval reward (``GenEvalRule.dense``) from a detector.

    Args:
        detector: uint8 [B,H,W,3] to the detections of each image.
        rule: thresholds; the benchmark's if omitted.

    Returns:
        A reward ``(images, prompts) -> float32 [B]`` that reads ``prompt.metadata``. A prompt with invalid metadata
        gives NaN (masked, and logged) and its image is not shown to the detector.

    Raises:
        ValueError: when called, if images, prompts and detections do not match in type or number.
    """
    return _reward(detector, rule or GenEvalRule(), lambda result: result.score)


def geneval_strict(detector: Detector, rule: GenEvalRule | None = None) -> GenEvalReward:
    """Makes the strict GenEval reward, 1.0 or 0.0 (``GenEvalResult.strict``); see ``geneval_reward``."""
    return _reward(detector, rule or GenEvalRule(), lambda result: float(result.strict))


def _reward(detector: Detector, rule: GenEvalRule, read: Callable[[GenEvalResult], float]) -> GenEvalReward:
    def reward(images: NDArray[np.uint8], prompts: Sequence[HasMetadata]) -> NDArray[np.float32]:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected uint8 [B,H,W,3], got {images.dtype} {list(images.shape)}")
        if len(images) != len(prompts):
            raise ValueError(f"prompts: expected one for each of {len(images)} images, got {len(prompts)}")
        scores = np.full(len(images), np.nan, dtype=np.float32)
        rows = _valid_rows(prompts)
        detections = detector(images[rows]) if rows else []
        if len(detections) != len(rows):
            raise ValueError(f"detector: expected detections for {len(rows)} images, got {len(detections)}")
        for row, found in zip(rows, detections, strict=True):
            scores[row] = read(rule.dense(found, prompts[row].metadata))
        return scores

    return reward


def _valid_rows(prompts: Sequence[HasMetadata]) -> list[int]:
    rows, errors = [], []
    for row, prompt in enumerate(prompts):
        try:
            validate_metadata(prompt.metadata)
            rows.append(row)
        except ValueError as error:
            errors.append(f"prompt {row}: {error}")
    if errors:
        logger.warning("GenEval: %d of %d samples masked; first %s", len(errors), len(prompts), errors[0])
    return rows
