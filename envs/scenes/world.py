"""The embedded world: coloured shapes on a plain canvas, at continuous positions and sizes.

A scene is a tuple of :class:`SceneObject`. Pixels run right (x) and down (y), the origin is the top left corner,
and a shape's size is its *radius*: that of the disc of equal area, so that every shape of one radius covers as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from rewards.relations import Box, relative_position

T = TypeVar("T")

CANVAS = 48
BACKGROUND = (235, 235, 235)
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (45, 160, 70),
    "blue": (45, 85, 205),
    "yellow": (235, 195, 30),
    "purple": (140, 60, 170),
    "black": (30, 30, 30),
}
RADIUS_RANGE = (6.0, 8.0)
MARGIN = 1.0
GAP = 2.0
PLACE_ATTEMPTS = 40

# Half extents (left/right, up, down) of a shape of radius 1, about its centroid. The cross has arms of width 1/3.
_TRIANGLE_SIDE = math.sqrt(4 * math.pi / math.sqrt(3))
_CROSS_ARM = math.sqrt(math.pi * 9 / 5) / 2
HALF_EXTENTS: dict[str, tuple[float, float, float]] = {
    "circle": (1.0, 1.0, 1.0),
    "square": (math.sqrt(math.pi) / 2,) * 3,
    "diamond": (math.sqrt(math.pi / 2),) * 3,
    "triangle": (_TRIANGLE_SIDE / 2, _TRIANGLE_SIDE / math.sqrt(3), _TRIANGLE_SIDE / (2 * math.sqrt(3))),
    "cross": (_CROSS_ARM,) * 3,
}


@dataclass(frozen=True)
class SceneObject:
    """One shape: class, colour, centroid (x, y) and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> Box:
        """The bounding box (x0, y0, x1, y1) in pixels."""
        return box_of(self.shape, self.x, self.y, self.radius)

    @property
    def kind(self) -> tuple[str, str]:
        """(color, shape): what a prompt can name."""
        return self.color, self.shape


Scene = tuple[SceneObject, ...]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def box_of(shape: str, x: float, y: float, radius: float) -> Box:
    """Bounding box (x0, y0, x1, y1) of a shape whose centroid is (x, y)."""
    half_width, up, down = HALF_EXTENTS[shape]
    return x - half_width * radius, y - up * radius, x + half_width * radius, y + down * radius


def centroid_of(shape: str, box: Box) -> tuple[float, float]:
    """The opposite of :func:`box_of`: (x, y) of a shape with this box. A triangle's is below the middle of its box."""
    _, up, down = HALF_EXTENTS[shape]
    return (box[0] + box[2]) / 2, box[1] + (box[3] - box[1]) * up / (up + down)


def overlaps(box: Box, others: Sequence[Box], gap: float = GAP) -> bool:
    """Whether ``box``, grown by ``gap`` pixels, meets any of ``others``."""
    x0, y0, x1, y1 = box
    return any(x0 < o[2] + gap and o[0] < x1 + gap and y0 < o[3] + gap and o[1] < y1 + gap for o in others)


def relation_holds(box: Box, reference: Box, relation: str, threshold: float = 0.1) -> bool:
    """Whether ``box`` stands in ``relation`` to ``reference``: GenEval's rule, see ``rewards.relations``."""
    return relation in relative_position(box, reference, threshold)


def opposite(relation: str) -> str:
    """The relation of b to a, where a stands in ``relation`` to b."""
    return {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]


def place(
    rng: np.random.Generator, kind: tuple[str, str], taken: Sequence[Box], fixed_radius: float | None = None
) -> SceneObject | None:
    """Draw a free position and size for a (color, shape), or None where ``PLACE_ATTEMPTS`` draws found no room."""
    color, shape = kind
    for _ in range(PLACE_ATTEMPTS):
        radius = fixed_radius or float(rng.uniform(*RADIUS_RANGE))
        half_width, up, down = (extent * radius + MARGIN for extent in HALF_EXTENTS[shape])
        x = float(rng.uniform(half_width, CANVAS - half_width))
        y = float(rng.uniform(up, CANVAS - down))
        if not overlaps(box_of(shape, x, y, radius), taken):
            return SceneObject(shape, color, x, y, radius)
    return None


def place_all(rng: np.random.Generator, kinds: Sequence[tuple[str, str]]) -> Scene:
    """Place (color, shape) pairs without overlap; starts again where a draw leaves no room."""
    while True:
        placed: list[SceneObject] = []
        for kind in kinds:
            candidate = place(rng, kind, [other.box for other in placed])
            if candidate is None:
                break
            placed.append(candidate)
        if len(placed) == len(kinds):
            return tuple(placed)
