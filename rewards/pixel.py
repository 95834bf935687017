"""Closed-form rewards on pixels: the smallest rewards that can be learnt, and what a new one looks like."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rewards.base import Images, Prompt, Values


def jpeg_compressibility(images: Images, prompts: Sequence[Prompt]) -> Values:
    """Minus the JPEG size in kilobytes at quality 95. DDPO (arXiv:2305.13301).  [B, H, W, 3] -> [B]."""
    return -jpeg_incompressibility(images, prompts)


def jpeg_incompressibility(images: Images, prompts: Sequence[Prompt]) -> Values:
    """The JPEG size in kilobytes at quality 95. DDPO (arXiv:2305.13301).  [B, H, W, 3] -> [B]."""
    return np.array([_kilobytes(image) for image in images], np.float32)


def redness(images: Images, prompts: Sequence[Prompt]) -> Values:
    """Mean red minus the mean of green and blue, in [-1, 1].  [B, H, W, 3] -> [B]."""
    red, green, blue = (images[..., channel].mean((1, 2), dtype=np.float64) for channel in range(3))
    return np.asarray((red - (green + blue) / 2) / 255, np.float32)


def _kilobytes(image: Images) -> float:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
