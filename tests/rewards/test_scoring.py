"""How rewards are called: what score accepts and refuses, batches, groups, threads, and what is not available."""

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.base import Images, Prompt, Reward, RewardTraits, Scores, Unavailable, declare, reward_name
from rewards.scoring import score, score_async

PROMPTS = [Prompt(text) for text in ("a", "bb", "ccc", "dddd")]
IMAGES = np.arange(4, dtype=np.uint8).repeat(2 * 2 * 3).reshape(4, 2, 2, 3) * 10
EXPECTED = [1.0, 12.0, 23.0, 34.0]
NAN = float("nan")


def brightness(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """Mean pixel plus the text's length."""
    lengths = [len(prompt.text) for prompt in prompts]
    return np.asarray(images.mean((1, 2, 3)) + lengths, np.float32)


async def slow_brightness(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    await asyncio.sleep(0)
    return brightness(images, prompts)


class Judge:
    """A reward with components and reasons, as an object."""

    async def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        await asyncio.sleep(0)
        total = brightness(images, prompts)
        total[1] = NAN
        return Scores(total, {"light": images.mean((1, 2, 3))}, {1: "no answer"})


def returns(values: object) -> Reward:
    def constant(images: Images, prompts: Sequence[Prompt]) -> Any:
        return values

    return constant


@pytest.mark.parametrize("reward", [brightness, slow_brightness])
def test_plain_and_asynchronous_functions(reward: Reward) -> None:
    found = score(reward, IMAGES, PROMPTS)
    assert found.total.dtype == np.float32
    assert found.total.tolist() == EXPECTED
    assert (found.components, found.reasons) == ({}, {})


def test_scores_keep_components_and_reasons() -> None:
    found = score(Judge(), IMAGES, PROMPTS)
    np.testing.assert_array_equal(found.total, np.array([1, NAN, 23, 34], np.float32))
    assert found.components["light"].dtype == np.float32
    assert found.components["light"].tolist() == [0, 10, 20, 30]
    assert found.reasons == {1: "no answer"}


@pytest.mark.parametrize("reward", [brightness, slow_brightness])
def test_within_a_running_event_loop(reward: Reward) -> None:
    """As in a notebook, whose cells run in one."""

    async def cell() -> list[float]:
        found: list[float] = score(reward, IMAGES, PROMPTS).total.tolist()
        return found

    assert asyncio.run(cell()) == EXPECTED


def test_an_error_within_a_running_event_loop_is_the_reward_s_own() -> None:
    async def fails(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        raise LookupError("no such judge")

    async def cell() -> None:
        score(fails, IMAGES, PROMPTS)

    before = threading.active_count()
    with pytest.raises(LookupError, match="no such judge"):
        asyncio.run(cell())
    assert threading.active_count() == before


@pytest.mark.parametrize("values", [[1, 0, 1, 0], [True, False, True, False], np.array([1, 0, 1, 0], np.uint8)])
def test_numbers_of_every_kind_become_float32(values: object) -> None:
    found = score(returns(values), IMAGES, PROMPTS).total
    assert found.dtype == np.float32
    assert found.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], r"shape \(4,\), got float64 \(2,\)"),
        (np.zeros((4, 1), np.float32), r"shape \(4,\), got float32 \(4, 1\)"),
        (3.0, r"shape \(4,\), got float64 \(\)"),
        (["a", "b", "c", "d"], "expected one number an image"),
        ([1.0, None, 2.0, 3.0], "expected one number an image, .* got object .* with NaN for what is not available"),
        (np.zeros(4, np.complex64), "got complex64"),
        (None, "expected one number an image"),
        ([0.0, 1.0, np.inf, 2.0], "infinite reward for image 2; return NaN"),
        ([0.0, -np.inf, 1.0, 2.0], "infinite reward for image 1; return NaN"),
        (
            Scores(np.zeros(4, np.float32), {"part": np.zeros(3, np.float32)}),
            r"component 'part': .* got float32 \(3,\)",
        ),
        (Scores(np.zeros(4, np.float32), {"part": np.full(4, np.inf)}), "component 'part': got an infinite reward"),
    ],
)
def test_a_wrong_answer_is_named(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        score(returns(values), IMAGES, PROMPTS)
    assert str(caught.value).startswith("constant")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.astype(np.float32), r"expected images uint8 \[B, H, W, 3\], got float32 \[4, 2, 2, 3\]"),
        (IMAGES[0], r"got uint8 \[2, 2, 3\]"),
        (IMAGES.transpose(0, 3, 1, 2), r"got uint8 \[4, 3, 2, 2\]"),
        (IMAGES[:3], "expected one prompt an image, got 4 prompts for 3 images"),
    ],
)
def test_wrong_inputs_are_named_before_the_reward_is_called(images: Images, message: str) -> None:
    def never(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        score(never, images, PROMPTS)


def test_names() -> None:
    assert reward_name(brightness) == "brightness"
    assert reward_name(Judge()) == "Judge"


@pytest.mark.parametrize(("batch_size", "sizes"), [(None, [4]), (1, [1, 1, 1, 1]), (3, [3, 1]), (4, [4]), (9, [4])])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_batches_as_declared_and_the_same_rewards(batch_size: int | None, sizes: list[int], concurrency: int) -> None:
    seen: list[int] = []

    @declare(RewardTraits(batch_size=batch_size, concurrency=concurrency))
    def counting(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        seen.append(len(images))
        return brightness(images, prompts)

    assert score(counting, IMAGES, PROMPTS).total.tolist() == EXPECTED
    assert sorted(seen, reverse=True) == sizes


@pytest.mark.parametrize("is_async", [False, True])
def test_no_more_calls_at_a_time_than_declared_and_as_many(is_async: bool) -> None:
    running, most = 0, 0
    barrier = threading.Barrier(2)

    @declare(RewardTraits(batch_size=1, concurrency=2))
    def plain(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        barrier.wait(timeout=5)  # Passes only while another call is running.
        return brightness(images, prompts)

    @declare(RewardTraits(batch_size=1, concurrency=2))
    async def asynchronous(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return brightness(images, prompts)

    reward: Reward = asynchronous if is_async else plain
    assert score(reward, IMAGES, PROMPTS).total.tolist() == EXPECTED
    assert most == (2 if is_async else 0)


def test_a_group_is_called_whole_and_alone() -> None:
    seen: list[list[str]] = []

    @declare(RewardTraits(scope="group", batch_size=1))
    def rank(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        seen.append([prompt.text for prompt in prompts])
        return np.asarray(images.mean((1, 2, 3)).argsort().argsort(), np.float32)

    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    assert score(rank, IMAGES[::-1].copy(), prompts).total.tolist() == [2, 1, 0, 0]
    assert seen == [["a", "a", "a"], ["bb"]]


def test_two_prompts_that_are_equal_are_two_groups() -> None:
    @declare(RewardTraits(scope="group"))
    def size(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        return np.full(len(images), len(images), np.float32)

    assert score(size, IMAGES, [Prompt("a"), Prompt("a"), PROMPTS[0], PROMPTS[0]]).total.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("is_async", [False, True])
def test_an_unavailable_call_masks_its_own_images_and_says_why(is_async: bool) -> None:
    @declare(RewardTraits(batch_size=2))
    def plain(images: Images, prompts: Sequence[Prompt]) -> Scores:
        if prompts[0].text == "ccc":
            raise Unavailable("the judge is down")
        return Scores(brightness(images, prompts), {"light": images.mean((1, 2, 3))})

    @declare(RewardTraits(batch_size=2))
    async def asynchronous(images: Images, prompts: Sequence[Prompt]) -> Scores:
        await asyncio.sleep(0)
        return plain(images, prompts)

    found = score(asynchronous if is_async else plain, IMAGES, PROMPTS)
    np.testing.assert_array_equal(found.total, np.array([1, 12, NAN, NAN], np.float32))
    np.testing.assert_array_equal(found.components["light"], np.array([0, 10, NAN, NAN], np.float32))
    assert found.reasons == {2: "the judge is down", 3: "the judge is down"}


def test_every_missing_reward_has_a_reason() -> None:
    found = score(returns([1.0, NAN, 2.0, 3.0]), IMAGES, PROMPTS)
    assert found.reasons == {1: "constant gave NaN without a reason"}


def test_an_error_of_one_call_is_the_batch_s() -> None:
    @declare(RewardTraits(batch_size=1, concurrency=4))
    def fails(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        if prompts[0].text == "bb":
            raise LookupError("a defect is not a missing answer")
        return brightness(images, prompts)

    with pytest.raises(LookupError, match="a defect"):
        score(fails, IMAGES, PROMPTS)


def test_an_empty_batch_has_no_rewards() -> None:
    assert score(brightness, IMAGES[:0], []).total.tolist() == []


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"scope": "batch"}, "expected 'sample' or 'group', got 'batch'"),
        ({"batch_size": 0}, "1 or more"),
        ({"concurrency": 0}, "1 or more"),
    ],
)
def test_traits_that_cannot_be_are_refused(traits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardTraits(**traits)


class Queued:
    """As scorers with a model have it: a queue, and one task that answers it, both made with the first call."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[Images, Sequence[Prompt], asyncio.Future[Any]]] | None = None

    async def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Any:
        if self.queue is None:
            self.queue = asyncio.Queue()
            self.worker = asyncio.create_task(self._work(self.queue))
        answer = asyncio.get_running_loop().create_future()
        await self.queue.put((images, prompts, answer))
        return await asyncio.wait_for(answer, 10)

    async def _work(self, queue: "asyncio.Queue[Any]") -> None:
        while True:
            images, prompts, answer = await queue.get()
            answer.set_result(brightness(images, prompts))


def _in_a_notebook(reward: Reward) -> list[float]:
    async def cell() -> Scores:
        return score(reward, IMAGES, PROMPTS)

    return asyncio.run(cell()).total.tolist()


def _awaited(reward: Reward) -> list[float]:
    return asyncio.run(score_async(reward, IMAGES, PROMPTS)).total.tolist()


def _in_a_thread(reward: Reward) -> list[float]:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(score, reward, IMAGES, PROMPTS).result().total.tolist()


def test_what_a_reward_keeps_of_asyncio_works_in_the_next_call_wherever_it_comes_from() -> None:
    reward = Queued()
    for _ in range(2):
        assert score(reward, IMAGES, PROMPTS).total.tolist() == EXPECTED
        for call in (_in_a_notebook, _awaited, _in_a_thread):
            assert call(reward) == EXPECTED


def test_asynchronous_rewards_within_others_wherever_those_run() -> None:
    inner = Queued()

    async def blocking(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        # A scoring that is waited for in the loop that asynchronous rewards run in: it must not need that loop.
        return score(slow_brightness, images, prompts).total

    async def awaiting(images: Images, prompts: Sequence[Prompt]) -> Scores:
        return await score_async(inner, images, prompts)

    def plain(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        return score(awaiting, images, prompts).total

    for outer in (blocking, awaiting, plain, declare(RewardTraits(batch_size=1, concurrency=4))(plain)):
        assert score(outer, IMAGES, PROMPTS).total.tolist() == EXPECTED


def test_an_asynchronous_reward_works_in_a_forked_process() -> None:
    assert score(slow_brightness, IMAGES, PROMPTS).total.tolist() == EXPECTED
    child = os.fork()
    if child == 0:
        ok = score(slow_brightness, IMAGES, PROMPTS).total.tolist() == EXPECTED
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


class ManyGPUs(threading.local):
    """torch.cuda as a process with several GPUs has it: the current device is a thread's own and 0 at the start."""

    current = 0

    def set_device(self, index: int) -> None:
        self.current = index

    def current_device(self) -> int:
        return self.current

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_reward_is_on_the_gpu_of_whoever_asks(is_async: bool, concurrency: int, monkeypatch: Any) -> None:
    cuda = ManyGPUs()
    monkeypatch.setattr("torch.cuda", cuda)
    cuda.set_device(3)
    used: list[int] = []

    def look(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        used.append(cuda.current_device())
        return brightness(images, prompts)

    async def look_later(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        return look(images, prompts)

    traits = declare(RewardTraits(batch_size=2, concurrency=concurrency))
    reward = traits(look_later if is_async else look)
    score(reward, IMAGES, PROMPTS)
    _in_a_notebook(reward)
    assert used == [3] * 4
    # The shared thread keeps what it was told last, so it is told anew each time.
    cuda.set_device(0)
    score(reward, IMAGES, PROMPTS)
    assert used[4:] == [0] * 2
