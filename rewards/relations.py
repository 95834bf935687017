"""Where one box stands to another: GenEval's rule for relative positions (arXiv:2310.11513)."""

from __future__ import annotations

import math

RELATIONS = ("left of", "right of", "above", "below")
Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels, y pointing down."""


def relative_offset(box_a: Box, box_b: Box, position_threshold: float = 0.1) -> tuple[float, float]:
    """How far, and in which direction, box A stands from box B.

    With centres c and sizes s per axis, the offset o = c_a - c_b is shrunk by ``position_threshold * (s_a + s_b)``
    towards 0 and divided by ||o||, the norm before shrinking.

    Args:
        box_a: the positioned object.
        box_b: the reference object.
        position_threshold: share of the summed sizes that counts as no displacement.

    Returns:
        (dx, dy), each in [-1, 1]; (0, 0) if the shrunk offset is under 1e-3 on both axes.
    """
    offset, shrunk = [], []
    for low, high in ((0, 2), (1, 3)):
        delta = (box_a[low] + box_a[high]) / 2 - (box_b[low] + box_b[high]) / 2
        margin = position_threshold * (abs(box_a[high] - box_a[low]) + abs(box_b[high] - box_b[low]))
        offset.append(delta)
        shrunk.append(math.copysign(max(abs(delta) - margin, 0.0), delta))
    if max(abs(shrunk[0]), abs(shrunk[1])) < 1e-3:
        return 0.0, 0.0
    distance = math.hypot(*offset)
    return shrunk[0] / distance, shrunk[1] / distance


def relative_position(box_a: Box, box_b: Box, position_threshold: float = 0.1) -> set[str]:
    """Names the relations in which box A stands to box B: "A is left of B".

    A component of :func:`relative_offset`, whose arguments these are, beyond 0.5 in magnitude is a relation; two hold
    at once for a diagonal offset. -> A subset of ``RELATIONS``.
    """
    dx, dy = relative_offset(box_a, box_b, position_threshold)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {relation for relation, true in zip(RELATIONS, holds, strict=True) if true}
