"""The format of rewards over the network: JSON with PNGs in base64, read without trusting whoever wrote it."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.base import Images, Prompt, Scores, Values
from rewards.wire_images import decode_png, encode_png, png_size
from rewards.wire_json import (
    Limits,
    RequestError,
    check_count,
    check_keys,
    kind_of,
    listed,
    parse_limited,
    parse_object,
    plain_json,
    valued,
)

_REQUEST_KEYS = ("images", "prompts", "groups")
_PROMPT_KEYS = ("text", "source_images", "metadata", "id", "group")


def encode_request(images: Images, prompts: Sequence[Prompt]) -> bytes:
    """Images uint8 [B, H, W, 3] and their B prompts as the body of a request.

    A :class:`Prompt` object that several images share is sent once; ``groups`` has the index of each image's prompt.

    Raises:
        ValueError: a source image is no uint8 [H, W, 3], or metadata is not JSON.
    """
    distinct = {id(prompt): prompt for prompt in prompts}
    index = {identity: i for i, identity in enumerate(distinct)}
    pictures = [encode_image(image, f"images[{i}]") for i, image in enumerate(images)]
    rows = [encode_prompt(prompt) for prompt in distinct.values()]
    return join_request(pictures, rows, [index[id(prompt)] for prompt in prompts])


def encode_image(image: Images, name: str) -> str:
    """An image as it stands in a request; raises a ValueError where it is no uint8 [H, W, 3]."""
    return base64.b64encode(encode_png(image, name)).decode()


def encode_prompt(prompt: Prompt) -> dict[str, Any]:
    """A prompt as it stands in a request.

    Raises:
        ValueError: a source image is no uint8 [H, W, 3], or metadata is not JSON.
    """
    name = f"prompt {prompt.id or prompt.text!r:.80}"
    sources = [encode_image(image, f"{name}, source image {k}") for k, image in enumerate(prompt.source_images)]
    try:
        metadata = plain_json(prompt.metadata, f"{name}, metadata")
    except RecursionError as error:
        raise ValueError(f"{name}, metadata: expected JSON, got values that are nested too deeply") from error
    row = {"text": prompt.text, "source_images": sources, "metadata": metadata, "id": prompt.id, "group": prompt.group}
    return {key: value for key, value in row.items() if value or key == "text"}


def join_request(images: Sequence[str], prompts: Sequence[dict[str, Any]], groups: Sequence[int]) -> bytes:
    """The body of a request from its encoded images and prompts, and the index of each image's prompt."""
    document = {"images": list(images), "prompts": list(prompts), "groups": list(groups)}
    return json.dumps(document, allow_nan=False).encode()


def parse_request(body: bytes, limits: Limits) -> tuple[Images, list[Prompt]]:
    """The images uint8 [B, H, W, 3] and the B prompts of a request's body; images of one prompt share its object.

    Raises:
        RequestError: it is malformed (400) or larger than the limits (413); the message names the entry.
    """
    document = parse_limited(body, limits)
    check_keys(document, _REQUEST_KEYS, "body")
    encoded = listed(document, "images", "body")
    if not encoded:
        raise RequestError("images: expected at least one image, got none")
    check_count(len(encoded), limits.max_images, "images", "images")
    rows = [_checked_row(row, i) for i, row in enumerate(listed(document, "prompts", "body"))]
    groups = _groups(document, len(encoded), len(rows))
    named = [(f"images[{i}]", text) for i, text in enumerate(encoded)]
    sources = [
        (f"prompts[{i}].source_images[{k}]", text)
        for i, row in enumerate(rows)
        for k, text in enumerate(row["source_images"])
    ]
    check_count(len(sources), limits.max_source_images, "source_images", "source images")
    pictures = _pictures([*named, *sources], len(named), limits)
    images, rest = np.stack(pictures[: len(named)]), iter(pictures[len(named) :])
    prompts = [
        Prompt(**{**row, "source_images": tuple(next(rest) for _ in row["source_images"])})  # In the order of sources.
        for row in rows
    ]
    return images, [prompts[group] for group in groups]


def encode_answer(scores: Scores, fingerprint: str) -> bytes:
    """Scores as the body of an answer; NaN is null, and its reason is under its index."""
    document = {
        "total": _plain_numbers(scores.total),
        "components": {name: _plain_numbers(values) for name, values in scores.components.items()},
        "reasons": {str(index): reason for index, reason in sorted(scores.reasons.items())},
        "fingerprint": fingerprint,
    }
    return json.dumps(document, allow_nan=False).encode()


