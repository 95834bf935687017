"""Which breach of the contract check_reward finds."""

import asyncio
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.base import Images, Prompt, Reward, RewardTraits, declare
from rewards.checker import check_reward

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


@declare(RewardTraits(scope="group"))
def win_rate(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """Share of the group that is darker."""
    light = images.mean((1, 2, 3))
    return np.asarray((light[:, None] > light).mean(1), np.float32)


def never_available(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    return np.full(len(images), NAN, np.float32)


def one_short(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    return brightness(images, prompts)[1:]


@pytest.mark.parametrize("reward", [brightness, slow_brightness, win_rate])
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
        (lambda: never_available, "no reward for any of the images .*check it on some that it can judge"),
        (lambda: one_short, r"one_short: expected one number an image, shape \(4,\), got float32 \(3,\)"),
    ],
)
def test_check_names_the_breach(make: Callable[[], Reward], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reward(make(), IMAGES.copy(), PROMPTS)


def test_a_group_may_be_compared_with_itself_and_not_with_the_others() -> None:
    pairs = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    check_reward(win_rate, IMAGES, pairs)
    with pytest.raises(ValueError, match="depends on the size of the batch; score every image by itself"):
        check_reward(above_mean, IMAGES, pairs)


def test_check_blames_the_image_that_differs_not_one_that_is_never_available() -> None:
    with pytest.raises(ValueError, match=re.escape("another answer for the same batch")) as caught:
        check_reward(SometimesMissing(), IMAGES, PROMPTS)
    assert "(image 2: nan against 23.0)" in str(caught.value)


def test_check_needs_two_images() -> None:
    with pytest.raises(ValueError, match="expected at least two images, got 1"):
        check_reward(brightness, IMAGES[:1], PROMPTS[:1])
