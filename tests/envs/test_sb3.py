"""Stable-Baselines3, unmodified, on the denoising chain."""

import gymnasium
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env

import envs  # noqa: F401 - registers the environments.


@pytest.mark.filterwarnings("ignore:It seems that your observation", "ignore:The minimal resolution")
@pytest.mark.filterwarnings("ignore:.*symmetric and normalized Box action space")
def test_check_env() -> None:
    check_env(gymnasium.make("pdtr/Denoising-v0").unwrapped)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_ppo(num_envs: int) -> None:
    env = make_vec_env("pdtr/Denoising-v0", n_envs=num_envs, seed=0)
    model = PPO("MultiInputPolicy", env, n_steps=128 // num_envs, batch_size=64, n_epochs=2, seed=0, device="cpu")
    before = model.policy.action_net.weight.detach().clone()
    model.learn(256)
    assert model.num_timesteps == 256
    assert not before.equal(model.policy.action_net.weight)
    episodes = list(model.ep_info_buffer or ())
    # 256 transitions in chains of four.
    assert len(episodes) == 64
    assert {episode["l"] for episode in episodes} == {4}
    assert all(np.isfinite(episode["r"]) for episode in episodes)
