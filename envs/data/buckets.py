"""Resolutions of training pictures: aspect-ratio buckets, crops, and a resolution that grows. Pure functions.

UniPic 2.0 (arXiv:2509.04548) names progressive resolutions, balanced sampling over aspect ratios, and the ratios 1:1,
4:3, 3:2 and 16:9; it lists no buckets and no resolutions. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rewards.base import Images

Size = tuple[int, int]
Box = tuple[float, float, float, float]

RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
"""Width to height."""
FACTOR = 32
"""Sides are multiples of it: 8 of the VAE, 2 of the patches, and a token of the language model takes 32 pixels."""
# A side that is a multiple but for rounding is not rounded up to the next one.
_ROUNDING = 1e-9


def bucket_size(ratio: tuple[int, int], size: int, factor: int = FACTOR) -> Size:
    """The size of about ``size`` x ``size`` pixels that is nearest to a ratio: each side to the nearest multiple.

    ``height = S / sqrt(w / h)``, ``width = S sqrt(w / h)``, for a ratio w:h.
    """
    stretch = math.sqrt(ratio[0] / ratio[1])
    return _nearest(size / stretch, factor), _nearest(size * stretch, factor)


def nearest_ratio(size: Size, ratios: tuple[tuple[int, int], ...] = RATIOS) -> int:
    """The index of the ratio that is nearest to a picture's, by the logarithm: twice as wide is as far as half."""
    own = math.log(size[1] / size[0])
    return min(range(len(ratios)), key=lambda index: abs(math.log(ratios[index][0] / ratios[index][1]) - own))


def fix_pixels(size: Size, pixels: int = 512, factor: int = FACTOR) -> Size:
    """A picture's own shape at about ``pixels`` x ``pixels``, as UniPic 2.0's descendants train.

    ``r = S / sqrt(H W)``, each side ``ceil(side r / factor) factor``.
    """
    scale = pixels / math.sqrt(size[0] * size[1])
    height, width = (max(1, math.ceil(side * scale / factor - _ROUNDING)) * factor for side in size)
    return height, width


def fix_longer_edge(size: Size, edge: int = 512, factor: int = FACTOR) -> Size:
    """A picture's own shape with a longer side of ``edge``, as UniPic 2.0 edits: ``round(side r / factor) factor``."""
    scale = edge / max(size)
    height, width = (_nearest(side * scale, factor) for side in size)
    return height, width


def crop_box(size: Size, into: Size) -> Box:
    """The largest part in the middle of a picture that has another's shape: (left, top, right, bottom) in [0, 1]."""
    wider = (size[1] / size[0]) / (into[1] / into[0])
    width, height = min(1.0, 1 / wider), min(1.0, wider)
    return (1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2


def cropped(image: Images, box: Box, size: Size) -> Images:
    """A part of a picture at another size, uint8 [H, W, 3]: resized by Lanczos, without aliasing.

    Args:
        image: uint8 [H, W, 3].
        box: (left, top, right, bottom) in [0, 1], as of :func:`crop_box`.
        size: of the result.
    """
    height, width = image.shape[:2]
    if size == (height, width) and box == (0.0, 0.0, 1.0, 1.0):
        return image
    pixels = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS, box=pixels)
    return np.asarray(resized, np.uint8)


def _nearest(side: float, factor: int) -> int:
    return max(1, round(side / factor)) * factor


@dataclass(frozen=True)
class ProgressiveResolution:
    """A resolution that grows as training goes on.

    Attributes:
        sizes: S of each stage: buckets have about S x S pixels.
        starts: the batch (of a task, counted from 0) that each stage begins with; the first is 0.
        batch_sizes: examples of a batch in each stage; the task's own in all of them when empty.
    """

    sizes: tuple[int, ...] = (512,)
    starts: tuple[int, ...] = (0,)
    batch_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.starts) or min(self.sizes) < FACTOR:
            raise ValueError(
                f"resolution: expected a size of {FACTOR} or more and a start for each stage, got sizes {self.sizes} "
                f"and starts {self.starts}"
            )
        if self.starts[0] != 0 or any(a >= b for a, b in zip(self.starts, self.starts[1:], strict=False)):
            raise ValueError(f"resolution.starts: expected 0 and then rising numbers, got {self.starts}")
        if self.batch_sizes and (len(self.batch_sizes) != len(self.sizes) or min(self.batch_sizes) < 1):
            raise ValueError(
                f"resolution.batch_sizes: expected none, or 1 or more for each of {len(self.sizes)} stages, "
                f"got {self.batch_sizes}"
            )

    def stage(self, batch: int) -> int:
        """The index of the stage that a batch is of."""
        return max(index for index, start in enumerate(self.starts) if start <= batch)

    def size(self, batch: int) -> int:
        """S of a batch."""
        return self.sizes[self.stage(batch)]

    def batch_size(self, batch: int, otherwise: int) -> int:
        """Examples of a batch."""
        return self.batch_sizes[self.stage(batch)] if self.batch_sizes else otherwise
