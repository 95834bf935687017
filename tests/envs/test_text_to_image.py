import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import SyncVectorEnv

from envs.prompts import FixedPool
from envs.scenes.grammar import scene_for
from envs.scenes.render import render
from envs.scenes.suite import t2i_prompts
from envs.text_to_image import TextToImageEnv, TextToImageVectorEnv
from rewards.base import Images, Prompt, Scores
from rewards.pixel import redness

EDGES = ("", "👩‍🚀 🇪🇺 🕵️", "שלום ‮abc‬ عربى", "long " * 5000, "line\nbreak\ttab\x00nul")


def partly_missing(images: Images, prompts: Sequence[Prompt]) -> Scores:
    """NaN for the prompts whose text is longer than one letter."""
    total = np.array([np.nan if len(prompt.text) > 1 else 0.5 for prompt in prompts], np.float32)
    missing = {index: "too long" for index in np.flatnonzero(np.isnan(total)).tolist()}
    return Scores(total, {"length": np.array([len(p.text) for p in prompts], np.float32)}, missing)


def blank(count: int, size: tuple[int, int] = (48, 48)) -> Images:
    return np.zeros((count, *size, 3), np.uint8)


def test_an_episode_by_hand() -> None:
    env = TextToImageVectorEnv(3, partly_missing, FixedPool([Prompt("x")]), (4, 6))
    prompts = [Prompt("a", id="p0"), Prompt("bb", id="p1"), Prompt("", id="p2")]
    observation, infos = env.reset(options={"prompts": prompts})
    assert observation == {"prompt": ("a", "bb", "")}
    assert observation in env.observation_space
    assert infos["prompt_ids"].tolist() == ["p0", "p1", "p2"]
    observation, rewards, terminations, truncations, infos = env.step(blank(3, (4, 6)))
    assert observation == {"prompt": ("a", "bb", "")}
    assert rewards.dtype == np.float64
    np.testing.assert_array_equal(rewards, [0.5, np.nan, 0.5])
    assert terminations.tolist() == [True] * 3
    assert truncations.tolist() == [False] * 3
    assert infos["reward_available"].tolist() == [True, False, True]
    assert infos["components"]["length"].dtype == np.float32
    assert infos["components"]["length"].tolist() == [1, 2, 0]
    assert infos["reasons"] == {1: "too long"}
    assert infos["prompt_ids"].tolist() == ["p0", "p1", "p2"]


def test_a_right_picture_earns_one_and_a_blank_one_less() -> None:
    prompts = t2i_prompts("held_out", 12, 0)
    env = gymnasium.make_vec("pdtr/TextToImage-v0", num_envs=12)
    rng = np.random.default_rng(0)
    env.reset(options={"prompts": prompts})
    _, right, _, _, infos = env.step(render([scene_for(rng, prompt.metadata) for prompt in prompts]))
    assert (right > 0.9).all()
    assert infos["components"]["strict"].tolist() == [1.0] * 12
    env.reset(options={"prompts": prompts})
    _, wrong, *_ = env.step(blank(12))
    assert (wrong < 0.5).all()


def test_the_single_environment_is_the_vector_of_one() -> None:
    env, vector = TextToImageEnv(), TextToImageVectorEnv(1)
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    for prompt in t2i_prompts("train", 6, 0):
        observation, info = env.reset(options={"prompts": [prompt]})
        assert observation == {"prompt": prompt.text}
        assert info == {"prompt_id": prompt.id}
        _, reward, terminated, truncated, info = env.step(image)
        vector.reset(options={"prompts": [prompt]})
        _, rewards, *_ = vector.step(image[None])
        assert (reward, terminated, truncated) == (rewards[0], True, False)
        assert type(reward) is float
        assert info["reward_available"] is True
        assert set(info["components"]) == {"strict", "official"}


def test_a_missing_reward_of_the_single_environment() -> None:
    env = TextToImageEnv(partly_missing, FixedPool([Prompt("bb")]))
    env.reset()
    _, reward, _, _, info = env.step(blank(1)[0])
    assert math.isnan(reward)
    assert (info["reward_available"], info["reason"]) == (False, "too long")


def test_prompts_are_drawn_by_the_seed() -> None:
    env, other = TextToImageVectorEnv(5), TextToImageVectorEnv(5)
    first = [env.reset(seed=3)[0], env.reset()[0]]
    assert first == [other.reset(seed=3)[0], other.reset()[0]]
    assert first[0] != first[1]
    assert env.reset(seed=4)[0] != first[0]


def test_two_instances_share_nothing() -> None:
    """One environment may be scored in a thread while the other is reset."""
    pool = FixedPool([Prompt(letter, id=letter) for letter in "abcdef"])
    one, two = (TextToImageVectorEnv(2, partly_missing, pool) for _ in range(2))
    observation, _ = one.reset(seed=0)
    two.reset(seed=1)
    two.step(blank(2))
    assert one.step(blank(2))[0] == observation


