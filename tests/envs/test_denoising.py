import math
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from envs.chain import DenoisingChain, GaussianLatents, pool_decode, pool_encode
from envs.denoising import DenoisingEnv, DenoisingVectorEnv
from envs.image_editing import ImageEditingEnv, ImageEditingVectorEnv
from envs.prompts import FixedPool
from envs.scenes.grammar import scene_for
from envs.scenes.render import render
from envs.scenes.suite import t2i_prompts
from envs.text_to_image import TextToImageEnv, TextToImageVectorEnv
from rewards.base import Images, Prompt
from rewards.pixel import redness


def drawn(seed: int, count: int | None = None) -> Any:
    shape = (3, 6, 6) if count is None else (count, 3, 6, 6)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def rest(values: Any) -> Any:
    return values.view(np.uint32)


def test_the_next_state_is_the_action_bit_for_bit() -> None:
    env = gymnasium.make("pdtr/Denoising-v0")
    observation, info = env.reset(seed=1)
    np.testing.assert_array_equal(rest(observation["latents"]), rest(GaussianLatents((3, 6, 6))(info["latent_seed"])))
    assert observation["sigma"].tolist() == [1.0]
    assert observation["condition"].shape == (0,)
    sigmas = []
    for step in range(4):
        action = drawn(step)
        # A denormal and a negative zero are values too.
        action[0, 0, :2] = 1e-42, -0.0
        observation, reward, terminated, truncated, info = env.step(action)
        np.testing.assert_array_equal(rest(observation["latents"]), rest(action))
        sigmas.append(observation["sigma"].item())
        assert observation in env.observation_space
        assert (terminated, truncated) == (step == 3, False)
        if step < 3:
            assert (reward, info) == (0.0, {})
    assert sigmas == [0.75, 0.5, 0.25, 0.0]


def test_the_last_transition_earns_what_the_outer_environment_gives() -> None:
    env, outer = DenoisingEnv(), TextToImageEnv()
    for prompt in t2i_prompts("train", 6, 0):
        scene = render([scene_for(np.random.default_rng(0), prompt.metadata)])
        final = pool_encode(scene)[0]
        env.reset(options={"prompts": [prompt]})
        for action in (drawn(0), drawn(1), drawn(2)):
            assert env.step(action)[1] == 0.0
        _, reward, _, _, info = env.step(final)
        outer.reset(options={"prompts": [prompt]})
        _, expected, _, _, outer_info = outer.step(pool_decode(final[None])[0])
        assert reward == expected
        assert info == outer_info


def test_chains_do_not_depend_on_how_many_there_are() -> None:
    prompts = t2i_prompts("train", 3, 1)
    chain = DenoisingChain(sigmas=(1.0, 0.4, 0.0))
    many = DenoisingVectorEnv(3, TextToImageVectorEnv(3), chain)
    observations, infos = many.reset(options={"prompts": prompts, "latent_seeds": [5, 6, 7]})
    assert infos["latent_seeds"].tolist() == [5, 6, 7]
    steps = [many.step(drawn(step, 3)) for step in range(2)]
    for index, prompt in enumerate(prompts):
        one = DenoisingEnv(chain=chain)
        observation, _ = one.reset(options={"prompts": [prompt], "latent_seeds": [5 + index]})
        np.testing.assert_array_equal(observation["latents"], observations["latents"][index])
        for step, (together, rewards, terminations, *_) in enumerate(steps):
            observation, reward, terminated, *_ = one.step(drawn(step, 3)[index])
            np.testing.assert_array_equal(observation["latents"], together["latents"][index])
            assert (reward, terminated) == (rewards[index], terminations[index])


def test_the_condition_is_the_embedding_of_the_outer_observation() -> None:
    def embed(observation: dict[str, Any]) -> Any:
        source = observation["source_image"].mean()
        return np.array([len(observation["prompt"]), source], np.float32)

    chain = DenoisingChain(embed=embed, embedding_size=2)
    single = DenoisingEnv(ImageEditingEnv(), chain)
    vector = DenoisingVectorEnv(2, ImageEditingVectorEnv(2), chain)
    source = np.full((48, 48, 3), 9, np.uint8)
    prompts = [Prompt("four", (source,)), Prompt("sixsix", (source * 2,))]
    observation, _ = vector.reset(options={"prompts": prompts})
    assert observation["condition"].tolist() == [[4, 9], [6, 18]]
    assert observation in vector.observation_space
    assert single.reset(options={"prompts": prompts[:1]})[0]["condition"].tolist() == [4, 9]


def test_each_turn_of_an_edit_is_a_chain_of_its_own() -> None:
    env = DenoisingEnv(ImageEditingEnv(num_turns=2), DenoisingChain(sigmas=(1.0, 0.0)))
    _, first = env.reset(seed=0)
    observation, _, terminated, _, info = env.step(drawn(0))
    assert (terminated, observation["sigma"].item()) == (False, 1.0)
    assert info["latent_seed"] != first["latent_seed"]
    np.testing.assert_array_equal(observation["latents"], GaussianLatents((3, 6, 6))(info["latent_seed"]))
    assert env.step(drawn(1))[2] is True


