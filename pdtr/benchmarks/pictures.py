"""Pictures that stay encoded until they are looked at, with a limit on their size."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rewards.base import Images

FORMATS = ("PNG", "JPEG", "WEBP")
# Exif's orientations that lie on their side.
_TURNED = (5, 6, 7, 8)


@dataclass(frozen=True)
class Picture:
    """A picture in a file, or as the bytes of one.

    Attributes:
        name: for messages.
        content: a path, or a file's content.
    """

    name: str
    content: Path | bytes

    def load(self) -> Images:
        """Decode it, uint8 [H, W, 3].

        Raises:
            ValueError: there is no such file, it is no picture, or it is too large.
        """
        from envs.prompts import MAX_BYTES, MAX_IMAGE_PIXELS

        size = len(self._encoded(MAX_BYTES))
        if size > MAX_BYTES:
            raise ValueError(f"{self.name}: expected a picture of at most {MAX_BYTES} bytes, got {size} or more")
        return decoded(self._encoded(MAX_BYTES), self.name, MAX_IMAGE_PIXELS)

    def size(self) -> tuple[int, int]:
        """(height, width) of what :meth:`load` gives, from the file's head alone.

        Raises:
            ValueError: as :meth:`load`.
        """
        from envs.prompts import MAX_BYTES

        return encoded_size(self._encoded(MAX_BYTES), self.name)

    @property
    def digest(self) -> str:
        """A hash of the encoded picture, 16 hexadecimal digits; empty where it cannot be read."""
        from envs.prompts import MAX_BYTES

        try:
            return hashlib.sha256(self._encoded(MAX_BYTES)).hexdigest()[:16]
        except ValueError:
            return ""

    def _encoded(self, max_bytes: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        try:
            with self.content.open("rb") as file:
                return file.read(max_bytes + 1)
        except OSError as error:
            raise ValueError(f"{self.name}: expected a picture's file, got {error.strerror or error}") from error


def encoded_size(content: bytes, name: str) -> tuple[int, int]:
    """(height, width) of a file's content the way up that its camera meant.

    Raises:
        ValueError: it is no picture.
    """
    from PIL import ExifTags, Image

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
            height, width = picture.height, picture.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: expected a {', '.join(FORMATS)} picture, got one that is not: {error}") from error
    return (width, height) if is_turned else (height, width)


def decoded(content: bytes, name: str, max_pixels: int) -> Images:
    """A file's content as uint8 [H, W, 3].

    Raises:
        ValueError: it is no whole picture, or it has too many pixels.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            size = picture.width, picture.height
            pixels = None
            if size[0] * size[1] <= max_pixels:
                pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name}: expected a whole {', '.join(FORMATS)} picture, got one that is not: {error}"
        ) from error
    if pixels is None:
        raise ValueError(f"{name}: expected at most {max_pixels} pixels, got {size[0]}x{size[1]}")
    return pixels


def resized(image: Images, size: tuple[int, int]) -> Images:
    """An image [H, W, 3] at (height, width); the same object where it has that size."""
    from PIL import Image

    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def pixels_digest(image: Images) -> str:
    """A hash of an image's pixels and size, 16 hexadecimal digits."""
    return hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def save_picture(path: Path, image: Images) -> None:
    """Write a PNG; whoever stops in between leaves no half of one under its name."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(np.ascontiguousarray(image)).save(partial, format="PNG")
    partial.replace(path)
