"""Pictures of rows: inline or in a file beside the row's, decoded within limits. Nothing is fetched from a network."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from envs.data.parts import Blob
from rewards.base import Images

FORMATS = ("PNG", "JPEG", "WEBP")
_WHOLE = f"a whole {', '.join(FORMATS)} picture"
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


class BadRowError(Exception):
    """A row that cannot be used: ``expected`` says what was looked for, ``got`` what was there."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected, got)
        self.expected, self.got = expected, got

    def __str__(self) -> str:
        return f"expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Limits:
    """What a row may cost.

    Attributes:
        max_bytes: of a line, a text or an encoded picture.
        max_pixels: of a picture; the header tells, so that a larger one is never decoded.
        min_pixels: of a picture that is learnt to draw; smaller ones are bad rows.
    """

    max_bytes: int = 2**25
    max_pixels: int = 2**26
    min_pixels: int = 0

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_pixels < 1 or not 0 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"limits: expected max_bytes and max_pixels of 1 or more and min_pixels between 0 and max_pixels, "
                f"got {self}"
            )


def load_picture(value: Any, root: Path, limits: Limits, name: str) -> Images:
    """The picture that a row's field holds, uint8 [H, W, 3].

    Args:
        value: encoded bytes, a struct of ``bytes`` and ``path`` (as ``datasets`` writes it), a ``data:`` URI, or a path
            below ``root``.
        root: the folder that paths start from, and may not leave.
        limits: see :class:`Limits`.
        name: of the field, for messages.

    Raises:
        BadRowError: it is something else, too large, or not a whole picture.
    """
    return decode_picture(picture_bytes(value, root, limits, name), limits, name)


def picture_bytes(value: Any, root: Path, limits: Limits, name: str) -> bytes:
    """The encoded picture that a row's field holds; as :func:`load_picture`."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        inline = value.get("bytes")
        value = value.get("path") if inline is None else inline
    if isinstance(value, Blob | bytes):
        _check_size(value.size if isinstance(value, Blob) else len(value), limits, name)
        return _read(value, name) if isinstance(value, Blob) else value
    if not isinstance(value, str) or not value:
        raise BadRowError(f"{name!r}: a picture or a relative path", repr(value)[:80])
    if _DATA_URI.match(value):
        return _from_data_uri(value, limits, name)
    if _URL.match(value):
        raise BadRowError(f"{name!r}: a picture or a relative path, for nothing is fetched", repr(value)[:80])
    return read_below(value, root, limits, name)


def read_below(path: str, root: Path, limits: Limits, name: str) -> bytes:
    """The bytes of a file below ``root``.

    Raises:
        BadRowError: it lies elsewhere, is not there, is too large, or cannot be read.
    """
    try:
        full = (root / path).resolve()
        if not full.is_relative_to(root.resolve()):
            raise BadRowError(f"{name!r}: a path inside {root}", f"{path!r}; give image_root")
        if not full.is_file():
            expected = f"{name!r}: an existing file" if not full.exists() else _WHOLE
            raise BadRowError(expected, f"{path!r}, {'a folder' if full.exists() else f'not found in {root}'}")
        _check_size(full.stat().st_size, limits, repr(path))
        return full.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in a path.
        raise BadRowError(f"{name!r}: a file that can be read", f"{path!r}: {error}") from error


def decode_picture(data: bytes, limits: Limits, name: str) -> Images:
    """Encoded bytes as uint8 [H, W, 3], turned as the camera was held.

    Raises:
        BadRowError: they are no whole picture, one of too many pixels, or one of more than 8 bits a channel.
    """
    with _opened(data, limits, name) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"), np.uint8)


def check_picture(data: bytes, limits: Limits, name: str) -> None:
    """Check the header of encoded bytes; what follows may still be damaged.

    Raises:
        BadRowError: as :func:`decode_picture`.
    """
    with _opened(data, limits, name):
        pass


@contextmanager
def _opened(data: bytes, limits: Limits, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limits.max_pixels:
                raise BadRowError(f"at most {limits.max_pixels} pixels", f"{name} of {image.width}x{image.height}")
            if image.mode == "F" or image.mode.startswith("I"):
                raise BadRowError("a picture of 8 bits a channel", f"{name} of mode {image.mode}")
            yield image
    except (BadRowError, MemoryError):
        raise
    except Exception as error:  # On damaged bytes Pillow's parsers raise nearly anything.
        raise BadRowError(_WHOLE, f"{name}: {error}") from error


def _read(blob: Blob, name: str) -> bytes:
    try:
        return blob.read()
    except OSError as error:
        raise BadRowError(_WHOLE, f"{name}: {error}") from error


def _check_size(size: int, limits: Limits, name: str) -> None:
    if size > limits.max_bytes:
        raise BadRowError(f"a picture of at most {limits.max_bytes} bytes", f"{name} of {size}")


def _from_data_uri(value: str, limits: Limits, name: str) -> bytes:
    _check_size(len(value) * 3 // 4, limits, name)
    try:
        return base64.b64decode(value.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRowError(f"{name!r}: base64", str(error)) from error