def parse_answer(body: bytes, count: int) -> tuple[Scores, str]:
    """The scores of ``count`` images and the reward's fingerprint.

    Raises:
        ValueError: it is no such answer.
    """
    document = parse_object(body, "answer")
    components = valued(document, "components", dict, "answer", {})
    reasons = valued(document, "reasons", dict, "answer", {})
    wrong = [key for key in reasons if not (key.isdecimal() and key.isascii() and int(key) < count)]
    if wrong:
        raise ValueError(f"reasons: expected indices below {count}, got {wrong[0]!r:.80}")
    scores = Scores(
        _numbers(document.get("total"), count, "total"),
        {name: _numbers(values, count, f"component {name!r:.80}") for name, values in components.items()},
        {int(key): str(reason) for key, reason in reasons.items()},
    )
    return scores, str(valued(document, "fingerprint", str, "answer", ""))


def check_token(token: str) -> None:
    """Raise a ValueError where a token cannot travel in a header; the message does not show it."""
    if not all("!" <= letter <= "~" for letter in token):
        raise ValueError("token: expected one word of visible ASCII, got blanks or other characters; make another one")


def _checked_row(row: object, index: int) -> dict[str, Any]:
    where = f"prompts[{index}]"
    if not isinstance(row, dict):
        raise RequestError(f"{where}: expected an object, got {kind_of(row)}")
    check_keys(row, _PROMPT_KEYS, where)
    return {
        "text": valued(row, "text", str, where),
        "source_images": valued(row, "source_images", list, where, []),
        "metadata": valued(row, "metadata", dict, where, {}),
        "id": valued(row, "id", str, where, ""),
        "group": valued(row, "group", str, where, ""),
    }


def _groups(document: dict[str, Any], num_images: int, num_prompts: int) -> list[int]:
    groups: list[Any] = valued(document, "groups", list, "body", list(range(num_prompts)))
    if len(groups) != num_images:
        what = "groups: expected the index of a prompt" if "groups" in document else "prompts: expected one"
        raise RequestError(f"{what} for each of {num_images} images, got {len(groups)}")
    for i, group in enumerate(groups):
        # true is an int to Python.
        if type(group) is not int or not 0 <= group < num_prompts:
            raise RequestError(f"groups[{i}]: expected an index below {num_prompts}, the prompts, got {kind_of(group)}")
    idle = set(range(num_prompts)) - set(groups)
    if idle:
        raise RequestError(f"prompts[{min(idle)}]: expected an image in groups, got none; take the prompt away")
    return groups


def _pictures(named: Sequence[tuple[str, object]], num_images: int, limits: Limits) -> list[Images]:
    """All pictures, of which the first ``num_images`` are of one size; none is unpacked before all are small enough."""
    files = [_base64_bytes(text, name) for name, text in named]
    try:
        sizes = [png_size(data, name) for data, (name, _) in zip(files, named, strict=True)]
        for (name, _), (height, width) in zip(named, sizes, strict=True):
            check_count(height * width, limits.max_pixels, name, "pixels")
        check_count(sum(height * width for height, width in sizes), limits.max_request_pixels, "body", "pixels")
        for (name, _), size in zip(named[1:num_images], sizes[1:], strict=False):
            if size != sizes[0]:
                raise RequestError(
                    f"{name}: expected all images of one size, got height and width {size} after {sizes[0]}; "
                    "send images of another size in another request"
                )
        return [decode_png(data, size, name) for data, size, (name, _) in zip(files, sizes, named, strict=True)]
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(str(error)) from error


def _base64_bytes(text: object, name: str) -> bytes:
    if not isinstance(text, str):
        raise RequestError(f"{name}: expected a PNG in base64, got {kind_of(text)}")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(f"{name}: expected a PNG in base64, got text that is none ({error!s:.80})") from error


def _plain_numbers(values: Values) -> list[float | None]:
    # A float32 is written with the digits of the float64 of the same value, and so comes back as it was.
    return [None if np.isnan(value) else float(value) for value in values]


def _numbers(values: object, count: int, name: str) -> Values:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{name}: expected a list of {count} numbers, got {kind_of(values)}")
    wrong = [value for value in values if value is not None and type(value) not in (int, float)]
    if wrong:
        raise ValueError(f"{name}: expected numbers or null, got {kind_of(wrong[0])}")
    try:
        with np.errstate(over="raise"):
            return np.array([np.nan if value is None else value for value in values], np.float32)
    except (OverflowError, FloatingPointError) as error:
        raise ValueError(f"{name}: expected numbers that a float32 holds, got a larger one") from error
