"""Exact detector of the embedded world: analysis by synthesis, vectorised over the batch.

A pixel of an anti-aliased shape is p = background + alpha (colour - background). Projecting on the line of each colour
gives its alpha and a residual, connected components of the best explained colour give blobs, and a blob's mass and
centroid fix one candidate per shape, because every shape of one radius covers as much. The candidate whose template
meets the blob best names it. Confidence falls with whatever the best template leaves unexplained, so that a half
formed, smeared, merged or wrongly coloured blob earns little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from envs.scenes.render import coverage
from envs.scenes.world import BACKGROUND, COLORS, RADIUS_RANGE, SHAPES, box_of
from rewards.geneval import Detection

Float = NDArray[np.float32]
Int = NDArray[np.int64]

# Images handled at once: the working set of a block stays near the cache.
_BLOCK = 64
# Side of the square crop a blob is compared in: the tallest shape of the largest radius, its fringe and some slack.
_CROP = 32
# Blobs of fewer pixels are specks: a shape of radius 2 has 12.
_MIN_PIXELS = 12
_FOREGROUND = 0.5
# Squared residuals, in levels, up to which a pixel counts in full, and from which it belongs to another colour.
_RESIDUAL_RAMP = (60.0**2, 30.0**2)
# Pixels around a blob in which its anti-aliased or blurred edge is gathered.
_FRINGE = 2
_NAMES = tuple(COLORS)
_ORIGIN: Float = np.array(BACKGROUND, np.float32)
_DIRECTIONS: Float = np.array([COLORS[name] for name in _NAMES], np.float32) - _ORIGIN
_SQUARED: Float = (_DIRECTIONS**2).sum(axis=1)
# Neighbours by edge inside a plane, none across planes.
_STRUCTURE = np.zeros((3, 3, 3), bool)
_STRUCTURE[1] = ndimage.generate_binary_structure(2, 1)

# (value of confidence 0, value of confidence 1) of each measured quality, see _confidence.
_OVERLAP_RAMP = (0.6, 0.88)
_SOLIDITY_RAMP = (0.63, 0.77)
_MARGIN_RAMP = (-0.05, 0.05)
_COLOR_RAMP = (50.0, 14.0)
_SMALL_RAMP = (RADIUS_RANGE[0] - 2.0, RADIUS_RANGE[0] - 0.5)
_LARGE_RAMP = (RADIUS_RANGE[1] + 2.0, RADIUS_RANGE[1] + 0.5)


@dataclass(frozen=True)
class _Planes:
    """A block of images unmixed: one plane per colour and image, colour-major."""

    delta: Float  # [3, B*H*W], pixel minus background
    alpha: Float  # [C*B, H, W]
    residual: Float  # [C*B, H, W], squared
    labels: NDArray[np.int32]  # [C*B, H, W], 0 where no blob


@dataclass(frozen=True)
class _Blobs:
    """K blobs, cropped: pixels that are another blob's, or off the canvas, hold alpha 0."""

    label: Int  # [K], in _Planes.labels
    plane: Int  # [K]
    color: Int  # [K]
    grid_x: Float  # [K, 1, S]
    grid_y: Float  # [K, S, 1]
    alpha: Float  # [K, S, S]
    outside: Float  # [K], pixels beyond the crop


