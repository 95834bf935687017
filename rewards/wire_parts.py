"""A call's images and prompts as requests, none of them larger than a server takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from rewards.base import Images, Prompt
from rewards.wire import encode_image, encode_prompt, join_request
from rewards.wire_json import Limits, count_values

Span = tuple[int, int]

# What each limit counts, and the flag of ``pdtr reward serve`` that raises it.
_LIMITS = {
    "max_body_bytes": ("bytes", "--max-body-mib"),
    "max_images": ("images", "--max-images"),
    "max_source_images": ("source images", "--max-source-images"),
    "max_pixels": ("pixels an image", "--max-pixels"),
    "max_request_pixels": ("pixels", "--max-request-pixels"),
    "max_values": ("JSON values", "--max-values"),
}
_PIXELS = list(_LIMITS).index("max_pixels")
# At most: what a request has around its images and prompts, by limit; and the bytes that each adds to its own JSON,
# quotes, separators and the index of an image's prompt. Its values are its comma there, an image's also the index's.
_FRAME = (64, 0, 0, 0, 0, 9)
_MORE_BYTES = 16


def read_limits(document: Mapping[str, Any]) -> dict[str, int]:
    """The limits of a request, by name, that a server tells; older ones tell ``max_images`` alone.

    Raises:
        KeyError: there is no ``max_images``.
        ValueError: one of them is no number, or less than 1.
    """
    names = [entry.name for entry in fields(Limits) if entry.name in document or entry.name == "max_images"]
    told = {name: int(document[name]) for name in names}
    Limits(**told)
    return told


class EncodedCall:
    """A call's images and prompts, encoded once, so that any run of the images can be a request.

    Args:
        images: uint8 [B, H, W, 3].
        prompts: one an image; a :class:`Prompt` object that images of a request share is sent once in it.

    Raises:
        ValueError: an image is no uint8 [H, W, 3], metadata is not JSON, or there is not one prompt an image.
    """

    def __init__(self, images: Images, prompts: Sequence[Prompt]) -> None:
        if len(images) != len(prompts):
            raise ValueError(f"expected one prompt an image, got {len(prompts)} prompts for {len(images)} images")
        distinct = {id(prompt): prompt for prompt in prompts}
        index = {identity: i for i, identity in enumerate(distinct)}
        self._groups = np.array([index[id(prompt)] for prompt in prompts])
        # Before the images, which take longer: metadata that is not JSON is found at once.
        self._prompts = [encode_prompt(prompt) for prompt in distinct.values()]
        self._images = [encode_image(image, f"images[{i}]") for i, image in enumerate(images)]
        # [B, limits] and [prompts, limits], in the order of _LIMITS.
        self._image_loads = np.array([_image_load(*pair) for pair in zip(images, self._images, strict=True)])
        self._prompt_loads = np.array(
            [_prompt_load(*pair) for pair in zip(distinct.values(), self._prompts, strict=True)]
        )

    def body(self, start: int, stop: int) -> bytes:
        """The request for the images from ``start`` to ``stop``."""
        used, groups = np.unique(self._groups[start:stop], return_inverse=True)
        return join_request(self._images[start:stop], [self._prompts[group] for group in used], groups.tolist())

    def load(self, start: int, stop: int) -> dict[str, int]:
        """How much of each limit that request takes, at most."""
        used = np.unique(self._groups[start:stop])
        loads = np.concatenate([self._image_loads[start:stop], self._prompt_loads[used]])
        taken = loads.sum(0) + _FRAME
        taken[_PIXELS] = loads[:, _PIXELS].max()
        return dict(zip(_LIMITS, taken.tolist(), strict=True))

    def spans(self, units: Sequence[Span], told: Mapping[str, int]) -> list[Span]:
        """Join neighbouring units, each an image or a group, to requests that are within a server's limits.

        A limit that the server does not tell is taken to be the default one; whether it takes a single unit beyond that
        is left to the server.

        Args:
            units: start and stop of what is not cut.
            told: limits that the server tells, by name.

        Raises:
            ValueError: a single unit is beyond a limit that the server tells.
        """
        limits = {**asdict(Limits()), **told}
        spans: list[Span] = []
        for start, stop in units:
            if spans and not _beyond(self.load(spans[-1][0], stop), limits):
                spans[-1] = (spans[-1][0], stop)
                continue
            _check_alone(self.load(start, stop), told, stop - start)
            spans.append((start, stop))
        return spans


def _image_load(image: Images, text: str) -> tuple[int, ...]:
    pixels = image.shape[0] * image.shape[1]
    return len(text) + _MORE_BYTES, 1, 0, pixels, pixels, 2


def _prompt_load(prompt: Prompt, row: Mapping[str, Any]) -> tuple[int, ...]:
    text = json.dumps(row).encode()
    pixels = [image.shape[0] * image.shape[1] for image in prompt.source_images]
    values = count_values(text) + 1
    return len(text) + _MORE_BYTES, 0, len(pixels), max(pixels, default=0), sum(pixels), values


def _beyond(load: Mapping[str, int], limits: Mapping[str, int]) -> list[str]:
    return [name for name, most in limits.items() if load[name] > most]


def _check_alone(load: Mapping[str, int], told: Mapping[str, int], num_images: int) -> None:
    for name in _beyond(load, told):
        what, flag = _LIMITS[name]
        unit = (
            "one image with its prompt" if num_images == 1 else f"a group of {num_images} images, which is never cut,"
        )
        raise ValueError(
            f"expected {unit} within the server's {name} of {told[name]} {what} a request, got {load[name]}; raise "
            f"{name} there (pdtr reward serve {flag})"
        )
