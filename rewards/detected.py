"""GenEval as a reward from images alone: a detector, CLIP's colours and the rule, labelled where not comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Literal, get_args

import numpy as np

from rewards.base import Images, Prompt, Scores
from rewards.checkpoints import scorer_traits
from rewards.colors import ColorClassifier
from rewards.detectors import Finder, Found
from rewards.geneval import Detection, GenEvalRule, Metadata, validate_metadata
from rewards.names import nearest

Reading = Literal["dense", "strict", "official"]
NOT_COMPARABLE = "not_comparable"


class DetectedGenEval:
    """The GenEval rule over what a detector finds, in [0, 1] (below 0 only with ``published_quirks``).

    Components: ``dense``, ``strict`` and ``official``, see :class:`rewards.geneval.GenEvalRule`. With another detector
    than the benchmark's the reward's name and its components' end in ``not_comparable``, and the fingerprint says so
    too: such numbers belong in no table with published ones.

    Colours are asked for only where a prompt asks for one, as in the benchmark. Not available, with a reason: a prompt
    whose metadata is not GenEval's, a class that the detector does not know, a colour without a classifier.

    Args:
        finder: one of :mod:`rewards.detectors`, or another of that shape around any detector.
        colors: tells colours apart; None: prompts that ask for one are not available.
        rule: the thresholds; the benchmark's if omitted. They are made for its own detector.
        reading: which reading is the reward: "dense" to train on, "strict" or "official" to measure by.

    Raises:
        ValueError: an unknown reading, or a detector that drops what the rule would still count.
    """

    def __init__(
        self,
        finder: Finder,
        colors: ColorClassifier | None = None,
        rule: GenEvalRule | None = None,
        reading: Reading = "dense",
    ) -> None:
        self.rule = rule or GenEvalRule()
        if reading not in get_args(Reading):
            near = nearest(reading, get_args(Reading))
            raise ValueError(
                f"reading: expected one of {', '.join(get_args(Reading))}, got {reading!r}; the nearest is {near!r}"
            )
        if finder.settings.min_confidence > self.rule.threshold:
            raise ValueError(
                f"min_confidence: expected at most the rule's threshold, {self.rule.threshold}, "
                f"got {finder.settings.min_confidence}: the rule would miss what the detector has dropped"
            )
        self.finder, self.colors, self.reading = finder, colors, reading
        self.suffix = "" if finder.is_original else f"_{NOT_COMPARABLE}"
        self.__name__ = f"GenEval{self.suffix}"
        self.traits = scorer_traits(
            self.__name__,
            finder.settings,
            finder.settings.placement,
            comparable_with_published=finder.is_original,
            detector=type(finder).__name__,
            colors=colors.facts() if colors else None,
            rule=asdict(self.rule),
            reading=reading,
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] by the metadata of their prompts -> [B]."""
        known = self.finder.known()
        reasons = {row: reason for row, prompt in enumerate(prompts) if (reason := self._unscored(prompt, known))}
        rows = [row for row in range(len(images)) if row not in reasons]
        asked = [_classes(prompts[row].metadata) for row in rows]
        found = self.finder.find(images[rows], asked) if rows else []
        values = {name: np.full(len(images), np.nan, np.float32) for name in get_args(Reading)}
        for row, objects in zip(rows, found, strict=True):
            metadata = prompts[row].metadata
            detections = self._colored(images[row], objects, metadata)
            result = self.rule.dense(detections, metadata)
            values["dense"][row], values["strict"][row] = result.score, result.strict
            values["official"][row] = self.rule.official(detections, metadata)
        components = {f"{name}{self.suffix}": value for name, value in values.items()}
        return Scores(values[self.reading].copy(), components, reasons)

    def _unscored(self, prompt: Prompt, known: Sequence[str] | None) -> str:
        try:
            validate_metadata(prompt.metadata)
        except ValueError as error:
            return f"not GenEval's metadata: {error}"
        unknown = [name for name in _classes(prompt.metadata) if known is not None and name not in known]
        if unknown and known:
            return f"the detector knows no class {unknown[0]!r}; the nearest is {nearest(unknown[0], known)!r}"
        if self.colors is None and any("color" in clause for clause in prompt.metadata["include"]):
            return "the prompt asks for a colour, and there is no colour classifier; give one as colors"
        return ""

    def _colored(self, image: Images, objects: Sequence[Found], metadata: Metadata) -> list[Detection]:
        colored: Mapping[int, Detection] = {}
        for label in dict.fromkeys(clause["class"] for clause in metadata["include"] if "color" in clause):
            # The rule looks at no others: those of too little confidence, and those behind the most confident.
            rows = [i for i, found in enumerate(objects) if found.detection.label == label]
            rows = [i for i in rows if objects[i].detection.confidence > self.rule.threshold]
            rows = sorted(rows, key=lambda i: -objects[i].detection.confidence)[: self.rule.max_objects]
            boxes, masks = [objects[i].detection.box for i in rows], [objects[i].mask for i in rows]
            names = self.colors(image, boxes, masks, label) if self.colors else [None] * len(rows)
            pairs = zip(rows, names, strict=True)
            colored = {**colored, **{i: replace(objects[i].detection, color=name) for i, name in pairs}}
        return [colored.get(i, found.detection) for i, found in enumerate(objects)]


def _classes(metadata: Metadata) -> list[str]:
    clauses = [*metadata["include"], *metadata.get("exclude", ())]
    return list(dict.fromkeys(clause["class"] for clause in clauses))
