"""What reward functions of other libraries are given, and how their answers are read, for :mod:`rewards.adapters`."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rewards.base import Images, Prompt, Reward, RewardTraits, Scores, Values, declare, reward_name
from rewards.names import hint
from rewards.wire_json import plain_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Foreign: TypeAlias = Callable[..., Any]
Answer: TypeAlias = Scores | Awaitable[Scores]
Conversion: TypeAlias = Callable[[Images], Any]


def check_callable(fn: Any, *positional: Any, **named: Any) -> str:
    """A function's name for messages, after checking that it takes these arguments.

    Raises:
        ValueError: it does not; the message names its parameters.
    """
    if not callable(fn):
        raise ValueError(f"expected a function, got {type(fn).__name__} {fn!r:.80}")
    inner = fn.func if isinstance(fn, partial) else fn
    # Many libraries' functions are made by others and all called _fn: who made them tells them apart.
    name = str(getattr(inner, "__qualname__", reward_name(inner))).replace(".<locals>", "")
    try:
        signature = inspect.signature(fn)
    except ValueError:  # Some built-in functions have none.
        return name
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        asked = ", ".join([*map(str, positional), *(f"{key}=" for key in named)])
        unknown = [key for key in named if key not in signature.parameters]
        raise ValueError(
            f"{name}: expected a function that can be called as {name}({asked}), got one of {signature}: {error}"
            f"{hint(unknown[0], signature.parameters) if unknown else ''}; bind other arguments with functools.partial"
        ) from error
    return name


def has_parameter(fn: Any, name: str) -> bool:
    """Whether a function names a parameter so; one that takes anything does not."""
    try:
        return name in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # No function, which check_callable says, or a built-in one.
        return False


def as_json(name: str, prompt: Prompt) -> str:
    """A prompt's metadata as JSON; ``name`` is the function's.

    Raises:
        ValueError: JSON cannot hold it; the message leads to the entry.
    """
    return json.dumps(plain_json(prompt.metadata, f"{name}: metadata"))


def named_reward(reward: Any, name: str, traits: RewardTraits) -> Reward:
    """A reward under the name of the function that it calls, with its traits."""
    reward.__name__ = name
    named: Reward = declare(traits)(reward)
    return named


def after(answer: Any, read: Callable[[Any], Scores]) -> Answer:
    """Read an answer now, or once it is there."""
    return _later(answer, read) if inspect.isawaitable(answer) else read(answer)


async def gathered(answers: Sequence[Any]) -> list[Any]:
    """Answers of which some are awaited, all at a time."""
    done = iter(await asyncio.gather(*filter(inspect.isawaitable, answers)))
    return [next(done) if inspect.isawaitable(answer) else answer for answer in answers]


def as_scores(name: str, count: int, scores: Any, components: Mapping[str, Values] | None = None) -> Scores:
    """Scores of one number or None an image, with a reason where there is none."""
    total = as_numbers(name, "scores", scores, count)
    missing = map(int, np.flatnonzero(np.isnan(total)))
    return Scores(total, components or {}, dict.fromkeys(missing, f"{name} gave no score"))


def as_numbers(name: str, what: str, values: Any, count: int) -> Values:
    """A list, an array or a tensor of numbers as float32 [count], None as NaN.

    Raises:
        ValueError: it is something else, or of another length.
    """
    try:
        # Tensors of every type and device have tolist, and so have arrays.
        listed = values if isinstance(values, list | tuple) else values.tolist()
        numbers = [_number(value) for value in listed]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected {what} as {count} numbers, got {values!r:.80} ({error})") from error
    if len(numbers) != count:
        raise ValueError(f"{name}: expected {what} as {count} numbers, one an image, got {len(numbers)}")
    return np.array(numbers, np.float32)


def is_number_per_image(values: Any, count: int) -> bool:
    """Whether a value is a list, an array or a tensor of one number an image."""
    tolist = getattr(values, "tolist", None)
    listed = tolist() if callable(tolist) else values
    return isinstance(listed, list | tuple) and len(listed) == count and all(map(is_number, listed))


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or of NumPy."""
    return isinstance(value, Real)


def column_value(name: str, column: str, prompt: Prompt) -> Any:
    """A prompt's metadata under a key.

    Raises:
        ValueError: the prompt has no such key; the message names those it has.
    """
    if column not in prompt.metadata:
        keys = ", ".join(map(str, prompt.metadata)) or "(none)"
        raise ValueError(
            f"{name}: expected {column!r} in the metadata of prompt {prompt.id or prompt.text!r}, got the keys {keys}"
            f"{hint(column, prompt.metadata)}"
        )
    return prompt.metadata[column]


def texts(prompts: Sequence[Prompt]) -> list[str]:
    """The prompts' texts."""
    return [prompt.text for prompt in prompts]


def metadata_dicts(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The prompts' metadata, a dictionary each that the function may change."""
    return [dict(prompt.metadata) for prompt in prompts]


def as_pil(image: Images) -> Image:
    """An image uint8 [H, W, 3] as a PIL image."""
    from PIL.Image import fromarray

    return fromarray(image)


def as_tensor(images: Images) -> Tensor:
    """Images uint8 [..., H, W, 3] as a tensor uint8 [..., 3, H, W]."""
    import torch

    return torch.from_numpy(images.copy()).movedim(-1, -3).contiguous()


def as_float_tensor(images: Images) -> Tensor:
    """Images uint8 [..., H, W, 3] as a tensor float32 [..., 3, H, W] in [0, 1]."""
    return as_tensor(images).float() / 255


def chosen_from(argument: str, value: str, choices: Mapping[str, Conversion]) -> Conversion:
    """What a name stands for.

    Raises:
        ValueError: the name stands for nothing; the message gives those that do.
    """
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}{hint(value, choices)}")
    return choices[value]


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise TypeError(f"{value!r} is text")
    if value is None:
        return np.nan
    item = getattr(value, "item", None)  # A tensor with a gradient is read by this without a warning.
    return float(item() if callable(item) else value)


async def _later(answer: Awaitable[Any], read: Callable[[Any], Scores]) -> Scores:
    return read(await answer)
