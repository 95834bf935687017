"""Judging an edit of a scene: did what was asked happen, and is everything else as it was?

Detections decide wherever they can (``envs.scenes.edit_reading``). Pixels decide only what no detector sees: paint
that is left where an object should have gone, and damage to the canvas elsewhere.

*Success* of an operation is its credit c, of which the untouched source already earns some (a blue circle at the place
of the red one to come is half right). That credit b is subtracted: max(0, (c - b) / (1 - b)). The operations of a
compound are joined by the mean of their minimum and their mean, so that one of two earns 1/4.

*Preservation* is (share of objects kept) * 2^-(extras) * exp(-``DAMAGE_RATE`` * damage outside the named regions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.scenes.edit_goals import Edit, Goal, center
from envs.scenes.edit_reading import (
    CONFIDENT,
    Reading,
    certainty,
    is_fulfilled,
    is_kept,
    kept_credit,
    near,
    read_picture,
    wanted_credit,
)
from envs.scenes.world import BACKGROUND
from rewards.geneval import Detection
from rewards.relations import Box

# What strict success needs: the least of an object that is gone, and the most damage elsewhere.
STRICT_GONE = 0.7
STRICT_DAMAGE = 0.02
# A pixel's mean absolute difference over channels, as a share of the range, below which it is noise and not damage.
DEAD_ZONE = 0.08
DAMAGE_RATE = 10.0
# Pixels by which boxes grow into regions: the anti-aliased or blurred edge.
REGION_MARGIN = 2.0
# A gain over the source below this is rounding.
_EPSILON = 1e-4

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
_PAPER: Image = np.array(BACKGROUND, np.uint8)


@dataclass(frozen=True)
class Source:
    """An edit with its source picture, uint8 [H, W, 3], and the credit of each operation that the picture has."""

    edit: Edit
    picture: Image
    baseline: tuple[float, ...]


@dataclass(frozen=True)
class Judgement:
    """Success and preservation of one image, in [0, 1], and whether everything is exactly as asked."""

    success: float
    preservation: float
    strict: bool


@dataclass(frozen=True)
class _Outcome:
    """Credit of one operation, in [0, 1], and whether it is done exactly."""

    credit: float
    done: bool


def with_baseline(edit: Edit, picture: Image, detections: Sequence[Detection]) -> Source:
    """Find what the untouched source earns: as its scene says or as the detector sees it, whichever is more.

    Args:
        edit: what is asked.
        picture: the source, uint8 [H, W, 3].
        detections: what the detector found in it.

    Raises:
        ValueError: if the source fulfils an operation already, so that there is nothing to gain.
    """
    ideal = [Detection(o.shape, o.box, o.color, 1.0) for o in edit.scene]
    blank = Source(edit, picture, ())
    credits = [
        [outcome.credit for outcome in _outcomes(blank, read_picture(edit, seen), picture)]
        for seen in (ideal, detections)
    ]
    baseline = tuple(map(max, *credits))
    if max(baseline) > 1 - _EPSILON:
        raise ValueError(f"ops[{baseline.index(max(baseline))}]: expected something to do, got what the source fulfils")
    return Source(edit, picture, baseline)


def judge(source: Source, image: Image, detections: Sequence[Detection]) -> Judgement:
    """Judge one image as an edit of a source.

    Args:
        source: from :func:`with_baseline`.
        image: uint8 [H, W, 3], of the source's size.
        detections: what the detector found in it.
    """
    reading = read_picture(source.edit, detections)
    outcomes = _outcomes(source, reading, image)
    damage = _damage(source, reading, image)
    stay = [source.edit.scene[i] for i in source.edit.kept]
    strict = (
        all(outcome.done for outcome in outcomes)
        and all(is_kept(d, o) for d, o in zip(reading.kept, stay, strict=True))
        and not any(d.confidence > CONFIDENT for d in reading.loose)
        and damage <= STRICT_DAMAGE
    )
    return Judgement(_success(source, outcomes), _preservation(source.edit, reading, damage), strict)


def _success(source: Source, outcomes: Sequence[_Outcome]) -> float:
    gains = [_gain(outcome.credit, base) for outcome, base in zip(outcomes, source.baseline, strict=True)]
    return (min(gains) + sum(gains) / len(gains)) / 2


def _gain(credit: float, baseline: float) -> float:
    if credit - baseline < _EPSILON:
        return 0.0
    return (credit - baseline) / (1 - baseline)


def _preservation(edit: Edit, reading: Reading, damage: float) -> float:
    kept = [kept_credit(d, edit.scene[i]) for i, d in zip(edit.kept, reading.kept, strict=True)]
    share = sum(kept) / len(kept) if kept else 1.0
    extras = sum(certainty(d) for d in reading.loose if not _is_leftover(edit, d))
    return share * float(0.5**extras) * math.exp(-DAMAGE_RATE * damage)


def _is_leftover(edit: Edit, detection: Detection) -> bool:
    """Whether a detection is a named object where it was: success judges it, so it is no extra."""
    named = (o for i, o in enumerate(edit.scene) if i not in edit.kept)
    return any((detection.color, detection.label) == o.kind and near(detection, center(o.box)) > 0 for o in named)


def _outcomes(source: Source, reading: Reading, image: Image) -> list[_Outcome]:
    pairs = list(zip(reading.wanted, source.edit.goals, strict=True))
    done = [is_fulfilled(d, goal.wanted, reading.anchors) for d, goal in pairs]
    rightful = [d for d, is_done in zip(reading.wanted, done, strict=True) if d is not None and is_done]
    rightful += [d for d in reading.kept if d is not None]
    lingering = [d for d in (*reading.wanted, *reading.loose) if d is not None and d not in rightful]
    covered = _region([d.box for d in rightful], image.shape)
    outcomes = []
    for (detection, goal), is_done in zip(pairs, done, strict=True):
        outcome = _Outcome(wanted_credit(detection, goal.wanted, reading.anchors), is_done)
        if goal.gone is not None:
            left = max(_presence(source, goal.gone, lingering), _residue(source, goal.gone, image, covered))
            outcome = _with_gone(goal, outcome, 1 - left)
        outcomes.append(outcome)
    return outcomes


def _with_gone(goal: Goal, outcome: _Outcome, gone: float) -> _Outcome:
    """A removal is what is gone; a move whose object also stays behind is worth half, so deleting alone is nothing."""
    if goal.wanted is None:
        return _Outcome(gone, gone >= STRICT_GONE)
    return _Outcome(outcome.credit * (1 + gone) / 2, outcome.done and gone >= STRICT_GONE)


def _presence(source: Source, index: int, detections: Sequence[Detection]) -> float:
    """How surely something still stands where an object was, in [0, 1]."""
    spot = center(source.edit.scene[index].box)
    return max((certainty(d) * near(d, spot) for d in detections), default=0.0)


def _residue(source: Source, index: int, image: Image, covered: Mask) -> float:
    """Share of an object's paint that is left in its old box, apart from what rightly stands there now."""
    x0, y0, x1, y1 = (max(0, round(side)) for side in source.edit.scene[index].box)
    inside = (slice(y0, y1), slice(x0, x1))
    before = float(_excess(source.picture[inside], _PAPER).sum())
    after = float(_excess(image[inside], _PAPER)[~covered[inside]].sum())
    return min(1.0, after / max(before, 1.0))


