"""The reward contract: any callable from images and prompts to one number an image, NaN where it is not available."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """One thing that is asked for.

    Attributes:
        text: a prompt, or an edit instruction; any Unicode.
        source_images: the images to edit, uint8 [H, W, 3] each; empty for text-to-image.
        metadata: what a reward may need to know (GenEval's clauses, an edit's operations, ...); JSON-like.
        id: a name that is stable across runs, for seeds, caches and reports.
        group: a label of its owner's, kept by prompt files and through the turns of an edit. Nothing is computed from
            it: the samples drawn of one entry of a batch are compared with each other, whatever it says.
    """

    text: str
    source_images: tuple[Images, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    group: str = ""


@dataclass(frozen=True)
class Scores:
    """What a reward may return in place of a plain array.

    Attributes:
        total: the reward of each image, float32 [B]; NaN means not available.
        components: named parts of it, each float32 [B]; logged, not summed.
        reasons: why an image has no reward, by its index.
    """

    total: Values
    components: Mapping[str, Values] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)


class Reward(Protocol):
    """Any callable of this shape is a reward; it may be a coroutine function.

    Images are uint8 [B, H, W, 3]; one prompt an image. A failed judgement is NaN: the sample is masked, counted and
    logged, and never scored 0, at random or in the middle of the scale.
    """

    def __call__(self, images: Images, prompts: Sequence[Prompt], /) -> Values | Scores | Awaitable[Values | Scores]:
        """Score images."""
        ...


def score(reward: Reward, images: Images, prompts: Sequence[Prompt]) -> Scores:
    """Call a reward, wait for it where it is asynchronous, and check what comes back.

    An asynchronous reward works in a notebook too: where this thread runs an event loop already, the coroutine runs in
    another thread, in a loop of its own.

    Raises:
        ValueError: images, prompts or the reward's answer have the wrong shape or type; the message names both.
    """
    name = reward_name(reward)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{name}: expected images uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}")
    if len(prompts) != len(images):
        raise ValueError(f"{name}: expected one prompt an image, got {len(prompts)} prompts for {len(images)} images")
    answer = reward(images, prompts)
    if inspect.isawaitable(answer):
        answer = _finish(_wait(answer))
    scores = answer if isinstance(answer, Scores) else Scores(answer)
    components = {key: _checked(f"{name}, component {key!r}", v, len(images)) for key, v in scores.components.items()}
    return Scores(_checked(name, scores.total, len(images)), components, scores.reasons)


async def _wait(answer: Awaitable[Values | Scores]) -> Values | Scores:
    return await answer


def _finish(answer: Coroutine[Any, Any, Values | Scores]) -> Values | Scores:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(answer)
    # A loop cannot be run within a running one, and a thread has its own.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, answer).result()


def _checked(name: str, values: object, count: int) -> Values:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or array.shape != (count,):
        raise ValueError(
            f"{name}: expected one number an image, shape ({count},), got {array.dtype} {array.shape}; "
            "return a float32 array, with NaN for what is not available"
        )
    array = array.astype(np.float32)
    if np.isinf(array).any():
        raise ValueError(
            f"{name}: got an infinite reward for image {int(np.isinf(array).argmax())}; return NaN instead"
        )
    return array


def reward_name(reward: Reward) -> str:
    """A reward's name for messages and metrics: its function's or its class's name."""
    name = getattr(reward, "__name__", None)
    return name if isinstance(name, str) else type(reward).__name__


def check_reward(reward: Reward, images: Images, prompts: Sequence[Prompt]) -> None:
    """Check that a callable keeps the reward contract on a batch of at least two samples.

    Shape and dtype (by :func:`score`), the inputs left as they were, the same answer twice, and no dependence on the
    order of the batch or on its size.

    Raises:
        ValueError: a property does not hold; the message says which and what to mend.
    """
    if len(images) < 2:
        raise ValueError(f"check_reward: expected at least two images, got {len(images)}")
    name, before = reward_name(reward), images.copy()
    first = score(reward, images, prompts).total
    if not np.array_equal(images, before):
        raise ValueError(f"{name}: changed the images it was given; work on a copy")
    checks = {
        "gave another answer for the same batch; seed it or lower its temperature": score(
            reward, images, prompts
        ).total,
        "depends on the order of the batch; score every image by itself": score(
            reward, images[::-1].copy(), list(prompts)[::-1]
        ).total[::-1],
        "depends on the size of the batch; score every image by itself": np.concatenate(
            [score(reward, images[i : i + 1], prompts[i : i + 1]).total for i in range(len(images))]
        ),
    }
    for message, values in checks.items():
        agree = np.isclose(first, values, rtol=1e-4, atol=1e-5, equal_nan=True)
        if not agree.all():
            # A difference that is NaN is of a reward that is there once only.
            differences = np.nan_to_num(np.abs(first - values), nan=np.inf)
            worst = int(np.where(agree, -1, differences).argmax())
            raise ValueError(f"{name}: {message} (image {worst}: {first[worst]} against {values[worst]})")