def detect(images: NDArray[np.uint8]) -> list[list[Detection]]:
    """Find the shapes of the embedded world in images.

    Args:
        images: RGB, uint8 [B, H, W, 3], of any H and W; sizes are in pixels, as in ``RADIUS_RANGE``.

    Returns:
        For each image its detections, by falling confidence. ``label`` is the shape and ``box`` its bounding box
        (x0, y0, x1, y1) in pixels. A confidence is above 0.9 for a clean render and near 0 for a damaged one.

    Raises:
        ValueError: if ``images`` is not uint8 [B, H, W, 3].
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        got = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"images: expected a uint8 array, got {got}; scale to 0..255, round, and cast to np.uint8")
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:3]:
        raise ValueError(f"images: expected shape [B, H, W, 3], got {list(images.shape)}; put channels last")
    found: list[list[Detection]] = []
    for start in range(0, len(images), _BLOCK):
        found += _detect_block(images[start : start + _BLOCK])
    return found


def _detect_block(images: NDArray[np.uint8]) -> list[list[Detection]]:
    planes = _unmix(images)
    found: list[list[Detection]] = [[] for _ in images]
    sizes = np.bincount(planes.labels.ravel())
    sizes[0] = 0
    kept = np.flatnonzero(sizes >= _MIN_PIXELS)
    if not len(kept):
        return found
    blobs = _crop(planes, kept, sizes)
    centers, radii = _moments(blobs)
    overlap, solidity = _match(blobs, centers, radii)
    best = overlap.argmax(axis=0)
    ranked = np.sort(overlap, axis=0)
    error = _color_error(planes, len(sizes))[kept]
    confidence = _confidence(ranked[-1], solidity.max(axis=0), ranked[-1] - ranked[-2], error, radii)
    for k in np.argsort(-confidence, kind="stable"):
        shape = SHAPES[best[k]]
        box = box_of(shape, float(centers[k, 0]), float(centers[k, 1]), float(radii[k]))
        detection = Detection(shape, box, _NAMES[blobs.color[k]], float(confidence[k]))
        found[blobs.plane[k] % len(images)].append(detection)
    return found


def _unmix(images: NDArray[np.uint8]) -> _Planes:
    """Alpha and squared residual of every pixel on each colour's line; blobs of the least residual's colour."""
    batch, height, width, _ = images.shape
    delta = np.ascontiguousarray((images.reshape(-1, 3) - _ORIGIN).T)
    along = _DIRECTIONS @ delta
    alpha = np.clip(along / _SQUARED[:, None], 0, 1)
    residual = (delta**2).sum(axis=0) + alpha * (alpha * _SQUARED[:, None] - 2 * along)
    owned = (alpha > _FOREGROUND) & (residual <= residual.min(axis=0))
    stacked = (len(_NAMES) * batch, height, width)
    labels, _ = ndimage.label(owned.reshape(stacked), structure=_STRUCTURE)
    return _Planes(delta, alpha.reshape(stacked), residual.reshape(stacked), labels)


def _crop(planes: _Planes, kept: Int, sizes: Int) -> _Blobs:
    """Cut each kept blob and its fringe out of its plane."""
    count, height, width = planes.labels.shape
    slices = ndimage.find_objects(planes.labels)
    bounds = np.array([[(s.start, s.stop) for s in slices[label - 1]] for label in kept])
    plane = bounds[:, 0, 0]
    corner = bounds[:, 1:].sum(axis=2) // 2 - _CROP // 2
    rows, columns = (corner[:, axis, None] + np.arange(_CROP) for axis in (0, 1))
    on_canvas = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    index = (plane[:, None] * height + rows.clip(0, height - 1))[:, :, None] * width
    index = index + columns.clip(0, width - 1)[:, None, :]
    labels = planes.labels.ravel()[index]
    own = (labels == kept[:, None, None]) & on_canvas
    allowed = _grow(own) & (own | (labels == 0)) & on_canvas
    # The weight leaves a neighbour's edge of another colour out, and faint pixels, which fit every line, in.
    weight = _ramp(planes.residual.ravel()[index], _RESIDUAL_RAMP)
    return _Blobs(
        label=kept,
        plane=plane,
        color=plane // (count // len(_NAMES)),
        grid_x=columns[:, None, :].astype(np.float32) + np.float32(0.5),
        grid_y=rows[:, :, None].astype(np.float32) + np.float32(0.5),
        alpha=np.where(allowed, planes.alpha.ravel()[index] * weight, np.float32(0)),
        outside=(sizes[kept] - own.sum(axis=(1, 2))).astype(np.float32),
    )


def _grow(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Dilate by ``_FRINGE`` pixels in the city-block metric."""
    for _ in range(_FRINGE):
        grown = masks.copy()
        grown[:, 1:] |= masks[:, :-1]
        grown[:, :-1] |= masks[:, 1:]
        grown[:, :, 1:] |= masks[:, :, :-1]
        grown[:, :, :-1] |= masks[:, :, 1:]
        masks = grown
    return masks