def _damage(source: Source, reading: Reading, image: Image) -> float:
    """Mean change beyond the dead zone, outside the boxes of named objects and of wanted objects found."""
    named = [o.box for i, o in enumerate(source.edit.scene) if i not in source.edit.kept]
    outside = ~_region(named + [d.box for d in reading.wanted if d is not None], image.shape)
    return float(_excess(image, source.picture)[outside].sum()) / max(int(outside.sum()), 1)


def _excess(image: Image, reference: Image) -> NDArray[np.float32]:
    """Absolute difference beyond the dead zone, mean over channels, share of the range: [..., 3] -> [...]."""
    difference = np.abs(image.astype(np.int16) - reference.astype(np.int16)).sum(axis=-1)
    excess: NDArray[np.float32] = np.maximum(difference / np.float32(3 * 255) - np.float32(DEAD_ZONE), 0)
    return excess


def _region(boxes: Sequence[Box], shape: tuple[int, ...]) -> Mask:
    """The pixels of boxes and their margin, bool [H, W]."""
    mask = np.zeros(shape[:2], bool)
    for x0, y0, x1, y1 in boxes:
        top, left = (max(0, math.floor(low - REGION_MARGIN)) for low in (y0, x0))
        bottom, right = (max(0, math.ceil(high + REGION_MARGIN)) for high in (y1, x1))
        mask[top:bottom, left:right] = True
    return mask