def test_a_missing_reward_is_nan() -> None:
    def judge(images: Images, prompts: Any) -> Any:
        return np.full(len(images), np.nan, np.float32)

    env = DenoisingEnv(TextToImageEnv(judge), DenoisingChain(sigmas=(1.0, 0.0)))
    env.reset()
    _, reward, _, _, info = env.step(drawn(0))
    assert math.isnan(reward)
    assert info["reward_available"] is False


def test_the_state_is_a_copy_both_ways() -> None:
    env = DenoisingEnv()
    env.reset()
    action = drawn(0)
    observation, *_ = env.step(action)
    action[:] = 0
    observation["latents"][:] = 1
    env.step(drawn(1))
    assert not np.array_equal(observation["latents"], action)


def test_pool_codec() -> None:
    latents = np.array([[[[-1.0]], [[0.0]], [[1.5]]]], np.float32)
    image = pool_decode(latents)
    assert image.shape == (1, 8, 8, 3)
    assert image[0, 3, 5].tolist() == [0, 128, 255]
    levels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), np.uint8)
    blocks = levels.repeat(8, axis=1).repeat(8, axis=2)
    np.testing.assert_array_equal(pool_decode(pool_encode(blocks)), blocks)


def test_frames_are_the_decoded_state() -> None:
    env = DenoisingVectorEnv(2, render_mode="rgb_array")
    env.reset(seed=0)
    env.step(drawn(3, 2))
    np.testing.assert_array_equal(np.array(env.render()), pool_decode(drawn(3, 2)))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (drawn(0).astype(np.float64), r"action: expected float32 \[1, 3, 6, 6\], got float64"),
        (drawn(0, 1), r"action: expected float32 \[3, 6, 6\], got float32 \[1, 3, 6, 6\]"),
        ([0.0], "got list"),
        (drawn(0) * np.float32(np.nan), "expected values in .-10, 10., got NaN"),
        (np.full((3, 6, 6), 10.5, np.float32), "got 10.5; clip them, or raise bound"),
    ],
)
def test_bad_actions(action: Any, message: str) -> None:
    env = DenoisingEnv()
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert env.step(drawn(0))[0]["sigma"].item() == 0.75


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigmas": (1.0,)}, "sigmas: expected two or more falling numbers"),
        ({"sigmas": (1.0, 0.5, 0.6, 0.0)}, "sigmas: expected"),
        ({"sigmas": (1.0, 0.1)}, "from at most 1 to 0"),
        ({"sigmas": (1.5, 0.0)}, "from at most 1 to 0"),
        ({"latent_shape": (3, 6)}, r"latent_shape: expected \(C, h, w\)"),
        ({"embedding_size": 3}, "got 3 without embed"),
        ({"embed": lambda observation: np.zeros(3)}, "got 0 with embed"),
        ({"bound": 0.0}, "bound: expected a positive number"),
    ],
)
def test_bad_chains(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingChain(**fields)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (
            DenoisingChain(latent_shape=(3, 5, 5)),
            r"initial_latents: expected float32 \[3, 5, 5\], got float32 \[3, 6, 6\]",
        ),
        (DenoisingChain(initial_latents=lambda seed: np.zeros((3, 6, 6))), "initial_latents: expected float32"),
        (DenoisingChain(embed=lambda observation: np.zeros(2), embedding_size=2), "embed: expected float32"),
    ],
)
def test_bad_parts_are_found_at_reset(chain: DenoisingChain, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingEnv(chain=chain).reset()


def test_bad_decoders_are_named() -> None:
    env = DenoisingEnv(chain=DenoisingChain(sigmas=(1.0, 0.0), decode=lambda latents: latents))
    env.reset()
    with pytest.raises(ValueError, match=r"decode: expected uint8 \[1, H, W, 3\], got float32"):
        env.step(drawn(0))


def test_bad_options_and_order() -> None:
    env = DenoisingEnv()
    with pytest.raises(ValueError, match="did you mean 'latent_seeds'"):
        env.reset(options={"latent_seed": [1]})
    with pytest.raises(ValueError, match="latent_seeds: expected 1 integers"):
        env.reset(options={"latent_seeds": [1, 2]})
    with pytest.raises(ResetNeeded, match="call reset first"):
        env.step(drawn(0))
    with pytest.raises(ValueError, match="expected num_envs=2 and autoreset disabled, got num_envs=3"):
        DenoisingVectorEnv(2, TextToImageVectorEnv(3))
    with pytest.raises(ValueError, match=r"autoreset disabled, got num_envs=2 and AutoresetMode\.NEXT_STEP"):
        DenoisingVectorEnv(2, gymnasium.make_vec("pdtr/TextToImage-v0", num_envs=2, vectorization_mode="sync"))


def test_an_infinite_bound() -> None:
    chain = DenoisingChain(sigmas=(1.0, 0.0), bound=math.inf)
    env = DenoisingEnv(TextToImageEnv(redness, FixedPool([Prompt("a")])), chain)
    env.reset()
    observation, *_ = env.step(drawn(0) * np.float32(1e20))
    assert observation in env.observation_space