def _moments(blobs: _Blobs) -> tuple[Float, Float]:
    """Centroids (x, y), [K, 2], and equal-area radii sqrt(mass / pi), [K], of the soft masses."""
    mass = blobs.alpha.sum(axis=(1, 2)).clip(1e-6)
    x = (blobs.alpha.sum(axis=1) * blobs.grid_x[:, 0]).sum(axis=1) / mass
    y = (blobs.alpha.sum(axis=2) * blobs.grid_y[:, :, 0]).sum(axis=1) / mass
    return np.stack([x, y], axis=1), np.sqrt((mass + blobs.outside) / np.float32(np.pi))


def _match(blobs: _Blobs, centers: Float, radii: Float) -> tuple[Float, Float]:
    """Soft IoU (sum min / sum max) of each blob with every shape's template, [len(SHAPES), K] each.

    The first is of the sharpened masses, which judge the outline and forgive a slight blur and noise; the second of
    the masses as they are, which a smear cannot please.
    """
    sharp = _sharpen(blobs.alpha)
    overlap, solidity = [], []
    for shape in SHAPES:
        template = coverage(shape, centers, radii, blobs.grid_x, blobs.grid_y)
        overlap.append(_soft_iou(sharp, _sharpen(template), blobs.outside))
        solidity.append(_soft_iou(blobs.alpha, template, blobs.outside))
    return np.stack(overlap), np.stack(solidity)


def _sharpen(alpha: Float) -> Float:
    sharp: Float = np.clip(2 * alpha - np.float32(0.5), 0, 1)
    return sharp


def _soft_iou(left: Float, right: Float, outside: Float) -> Float:
    shared: Float = np.minimum(left, right).sum(axis=(1, 2))
    union = left.sum(axis=(1, 2)) + right.sum(axis=(1, 2)) + outside - shared
    ratio: Float = shared / union.clip(1e-6)
    return ratio


def _color_error(planes: _Planes, labels: int) -> Float:
    """Distance, in levels, of each blob from its colour's line, [labels].

    The mean residual vector, in which noise cancels, and half the root mean square, in which it does not.
    """
    where = np.flatnonzero(planes.labels)
    label = planes.labels.ravel()[where]
    color, pixel = np.divmod(where, planes.delta.shape[1])
    alpha = planes.alpha.ravel()[where]
    count = np.bincount(label, minlength=labels).clip(1)
    squared = np.bincount(label, planes.residual.ravel()[where], labels) / count / 4
    for channel, delta in enumerate(planes.delta):
        vector = delta[pixel] - alpha * _DIRECTIONS[color, channel]
        squared += (np.bincount(label, vector, labels) / count) ** 2
    error: Float = np.sqrt(squared.clip(0)).astype(np.float32)
    return error


def _confidence(overlap: Float, solidity: Float, margin: Float, error: Float, radii: Float) -> Float:
    """Product of ramps over a blob's outline, solidity, margin to the second shape, colour and size, in [0, 1]."""
    outline = _ramp(overlap, _OVERLAP_RAMP) * _ramp(solidity, _SOLIDITY_RAMP) * _ramp(margin, _MARGIN_RAMP)
    size = _ramp(radii, _SMALL_RAMP) * _ramp(radii, _LARGE_RAMP)
    confidence: Float = outline * _ramp(error, _COLOR_RAMP) * size
    return confidence


def _ramp(value: Float, ends: tuple[float, float]) -> Float:
    """0 at the first end and beyond, 1 at the second, straight between."""
    share: Float = np.clip((value - np.float32(ends[0])) / np.float32(ends[1] - ends[0]), 0, 1)
    return share
