"""Calling a reward: in batches or group by group, plain or asynchronous, with what comes back checked."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeVar

import numpy as np

from rewards.background import same_device, shared_loop
from rewards.base import Images, Prompt, Reward, RewardTraits, Scores, Unavailable, Values, reward_name, reward_traits

T = TypeVar("T")
Call: TypeAlias = tuple[Images, Sequence[Prompt]]

# How many calls of a reward may run at a time, by its id, for everything that one scoring sets off: a reward within
# another is bounded over all calls of the outer one. The reward itself is kept with it, so that its id stays its own.
# A semaphore belongs to one loop, so there is one a loop.
_Gates: TypeAlias = dict[tuple[int, int], tuple[Reward, asyncio.Semaphore]]
_GATES: ContextVar[_Gates | None] = ContextVar("_GATES", default=None)
# Set within a scoring that the shared loop itself waits for: what is asynchronous in it cannot run there.
_IN_PLACE: ContextVar[bool] = ContextVar("_IN_PLACE", default=False)


def score(reward: Reward, images: Images, prompts: Sequence[Prompt]) -> Scores:
    """Call a reward as its traits ask, wait for it where it is asynchronous, and check what comes back.

    A group is a run of entries that share their :class:`Prompt` object. Asynchronous rewards all run in one event loop,
    in a thread of its own that lasts as long as the process: a connection, a lock or a queue that a reward keeps from
    one call to the next works on, in a notebook too. A plain function runs in this thread, or in several threads where
    its traits allow several calls at once.

    Returns:
        Scores with a reason for every NaN of the total. Where calls differ in their components, what a call lacks is
        NaN.

    Raises:
        ValueError: images, prompts or the reward's answer have the wrong shape or type; the message names both.
    """
    calls = _calls(reward, images, prompts)
    # A plain function that is called once needs no event loop.
    first = _answer(reward, *calls[0]) if len(calls) == 1 else None
    if first is None:
        answers = _finish(_answers(reward, calls, in_threads=reward_traits(reward).concurrency > 1))
    else:
        answers = [_finish(_wait(first)) if inspect.isawaitable(first) else first]
    return _collected(reward, calls, answers)


async def score_async(reward: Reward, images: Images, prompts: Sequence[Prompt]) -> Scores:
    """:func:`score` for coroutines, such as a reward that is made of others; plain functions run in threads.

    A reward's ``concurrency`` bounds its calls over all that are awaited within one :func:`score`, at whatever depth.
    """
    calls = _calls(reward, images, prompts)
    gates = _GATES.get()
    token = _GATES.set({} if gates is None else gates)
    try:
        answers = await _answers(reward, calls, in_threads=True)
    finally:
        _GATES.reset(token)
    return _collected(reward, calls, answers)


def call_spans(traits: RewardTraits, prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Where each call's images start and stop."""
    count = len(prompts)
    if traits.scope == "group":
        starts = [i for i in range(count) if i == 0 or prompts[i] is not prompts[i - 1]]
    else:
        starts = list(range(0, count, traits.batch_size or max(count, 1)))
    return list(zip(starts, [*starts[1:], count], strict=True)) if starts else [(0, 0)]


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive calls as one; a component that a call lacks is NaN there."""
    if len(parts) == 1:
        return parts[0]
    names = list(dict.fromkeys(name for part in parts for name in part.components))
    absent = [np.full(len(part.total), np.nan, np.float32) for part in parts]
    starts = np.cumsum([0, *(len(part.total) for part in parts)]).tolist()
    return Scores(
        np.concatenate([part.total for part in parts]),
        {
            name: np.concatenate([p.components.get(name, a) for p, a in zip(parts, absent, strict=True)])
            for name in names
        },
        {start + i: why for part, start in zip(parts, starts, strict=False) for i, why in part.reasons.items()},
    )


def _calls(reward: Reward, images: Images, prompts: Sequence[Prompt]) -> list[Call]:
    name = reward_name(reward)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{name}: expected images uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}")
    if len(prompts) != len(images):
        raise ValueError(f"{name}: expected one prompt an image, got {len(prompts)} prompts for {len(images)} images")
    return [(images[start:stop], prompts[start:stop]) for start, stop in call_spans(reward_traits(reward), prompts)]


async def _answers(reward: Reward, calls: Sequence[Call], in_threads: bool) -> list[Values | Scores]:
    gate = asyncio.Semaphore(reward_traits(reward).concurrency)
    gates = _GATES.get()
    if gates is not None:
        _, gate = gates.setdefault((id(reward), id(asyncio.get_running_loop())), (reward, gate))

    use_device = same_device()

    async def one(images: Images, prompts: Sequence[Prompt]) -> Values | Scores:
        async with gate:
            if not in_threads:
                return await _wait(_answer(reward, images, prompts))
            return await _wait(await asyncio.to_thread(_answer_there, use_device, reward, (images, prompts)))

    return list(await asyncio.gather(*(one(*call) for call in calls)))


def _answer_there(use_device: Callable[[], None], reward: Reward, call: Call) -> Any:
    use_device()
    return _answer(reward, *call)


def _answer(reward: Reward, images: Images, prompts: Sequence[Prompt]) -> Values | Scores | Awaitable[Values | Scores]:
    try:
        answer = reward(images, prompts)
    except Unavailable as missing:
        return _unavailable(len(images), missing)
    return _guarded(answer, len(images)) if inspect.isawaitable(answer) else answer


async def _guarded(answer: Awaitable[Values | Scores], count: int) -> Values | Scores:
    try:
        return await answer
    except Unavailable as missing:
        return _unavailable(count, missing)


def _unavailable(count: int, missing: Unavailable) -> Scores:
    return Scores(np.full(count, np.nan, np.float32), {}, dict.fromkeys(range(count), str(missing)))


async def _wait(answer: Values | Scores | Awaitable[Values | Scores]) -> Values | Scores:
    if not inspect.isawaitable(answer):
        return answer
    loop = shared_loop()
    # A future belongs to the loop that it was made in.
    if loop.is_current or _IN_PLACE.get() or isinstance(answer, asyncio.Future):
        return await answer
    return await asyncio.wrap_future(loop.submit(_awaited(answer, same_device())))


async def _awaited(answer: Awaitable[T], use_device: Callable[[], None]) -> T:
    use_device()
    return await answer


def _finish(answers: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_alone(answers, in_place=_IN_PLACE.get()))
    # A loop cannot be run within a running one, and a thread has its own.
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(_run_there, same_device(), _alone(answers, in_place=shared_loop().is_current)).result()


def _run_there(use_device: Callable[[], None], work: Coroutine[Any, Any, T]) -> T:
    use_device()
    return asyncio.run(work)


async def _alone(answers: Coroutine[Any, Any, T], in_place: bool) -> T:
    # Calls are counted anew for every scoring, one that a reward asks for included.
    _GATES.set({})
    _IN_PLACE.set(in_place)
    return await answers


def _collected(reward: Reward, calls: Sequence[Call], answers: Sequence[Values | Scores]) -> Scores:
    name = reward_name(reward)
    return join_scores(
        [_checked_scores(name, answer, len(images)) for answer, (images, _) in zip(answers, calls, strict=True)]
    )


def _checked_scores(name: str, answer: Values | Scores, count: int) -> Scores:
    scores = answer if isinstance(answer, Scores) else Scores(answer)
    components = {key: _checked(f"{name}, component {key!r}", v, count) for key, v in scores.components.items()}
    total = _checked(name, scores.total, count)
    missing = dict.fromkeys(map(int, np.flatnonzero(np.isnan(total))), f"{name} gave NaN without a reason")
    return Scores(total, components, {**missing, **scores.reasons})


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
