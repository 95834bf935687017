import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import Space
from gymnasium.spaces import Box, Dict, Tuple
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

import envs
from envs.checker import check_image_env
from envs.denoising import DenoisingEnv
from envs.image_editing import ImageEditingVectorEnv
from envs.prompts import FixedPool
from envs.text_to_image import TextToImageEnv, TextToImageVectorEnv
from rewards.base import Images, Prompt
from rewards.pixel import redness

NAMES = sorted(name for name in gymnasium.registry if name.startswith("pdtr/"))


def test_every_environment_is_registered() -> None:
    assert set(NAMES) == set(envs.ENTRY_POINTS) == {"pdtr/TextToImage-v0", "pdtr/ImageEditing-v0", "pdtr/Denoising-v0"}
    before = dict(gymnasium.registry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.register()
    assert gymnasium.registry == before


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_environment(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(name).unwrapped)
        check_image_env(gymnasium.make(name))
        check_image_env(gymnasium.make_vec(name, num_envs=1))
        check_image_env(gymnasium.make_vec(name, num_envs=3))


@pytest.mark.parametrize("num_turns", [2, 3])
def test_several_turns_and_their_chains(num_turns: int) -> None:
    outer = gymnasium.make("pdtr/ImageEditing-v0", num_turns=num_turns)
    check_image_env(outer)
    check_image_env(gymnasium.make_vec("pdtr/ImageEditing-v0", num_envs=2, num_turns=num_turns))
    check_image_env(gymnasium.make("pdtr/Denoising-v0", outer=outer))


@pytest.mark.parametrize("num_turns", [1, 2])
def test_several_sources(num_turns: int) -> None:
    pool = FixedPool([Prompt("a", tuple(np.full((3, 4, 4, 3), level, np.uint8))) for level in range(4)])
    arguments: dict[str, Any] = {"prompts": pool, "reward": redness, "image_size": (4, 4), "num_turns": num_turns}
    check_image_env(gymnasium.make("pdtr/ImageEditing-v0", **arguments))
    check_image_env(gymnasium.make_vec("pdtr/ImageEditing-v0", num_envs=2, **arguments))


class Fewer(ImageEditingVectorEnv):
    """Shows the first of its sources alone."""

    def _observe(self) -> dict[str, Any]:
        observation = super()._observe()
        return {**observation, "source_images": np.repeat(observation["source_images"][:, :1], 2, axis=1)}


def test_a_source_that_is_left_out_is_noticed() -> None:
    pool = FixedPool([Prompt("a", tuple(np.zeros((2, 4, 4, 3), np.uint8)))])
    with pytest.raises(ValueError, match="source_image: expected the prompt's own pixels, got others"):
        check_image_env(Fewer(2, redness, pool, (4, 4)))


@pytest.mark.parametrize(
    "several",
    [
        Tuple([Box(0, 255, (4, 4, 3), np.uint8)] * 2),
        Box(0, 255, (), np.uint8),
        Box(0, 255, (1, 4, 4, 3), np.uint8),
        Box(0, 255, (2, 4, 4), np.uint8),
        Box(0, 255, (2, 4, 4, 3), np.float32),
    ],
)
def test_a_space_of_sources_of_another_form_is_named(several: Space[Any]) -> None:
    pool = FixedPool([Prompt("a", tuple(np.zeros((2, 4, 4, 3), np.uint8)))])
    env = ImageEditingVectorEnv(2, redness, pool, (4, 4))
    single = env.single_observation_space
    assert isinstance(single, Dict)
    env.single_observation_space = Dict({**single.spaces, "source_images": several})
    env.observation_space = batch_space(env.single_observation_space, 2)
    with pytest.raises(ValueError, match=r"observation_space\['source_images'\]: expected two or more of Box.*, got"):
        check_image_env(env)


class Restarting(TextToImageVectorEnv):
    metadata = TextToImageVectorEnv.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}


class Forgetful(TextToImageVectorEnv):
    """Asks for something else than it was given."""

    def _observe(self) -> dict[str, Any]:
        return {"prompt": tuple(prompt.text.strip() for prompt in self._asked)}


class Blurring(ImageEditingVectorEnv):
    def _observe(self) -> dict[str, Any]:
        observation = super()._observe()
        observation["source_image"] //= 2
        return observation


class Sharing(ImageEditingVectorEnv):
    """Hands out the prompt's own array."""

    def _sources(self) -> Images:
        return self._asked[0].source_images[0][None, None]


class Scoring(TextToImageVectorEnv):
    """Puts 0 in the place of a missing reward."""

    def step(self, actions: Images) -> Any:
        observation, rewards, *rest = super().step(actions)
        return observation, np.nan_to_num(rewards), *rest


class Endless(TextToImageVectorEnv):
    def _advance(self, images: Images) -> bool:
        return False


class Lenient(TextToImageVectorEnv):
    """Takes any number type."""

    def step(self, actions: Any) -> Any:
        return super().step(np.asarray(actions).astype(np.uint8))


class Unseeded(TextToImageVectorEnv):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=None, options=options)


class Rounding(DenoisingEnv):
    def _observe(self) -> dict[str, Any]:
        observation = super()._observe()
        observation["latents"] = observation["latents"].round(3)
        return observation


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Restarting, "expected AutoresetMode.DISABLED, got AutoresetMode.NEXT_STEP"),
        (Forgetful, "ask for the prompts that were given, unchanged"),
        (Blurring, "hand them on unchanged"),
        (Sharing, "expected an array of the observation's own"),
        (Scoring, "never put a number in its place"),
        (Endless, "expected the episode to end"),
        (Lenient, "step with another dtype: expected a ValueError, got no error"),
        (Unseeded, "expected the same episodes from the same seed"),
        (lambda: Rounding(), "bit for bit"),
        (lambda: TextToImageEnv(reward=unstable), "check_env"),
    ],
)
def test_a_broken_environment_is_found(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_image_env(make())


def unstable(images: Images, prompts: list[Prompt]) -> Any:
    return np.random.default_rng().random(len(images)).astype(np.float32)
