"""Which breach of the contract check_reward finds."""

import asyncio
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.base import Images, Prompt, Reward, RewardTraits, Scores, Unavailable, declare
from rewards.checker import check_reward

PROMPTS = [Prompt(text) for text in ("a", "bb", "ccc", "dddd")]
IMAGES = np.arange(4, dtype=np.uint8).repeat(2 * 2 * 3).reshape(4, 2, 2, 3) * 10
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

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        self.calls += 1
        texts = {"bb", "ccc"} if self.calls % 2 else {"bb"}
        missing = [index for index, prompt in enumerate(prompts) if prompt.text in texts]
        total = brightness(images, prompts)
        total[missing] = NAN
        return Scores(total, reasons=dict.fromkeys(missing, "too long a text"))


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


def scores_of(**components: Callable[[Images], object]) -> Reward:
    """Brightness, with components."""

    def with_parts(images: Images, prompts: Sequence[Prompt]) -> Scores:
        parts = {name: np.asarray(part(images), np.float32) for name, part in components.items()}
        return Scores(brightness(images, prompts), parts)

    return with_parts


@declare(RewardTraits(scope="group"))
def ranked(images: Images, prompts: Sequence[Prompt]) -> Scores:
    """A component that compares a group, and one that is there for some groups only; a group of one has no reward."""
    if len(images) < 2:
        raise Unavailable("a group of one")
    parts = {"size": np.full(len(images), len(images), np.float32)}
    if prompts[0].text == "a":
        parts["only a"] = brightness(images, prompts)
    return Scores(win_rate(images, prompts), parts)


@declare(RewardTraits(batch_size=2, concurrency=3))
def partly_missing(images: Images, prompts: Sequence[Prompt]) -> Scores:
    """A NaN in the total with its reason, one in a component, which needs none; called from threads."""
    missing = [index for index, prompt in enumerate(prompts) if prompt.text == "bb"]
    total, part = brightness(images, prompts), np.full(len(images), NAN, np.float32)
    total[missing] = NAN
    return Scores(total, {"part": part}, dict.fromkeys(missing, "no answer"))


@pytest.mark.parametrize("reward", [brightness, slow_brightness, win_rate, partly_missing])
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


def edits() -> list[Prompt]:
    """Prompts that a reward may spoil."""
    return [
        Prompt(text, (np.ones((2, 2, 3), np.uint8),), {"edits": [{"name": "recolour"}], "box": np.ones(4)}, text)
        for text in ("a", "bb", "ccc", "dddd")
    ]


def blacks_out_sources(prompt: Prompt) -> None:
    prompt.source_images[0][:] = 0


def notes_in_metadata(prompt: Prompt) -> None:
    prompt.metadata["edits"][0]["seen"] = True


def moves_the_box(prompt: Prompt) -> None:
    prompt.metadata["box"][0] = 5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (blacks_out_sources, "changed the source images of prompt ccc it was given; work on a copy"),
        (notes_in_metadata, "changed the metadata of prompt ccc it was given; work on a copy"),
        (moves_the_box, "changed the metadata of prompt ccc it was given; work on a copy"),
    ],
)
@pytest.mark.parametrize("call", [1, 2])
def test_prompts_are_left_as_they_were(spoil: Callable[[Prompt], None], message: str, call: int) -> None:
    calls = 0

    def spoils(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        nonlocal calls
        calls += 1
        if calls == call:
            spoil(prompts[2])
        return brightness(images, prompts)

    with pytest.raises(ValueError, match=f"spoils: {message}"):
        check_reward(spoils, IMAGES, edits())


def test_prompts_that_nobody_changes_pass() -> None:
    check_reward(brightness, IMAGES, edits())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            lambda images: np.arange(len(images)),
            r"depends on the order .* \(component 'part', image 0: 0.0 against 3.0\)",
        ),
        (lambda images: np.full(len(images), len(images)), r"depends on the size .*'part', image 0: 4.0 against 1.0\)"),
        (lambda images: np.random.default_rng().random(len(images)), r"another answer .* \(component 'part', image"),
    ],
)
def test_components_are_compared_like_the_total(part: Callable[[Images], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reward(scores_of(part=part), IMAGES, PROMPTS)
    check_reward(scores_of(part=lambda images: images.mean((1, 2, 3))), IMAGES, PROMPTS)


def test_a_component_that_comes_and_goes_with_the_batch_is_found() -> None:
    def only_for_many(images: Images, prompts: Sequence[Prompt]) -> Scores:
        total = brightness(images, prompts)
        return Scores(total, {"part": total} if len(images) > 1 else {})

    with pytest.raises(ValueError, match=r"depends on the size .* \(component 'part', image 0: 1.0 against nan\)"):
        check_reward(only_for_many, IMAGES, PROMPTS)


def test_components_of_a_group_may_compare_it() -> None:
    check_reward(ranked, IMAGES, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    check_reward(ranked, IMAGES, [PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[1]])


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.int64, np.bool_])
def test_numbers_of_another_kind_than_float32_are_named(kind: type[np.generic]) -> None:
    def total(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.generic]:
        return brightness(images, prompts).astype(kind)

    def component(images: Images, prompts: Sequence[Prompt]) -> Scores:
        found = brightness(images, prompts)
        return Scores(found, {"fine": found, "part": found.astype(kind)})

    name = np.dtype(kind).name
    with pytest.raises(ValueError, match=f"total: expected its total in float32, got {name}; return np.asarray"):
        check_reward(total, IMAGES, PROMPTS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"component: expected its component 'part' in float32, got {name}; return"):
        check_reward(component, IMAGES, PROMPTS)


@pytest.mark.parametrize("reasons", [None, {}, {1: ""}, {0: "another image's"}])
def test_a_missing_reward_has_a_reason(reasons: dict[int, str] | None) -> None:
    def silent(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32] | Scores:
        total = brightness(images, prompts)
        total[[prompt.text == "bb" for prompt in prompts]] = NAN
        return total if reasons is None else Scores(total, reasons=reasons)

    with pytest.raises(ValueError, match=r"silent: gave NaN without a reason for prompt 'bb'; return Scores\(total, "):
        check_reward(silent, IMAGES, PROMPTS)


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
