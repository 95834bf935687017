"""Reading an edited picture: which detection is what, and how well it fits what it should be.

Each detection is assigned at most once: to an object that should have stayed, else to one that the instruction wants,
else it is loose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from envs.scenes.edit_goals import Edit, Spot, Wanted, center
from envs.scenes.edits import is_at
from envs.scenes.world import CANVAS, SceneObject
from rewards.geneval import Detection
from rewards.relations import RELATIONS, Box, relative_offset

# A detection above this is sure. Measured: shapes blurred by up to 1 pixel under noise of up to 12 levels have .69 or
# more but for one in a thousand; at 1.3 pixels and 16 levels a tenth have .34 or less.
CONFIDENT = 0.6
# Pixels between centres within which an object counts as in its place for strict success.
STRICT_OFFSET = 3.0
# Distances between centres, in pixels, at which an object's place earns nothing and everything.
NEAR_RAMP = (8.0, 2.0)
# Credit of an object of which only the shape, or only the colour, is right.
HALF_MATCH = 0.25
# The most that a right object earns where it does not stand as asked.
MISPLACED = 0.4


@dataclass(frozen=True)
class Reading:
    """Who is who in a picture.

    Attributes:
        kept: the detection of each of ``Edit.kept``, None where missing.
        wanted: the detection of each goal's wanted object, None where missing or nothing is wanted.
        anchors: the box of every kept object, as found, or as it was where it is missing.
        loose: detections that are neither.
    """

    kept: tuple[Detection | None, ...]
    wanted: tuple[Detection | None, ...]
    anchors: Mapping[int, Box]
    loose: tuple[Detection, ...]


def read_picture(edit: Edit, detections: Sequence[Detection]) -> Reading:
    """Assign the detections of a picture, by the largest total credit; what should stay comes first."""
    stay = [edit.scene[i] for i in edit.kept]
    kept, free = _assign(detections, [_kept_slot(o) for o in stay])
    boxes = [o.box if d is None else d.box for o, d in zip(stay, kept, strict=True)]
    anchors = dict(zip(edit.kept, boxes, strict=True))
    wanted, loose = _assign(free, [_wanted_slot(goal.wanted, anchors) for goal in edit.goals])
    return Reading(tuple(kept), tuple(wanted), anchors, tuple(loose))


def kept_credit(detection: Detection | None, source: SceneObject) -> float:
    """How far an object of the source is still there, in [0, 1]: class, colour, place, certainty."""
    if detection is None:
        return 0.0
    return _likeness(detection, source.color, source.shape) * near(detection, center(source.box))


def is_kept(detection: Detection | None, source: SceneObject) -> bool:
    """Whether an object of the source is surely there, within ``STRICT_OFFSET`` pixels."""
    if detection is None or not _is_exactly(detection, source.color, source.shape):
        return False
    return _distance(detection, center(source.box)) <= STRICT_OFFSET


def wanted_credit(detection: Detection | None, wanted: Wanted | None, anchors: Mapping[int, Box]) -> float:
    """Likeness times place, in [0, 1]: 1 where a sure object stands as asked, less with the distance from there."""
    if detection is None or wanted is None:
        return 0.0
    likeness = _likeness(detection, wanted.color, wanted.shape) * (1 - _staleness(detection, wanted))
    if wanted.spot is not None:
        return likeness * near(detection, wanted.spot)
    anchor = None if wanted.anchor is None else anchors[wanted.anchor]
    if is_at(detection.box, wanted.where, anchor):
        return likeness
    return likeness * MISPLACED * (1 - _shortfall(detection.box, wanted.where, anchor))


def is_fulfilled(detection: Detection | None, wanted: Wanted | None, anchors: Mapping[int, Box]) -> bool:
    """Whether a wanted object is surely there, where it should be."""
    if detection is None or wanted is None or not _is_exactly(detection, wanted.color, wanted.shape):
        return False
    if _staleness(detection, wanted) > 0:
        return False
    if wanted.spot is not None:
        return _distance(detection, wanted.spot) <= STRICT_OFFSET
    return is_at(detection.box, wanted.where, None if wanted.anchor is None else anchors[wanted.anchor])


def certainty(detection: Detection) -> float:
    """Confidence as a share of what is sure, at most 1."""
    return min(1.0, detection.confidence / CONFIDENT)


def near(detection: Detection, spot: Spot) -> float:
    """1 where a detection's centre is at a spot, falling to 0 along ``NEAR_RAMP``."""
    far, close = NEAR_RAMP
    return min(1.0, max(0.0, (_distance(detection, spot) - far) / (close - far)))


def _kept_slot(source: SceneObject) -> Callable[[Detection], float]:
    return lambda detection: kept_credit(detection, source)


def _wanted_slot(wanted: Wanted | None, anchors: Mapping[int, Box]) -> Callable[[Detection], float]:
    return lambda detection: wanted_credit(detection, wanted, anchors)


def _assign(
    detections: Sequence[Detection], slots: Sequence[Callable[[Detection], float]]
) -> tuple[list[Detection | None], list[Detection]]:
    """The detection of each slot, by the largest total credit, None where that is 0; and the detections left over."""
    taken: list[Detection | None] = [None] * len(slots)
    if not slots or not detections:
        return taken, list(detections)
    credits = np.array([[slot(detection) for detection in detections] for slot in slots])
    used = set()
    for row, column in zip(*linear_sum_assignment(credits, maximize=True), strict=True):
        if credits[row, column] > 0:
            taken[row] = detections[column]
            used.add(int(column))
    return taken, [detection for column, detection in enumerate(detections) if column not in used]


def _staleness(detection: Detection, wanted: Wanted) -> float:
    return max((near(detection, spot) for spot in wanted.stale), default=0.0)


def _shortfall(box: Box, where: str, anchor: Box | None) -> float:
    """How far a box is from standing as asked, in [0, 1]."""
    if anchor is not None:
        dx, dy = relative_offset(box, anchor)
        along = (-dx, dx, -dy, dy)[RELATIONS.index(where)]
        return min(1.0, max(0.0, (0.5 - along) / 1.5))
    x, y = center(box)
    depth = {"left": x, "right": CANVAS - x, "top": y, "bottom": CANVAS - y}[where]
    return min(1.0, max(0.0, (depth - CANVAS / 3) / (CANVAS * 2 / 3)))


def _likeness(detection: Detection, color: str, shape: str) -> float:
    right = (detection.color == color) + (detection.label == shape)
    return certainty(detection) * (0.0, HALF_MATCH, 1.0)[right]


def _is_exactly(detection: Detection, color: str, shape: str) -> bool:
    return detection.confidence > CONFIDENT and (detection.color, detection.label) == (color, shape)


def _distance(detection: Detection, spot: Spot) -> float:
    return math.dist(center(detection.box), spot)
