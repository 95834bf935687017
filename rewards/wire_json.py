"""JSON of unknown origin, read key by key: a mistake is named, and what is too large is refused before it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rewards.names import hint

_JSON_NAMES: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
_MISSING = object()


@dataclass(frozen=True)
class Limits:
    """What a server takes in one request; whatever is larger is refused before it is unpacked.

    Attributes:
        max_body_bytes: length of the JSON.
        max_images: images to score.
        max_source_images: source images of all prompts together.
        max_pixels: pixels of one image.
        max_request_pixels: pixels of all images and source images together; 3 bytes each once they are unpacked.
        max_values: values in the JSON, as bounded by its commas, colons and brackets.

    Raises:
        ValueError: one of them is less than 1.
    """

    max_body_bytes: int = 64 * 2**20
    max_images: int = 512
    max_source_images: int = 512
    max_pixels: int = 2048 * 2048
    max_request_pixels: int = 2**27
    max_values: int = 2**20

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) < 1:
                raise ValueError(f"{entry.name}: expected 1 or more, got {getattr(self, entry.name)}")


class RequestError(ValueError):
    """A request that cannot be answered, with the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def parse_limited(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object that the body of a request is.

    Raises:
        RequestError: it is none (400), or larger than the limits (413).
    """
    if len(body) > limits.max_body_bytes:
        raise too_large(len(body), limits)
    check_count(count_values(body), limits.max_values, "body", "values")
    try:
        return parse_object(body, "body")
    except ValueError as error:
        raise RequestError(str(error)) from error


def count_values(body: bytes) -> int:
    """A bound of how many values some JSON has, without reading it."""
    # A list of empty lists takes twenty times its length in memory; base64 has none of these characters.
    return sum(body.count(mark) for mark in (b",", b":", b"[", b"{"))


def too_large(count: int, limits: Limits) -> RequestError:
    """The refusal of a body of ``count`` bytes or more."""
    return RequestError(
        f"body: expected at most {limits.max_body_bytes} bytes, got {count} or more; send fewer images a request", 413
    )


def parse_object(body: bytes, where: str) -> dict[str, Any]:
    """The object that some JSON is; ``where`` names it in messages.

    Raises:
        ValueError: it is none. NaN and infinities, which Python reads, are no JSON.
    """
    try:
        document = json.loads(body.decode(), parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"{where}: expected JSON, got values that are nested too deeply") from error
    except ValueError as error:
        raise ValueError(
            f"{where}: expected JSON in UTF-8, got {len(body)} bytes of something else ({error!s:.120})"
        ) from error
    if not isinstance(document, dict):
        raise ValueError(f"{where}: expected an object, got {kind_of(document)}")
    return document


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON, null is")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.20} is out of range")
    return value


def plain_json(value: Any, where: str) -> Any:
    """A value as JSON has it. What ``json`` would change without a word, such as a key that is a number, is refused.

    Raises:
        ValueError: it is not JSON; the message leads to the entry.
        RecursionError: it is nested too deeply, or holds itself.
    """
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise ValueError(f"{where}: expected keys that are text, got {wrong[0]!r:.80}; write it as text")
        return {key: plain_json(entry, f"{where}[{key!r:.40}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value!r}; JSON has no other, so use None")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{where}: expected JSON, got {type(value).__name__} {value!r:.40}; convert it")


def check_keys(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise a RequestError where an object has a key that is not known, with the nearest that is."""
    for key in entry:
        if key not in known:
            # No key of ours is long, and looking for one that is like a long one takes its time.
            near = hint(key[:40], known)
            raise RequestError(f"{where}: expected the keys {', '.join(known)}, got {key!r:.80}{near}")


def check_count(count: int, most: int, where: str, what: str) -> None:
    """Raise a RequestError (413) where there is more of something than a server takes."""
    if count > most:
        raise RequestError(f"{where}: expected at most {most} {what}, got {count}; send less a request", 413)


def listed(entry: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """The list under a key; raises as :func:`valued` does."""
    found: list[Any] = valued(entry, key, list, where)
    return found


def valued(entry: Mapping[str, Any], key: str, kind: type, where: str, default: Any = _MISSING) -> Any:
    """The value under a key, of the type ``kind``; the default where there is none.

    Raises:
        RequestError: it is of another type, or there is none and no default.
    """
    value = entry.get(key, default)
    if value is _MISSING or not isinstance(value, kind):
        got = "nothing" if value is _MISSING else kind_of(value)
        raise RequestError(f"{where}: expected {_JSON_NAMES[kind]} under {key!r}, got {got}")
    return value


def kind_of(value: object) -> str:
    """What a value of JSON is, for messages."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    return "null" if value is None else f"{value!r:.40}"
