"""What the columns of a judged edit hold, read and checked: scores, a rank, pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewards.base import Images

RANK_FIX = "give it a rank, 1 for the best edit of its prompt and 2 for a worse one"


def scores_column(row: Mapping[str, Any], dimensions: Sequence[str]) -> dict[str, float]:
    """A row's scores; none where nothing is said, and an error where something is that cannot be used."""
    found = row.get("scores") or {}
    if all(value is None for value in found.values()):
        return {}
    for name in dimensions:
        value = found[name]
        if value is None or not math.isfinite(value) or not 0 <= value <= 1:
            raise ValueError(f"scores.{name}: expected a number in [0, 1], got {value}; divide by the scale's top")
    return {name: float(found[name]) for name in dimensions}


def rank_column(row: Mapping[str, Any]) -> int | None:
    """A row's rank; None where it has none, and an error where it is no whole number."""
    value = row.get("rank")
    # A column of whole numbers with gaps is one of floats with NaN where pandas wrote it.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"rank: expected a whole number, got {value!r}; {RANK_FIX}")
    return int(value)


def png(image: Images) -> bytes:
    """A picture, uint8 [H, W, 3], as the bytes of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def picture_column(row: Mapping[str, Any], name: str) -> Images:
    """A row's picture of this name, uint8 [H, W, 3]; an error where there is none or it cannot be read."""
    from PIL import Image

    struct = row[name]
    if not struct or not struct.get("bytes"):
        raise ValueError(f"{name}: expected a picture in the row, got none")
    try:
        with Image.open(io.BytesIO(struct["bytes"])) as opened:
            return np.asarray(opened.convert("RGB"), np.uint8)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: expected a picture, got bytes that cannot be read as one ({error})") from error
