"""From a template, a prompt and images to the JSON body of a chat completion."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from PIL import Image

from rewards.base import Images, Prompt
from rewards.judges.rubrics import RubricReadout, response_format
from rewards.judges.settings import JudgeSettings
from rewards.judges.templates import METADATA, Readout, Template, reference_label

_LABEL_TOKENS = 1
_ANSWER_TOKENS = 8
"""A label with a space, a quotation mark or a full stop around it."""
_RUBRIC_TOKENS = 1024


def fitted(image: Images, long_side: int) -> Images:
    """An image [H, W, 3] scaled down to ``long_side`` pixels on its longer side; a smaller one as it is.

    Raises:
        ValueError: it is not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"image for a judge: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return image
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def data_url(image: Images, long_side: int) -> str:
    """An image as a PNG data URL, scaled down where it is larger; PNG, so that the judge sees the very pixels."""
    buffer = io.BytesIO()
    # Level 1 takes a fraction of the time; a little longer does not matter on the way to a near server.
    Image.fromarray(fitted(image, long_side)).save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def remembering(encode: Callable[[Images], str]) -> Callable[[Images], str]:
    """An encoder that does every array once, for images that many requests share; the arrays must outlive it.

    Threads that want an array that another is at wait for it, and for no other array.
    """
    known: dict[int, Future[str]] = {}

    def encoded(image: Images) -> str:
        mine: Future[str] = Future()
        future = known.setdefault(id(image), mine)
        if future is mine:
            try:
                mine.set_result(encode(image))
            except Exception as error:
                mine.set_exception(error)
        return future.result()

    return encoded


def missing_input(template: Template, prompt: Prompt) -> str:
    """What a template needs and a prompt lacks; empty where nothing is."""
    for name in template.placeholders:
        if name == "source" and not prompt.source_images:
            return f"the template {template.name} needs a source image, and the prompt has none"
        if name.startswith(METADATA):
            value = prompt.metadata.get(name.removeprefix(METADATA))
            if not isinstance(value, str | int | float):
                return f"the template {template.name} needs {name}, a text or a number, and the prompt has {value!r}"
    return ""


def content_parts(template: Template, prompt: Prompt, images: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The parts of the user's message in the template's order, texts between images joined.

    Args:
        template: what is asked.
        prompt: fills ``{prompt}`` and ``{metadata.NAME}``; its text is never searched for placeholders.
        images: data URLs by placeholder; of several in one place those from the second on are shown as references.
    """
    parts: list[dict[str, Any]] = []
    for text, placeholder in template.parts:
        if placeholder in images:
            for number, url in enumerate(images[placeholder], start=1):
                if number > 1:
                    _add_text(parts, reference_label(number))
                parts.append({"type": "image_url", "image_url": {"url": url}})
            continue
        _add_text(parts, text if not placeholder else _filled(placeholder, prompt))
    # A part of nothing but space between two images is refused by some servers.
    return [part for part in parts if part["type"] != "text" or part["text"].strip()]


def request_body(model: str, readout: Readout, settings: JudgeSettings, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The body of a chat completion."""
    body: dict[str, Any] = {"model": model, "temperature": settings.temperature}
    if isinstance(readout, RubricReadout):
        body["max_tokens"] = settings.max_tokens or _RUBRIC_TOKENS
        if settings.structured:
            body["response_format"] = response_format(readout)
    elif settings.read == "answer":
        body["max_tokens"] = settings.max_tokens or _ANSWER_TOKENS
    else:
        body |= {"max_tokens": settings.max_tokens or _LABEL_TOKENS, "logprobs": True}
        body["top_logprobs"] = settings.top_logprobs
        if settings.token_ids:
            body["return_tokens_as_token_ids"] = True
    if settings.disable_thinking:
        body["chat_template_kwargs"] = {"enable_thinking": False}
    return {**body, **settings.extra, "messages": [{"role": "user", "content": parts}]}


def _add_text(parts: list[dict[str, Any]], text: str) -> None:
    if parts and parts[-1]["type"] == "text":
        parts[-1]["text"] += text
    else:
        parts.append({"type": "text", "text": text})


def _filled(placeholder: str, prompt: Prompt) -> str:
    if placeholder == "prompt":
        return prompt.text
    return str(prompt.metadata[placeholder.removeprefix(METADATA)])
