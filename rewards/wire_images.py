"""Images as PNG, for rewards over the network: what they are is known before a pixel of them is unpacked."""

from __future__ import annotations

import io
import struct

import numpy as np

from rewards.base import Images

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The first chunk of every PNG: its length and name, then width, height, bit depth and colour type.
_HEADER = struct.Struct(">8sI4sIIBB")
_EIGHT_BIT_RGB = (8, 2)


def encode_png(image: Images, name: str) -> bytes:
    """An image uint8 [H, W, 3] as a PNG, which loses nothing.

    Raises:
        ValueError: it is no such array, or has no pixel.
    """
    from PIL import Image

    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"{name}: expected an image uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    buffer = io.BytesIO()
    # The least of compressing: on one machine or in one rack, time is scarcer than bytes.
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def png_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width as a PNG's header has them; nothing is unpacked.

    Raises:
        ValueError: it is no PNG with 8 bits a channel in RGB.
    """
    if len(data) < _HEADER.size or not data.startswith(_SIGNATURE):
        raise ValueError(f"{name}: expected a PNG, got {len(data)} bytes of something else")
    _, _, chunk, width, height, depth, colour = _HEADER.unpack_from(data)
    if chunk != b"IHDR" or not width or not height:
        raise ValueError(f"{name}: expected a PNG, got one whose header is damaged")
    if (depth, colour) != _EIGHT_BIT_RGB:
        raise ValueError(
            f"{name}: expected a PNG with 8 bits a channel in RGB (depth 8, colour type 2), got depth {depth}, "
            f"colour type {colour}; convert it to RGB"
        )
    return height, width


def decode_png(data: bytes, size: tuple[int, int], name: str) -> Images:
    """A PNG as uint8 [H, W, 3].

    Args:
        data: the file.
        size: its height and width by :func:`png_size`, which have been found small enough.
        name: for messages.

    Raises:
        ValueError: it cannot be read, or turns out to have another size.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            # A second header further on would have the last word.
            if image.size != size[::-1] or image.mode != "RGB":
                raise ValueError("it has two headers")
            return np.array(image)
    except Exception as error:  # Pillow has no common type for what a damaged file makes it raise.
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: expected a PNG, got a damaged one ({said:.100})") from error
