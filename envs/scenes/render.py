"""A vectorised, anti-aliased renderer: scenes to uint8 images, by signed distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from envs.scenes.world import BACKGROUND, CANVAS, COLORS, HALF_EXTENTS, SHAPES, Scene

Float = NDArray[np.float32]


def _circle(x: Float, y: Float) -> Float:
    distance: Float = np.hypot(x, y) - np.float32(1)
    return distance


def _square(x: Float, y: Float) -> Float:
    distance: Float = np.maximum(abs(x), abs(y)) - np.float32(HALF_EXTENTS["square"][0])
    return distance


def _diamond(x: Float, y: Float) -> Float:
    distance: Float = (abs(x) + abs(y) - np.float32(HALF_EXTENTS["diamond"][0])) / np.float32(math.sqrt(2))
    return distance


def _triangle(x: Float, y: Float) -> Float:
    """Equilateral, one side below; the centroid is the in-centre, so three half planes at the in-radius bound it."""
    in_radius = np.float32(HALF_EXTENTS["triangle"][2])
    slope = abs(x) * np.float32(math.sqrt(3) / 2) - y / 2
    distance: Float = np.maximum(slope, y) - in_radius
    return distance


def _cross(x: Float, y: Float) -> Float:
    arm = np.float32(HALF_EXTENTS["cross"][0])
    x, y = abs(x), abs(y)
    upright = np.maximum(x - arm / 3, y - arm)
    level = np.maximum(x - arm, y - arm / 3)
    distance: Float = np.minimum(upright, level)
    return distance


_DISTANCE: dict[str, Callable[[Float, Float], Float]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
}


def coverage(shape: str, centers: Float, radii: Float, grid_x: Float, grid_y: Float) -> Float:
    """Share of each pixel that a shape covers, by its signed distance at the pixel's centre.

    Args:
        shape: one of ``SHAPES``.
        centers: centroids (x, y) in pixels, [N, 2].
        radii: radii in pixels, [N].
        grid_x: x of the pixels' centres, broadcastable to [N, H, W].
        grid_y: y of the pixels' centres, likewise.

    Returns:
        Coverage in [0, 1], float32 [N, H, W].
    """
    radius = radii[:, None, None]
    x = (grid_x - centers[:, 0, None, None]) / radius
    y = (grid_y - centers[:, 1, None, None]) / radius
    inside: Float = 0.5 - _DISTANCE[shape](x, y) * radius
    return np.clip(inside, np.float32(0), np.float32(1))


def render(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Draw scenes on the plain background: [B, CANVAS, CANVAS, 3] uint8. Later objects lie on top."""
    images = np.broadcast_to(np.array(BACKGROUND, np.float32), (len(scenes), CANVAS, CANVAS, 3)).copy()
    axis = np.arange(CANVAS, dtype=np.float32) + np.float32(0.5)
    for layer in range(max(map(len, scenes), default=0)):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes) if len(s) > layer and s[layer].shape == shape]
            if not rows:
                continue
            objects = [scenes[i][layer] for i in rows]
            centers = np.array([(o.x, o.y) for o in objects], np.float32)
            radii = np.array([o.radius for o in objects], np.float32)
            alpha = coverage(shape, centers, radii, axis[None, None, :], axis[None, :, None])[..., None]
            color = np.array([COLORS[o.color] for o in objects], np.float32)[:, None, None, :]
            images[rows] += alpha * (color - images[rows])
    return np.rint(images).astype(np.uint8)
