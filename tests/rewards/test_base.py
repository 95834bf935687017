"""The reward contract: what score accepts and refuses, and which breach check_reward finds."""

import asyncio
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.base import Images, Prompt, Reward, Scores, check_reward, reward_name, score

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


class SometimesMissing:
    """Image 1 has never a reward; image 2 has one on every second call only."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        self.calls += 1
        missing = {"bb", "ccc"} if self.calls % 2 else {"bb"}
        return np.where([prompt.text in missing for prompt in prompts], np.float32(NAN), brightness(images, prompts))


class Drifting:
    """Every call is 0.1 higher."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        self.calls += 1
        return np.asarray(brightness(images, prompts) + 0.1 * self.calls, np.float32)


def painting(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    images[0] = 0
    images[1] = 255
    return np.zeros(len(images), np.float32)


def position(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    return np.arange(len(images), dtype=np.float32)


def above_mean(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    found = brightness(images, prompts)
    return np.asarray(found - found.mean(), np.float32)


def never_available(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    return np.full(len(images), NAN, np.float32)


def one_short(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    return brightness(images, prompts)[1:]


@pytest.mark.parametrize("reward", [brightness, slow_brightness, never_available])
def test_check_passes_what_keeps_the_contract(reward: Reward) -> None:
    before = IMAGES.copy()
    check_reward(reward, IMAGES, PROMPTS)
    np.testing.assert_array_equal(IMAGES, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: painting, "painting: changed the images it was given; work on a copy"),
        (lambda: position, r"position: depends on the order of the batch; .* \(image 0: 0.0 against 3.0\)"),
        (lambda: above_mean, r"above_mean: depends on the size of the batch; .* \(image 0: -16.5 against 0.0\)"),
        (Drifting, "Drifting: gave another answer for the same batch; seed it"),
        (lambda: one_short, r"one_short: expected one number an image, shape \(4,\), got float32 \(3,\)"),
    ],
)
def test_check_names_the_breach(make: Callable[[], Reward], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reward(make(), IMAGES.copy(), PROMPTS)


def test_check_blames_the_image_that_differs_not_one_that_is_never_available() -> None:
    with pytest.raises(ValueError, match=re.escape("another answer for the same batch")) as caught:
        check_reward(SometimesMissing(), IMAGES, PROMPTS)
    assert "(image 2: nan against 23.0)" in str(caught.value)


def test_check_needs_two_images() -> None:
    with pytest.raises(ValueError, match="expected at least two images, got 1"):
        check_reward(brightness, IMAGES[:1], PROMPTS[:1])
