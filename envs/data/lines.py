"""Lines of text files and the JSON in them, within limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from envs.data.pictures import BadRowError
from envs.spaces import describe_text


def bounded_lines(handle: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Lines without their line feed; None for one that is too long, which is passed over without being held."""
    while line := handle.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line.removesuffix(b"\n")
            continue
        while line and not line.endswith(b"\n"):
            line = handle.readline(max_bytes)
        yield None


def decode_text(data: bytes, is_first: bool = False) -> str:
    """UTF-8 as text, without a carriage return at its end and, where a file begins, without a byte order mark.

    Raises:
        BadRowError: it is no UTF-8.
    """
    try:
        # A file from Windows may begin with a byte order mark and end its lines with CR LF.
        return data.removesuffix(b"\r").decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError("UTF-8", f"the byte {data[error.start]:#04x} at {error.start}") from error


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadRowError: it is none; NaN and infinities are not JSON.
    """
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRowError("a JSON object", f"{describe_text(text)}: {error}") from error
    if not isinstance(row, dict):
        raise BadRowError("a JSON object", f"a {type(row).__name__}")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