def test_the_action_may_be_overwritten_after_the_step() -> None:
    env = TextToImageVectorEnv(1, redness, FixedPool([Prompt("a")]), render_mode="rgb_array")
    env.reset()
    images = blank(1)
    env.step(images)
    images[:] = 255
    (frame,) = env.render() or ()
    assert not frame.any()


@pytest.mark.parametrize("text", EDGES)
def test_any_prompt(text: str) -> None:
    env = gymnasium.make("pdtr/TextToImage-v0", reward=redness)
    observation, _ = env.reset(options={"prompts": [Prompt(text)]})
    assert observation["prompt"] == text
    assert observation in env.observation_space
    env.step(blank(1)[0])


def test_an_asynchronous_reward() -> None:
    async def judge(images: Images, prompts: Sequence[Prompt]) -> Any:
        return np.full(len(images), 0.25, np.float32)

    env = TextToImageVectorEnv(2, judge, FixedPool([Prompt("a")]))
    env.reset()
    assert env.step(blank(2))[1].tolist() == [0.25, 0.25]


def test_a_reward_that_raises_can_be_tried_again() -> None:
    calls = []

    def flaky(images: Images, prompts: Sequence[Prompt]) -> Any:
        calls.append(len(images))
        if len(calls) == 1:
            raise ConnectionError("judge is down")
        return np.ones(len(images), np.float32)

    env = TextToImageVectorEnv(1, flaky, FixedPool([Prompt("a")]))
    env.reset()
    with pytest.raises(ConnectionError, match="judge is down"):
        env.step(blank(1))
    assert env.step(blank(1))[1].tolist() == [1.0]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (blank(2).astype(np.float32), r"expected uint8 \[2, 48, 48, 3\], got float32 \[2, 48, 48, 3\]"),
        (blank(3), r"got uint8 \[3, 48, 48, 3\]"),
        (blank(2, (48, 47)), r"got uint8 \[2, 48, 47, 3\]"),
        (blank(2)[..., 0], r"got uint8 \[2, 48, 48\]"),
        (list(blank(2)), "got list"),
    ],
)
def test_bad_actions(action: Any, message: str) -> None:
    env = TextToImageVectorEnv(2, redness)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promts": []}, "expected prompts, got 'promts'; did you mean 'prompts'"),
        ({"prompts": [Prompt("a")]}, "expected a sequence of num_envs=2 prompts, got 1"),
        ({"prompts": 3}, "got int"),
        ({"prompts": ["a", "b"]}, r"prompts\[0\]: expected a rewards.base.Prompt, got str"),
        ({"prompts": [Prompt("a"), Prompt("a" * 70_000)]}, r"prompts\[1\].text: expected a text of at most 65536"),
        ({"prompts": [Prompt("a"), Prompt("\ud800")]}, "lone surrogate"),
        ({"prompts": [Prompt("a", (blank(1)[0],))] * 2}, "use pdtr/ImageEditing-v0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextToImageVectorEnv(2).reset(options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs: expected an integer of at least 1, got 0"),
        ({"image_size": 48}, r"image_size: expected \(height, width\), got 48"),
        ({"image_size": (48, 0)}, r"image_size\[1\]"),
        ({"reward": 3}, "reward: expected a callable"),
        ({"prompts": ["a"]}, "wrap a list in envs.prompts.FixedPool"),
        ({"render_mode": "rgb"}, "did you mean 'rgb_array'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextToImageVectorEnv(**arguments)


def test_order_of_calls() -> None:
    env = TextToImageVectorEnv(1, render_mode="rgb_array")
    for call in (lambda: env.step(blank(1)), env.render):
        with pytest.raises(ResetNeeded, match="call reset first"):
            call()
    env.reset()
    with pytest.raises(ValueError, match="promts"):
        env.reset(options={"promts": []})
    with pytest.raises(ResetNeeded):
        env.step(blank(1))


def test_frames() -> None:
    env = TextToImageVectorEnv(2, redness, render_mode="rgb_array")
    env.reset(seed=0)
    assert np.array(env.render()).tolist() == np.full((2, 48, 48, 3), 255).tolist()
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    env.step(images)
    np.testing.assert_array_equal(np.array(env.render()), images)
    assert TextToImageVectorEnv(1).render() is None


def test_a_window_without_a_display_shows_nothing_and_fails_at_nothing() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import gymnasium, numpy, envs\n"
        "env = gymnasium.make('pdtr/TextToImage-v0', render_mode='human')\n"
        "env.reset(seed=0); env.step(numpy.zeros((48, 48, 3), numpy.uint8))\n"
        "print(env.render()); env.close(); env.close()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    )
    assert (result.returncode, result.stdout) == (0, "None\n"), result.stderr


def test_gymnasiums_own_vectorisation_works_too() -> None:
    env = gymnasium.make_vec("pdtr/TextToImage-v0", num_envs=2, vectorization_mode="sync")
    assert isinstance(env, SyncVectorEnv)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    assert env.step(blank(2))[1].shape == (2,)


def test_importing_envs_is_light() -> None:
    code = "import sys, envs; print(sorted({'torch', 'matplotlib', 'scipy', 'PIL', 'envs.base'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
