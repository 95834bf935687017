"""A rollout says what scoring took and what of it was waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from agents.policies.scenes import ScenesPolicy
from agents.rollout import Draw, collect
from agents.samplers import ODE
from envs.prompts import FixedPool
from envs.scenes.suite import t2i_prompts
from envs.text_to_image import TextToImageVectorEnv
from rewards.base import Images, Prompt, Scores

SECONDS, NUM_CHUNKS = 0.1, 4


def slow(images: Images, prompts: Sequence[Prompt]) -> Scores:
    time.sleep(SECONDS)
    return Scores(np.zeros(len(images), np.float32))


@pytest.mark.parametrize(("num_envs", "share"), [(1, (0.9, 1.1)), (2, (0.0, 0.9999))])
def test_with_two_environments_scoring_goes_on_beside_drawing(
    tiny_policy: ScenesPolicy, num_envs: int, share: tuple[float, float]
) -> None:
    prompts = t2i_prompts("train", NUM_CHUNKS, 3)
    envs = [TextToImageVectorEnv(2, slow, FixedPool(prompts), tiny_policy.image_size) for _ in range(num_envs)]
    found = collect(tiny_policy, envs, prompts, Draw(2, seed=1), ODE(3)).seconds
    assert found.scored >= NUM_CHUNKS * SECONDS
    assert share[0] <= found.waited / found.scored <= share[1]


def test_scoring_is_on_the_gpu_of_who_draws(tiny_policy: ScenesPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device is a thread's own, and the first GPU in a new thread."""
    told: list[tuple[str, int]] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 5)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: told.append((threading.current_thread().name, index)))
    prompts = t2i_prompts("train", 1, 3)
    used: list[str] = []

    def note(images: Images, prompts: Sequence[Prompt]) -> Scores:
        used.append(threading.current_thread().name)
        return Scores(np.zeros(len(images), np.float32))

    env = TextToImageVectorEnv(1, note, FixedPool(prompts), tiny_policy.image_size)
    collect(tiny_policy, [env], prompts, Draw(1, seed=1), ODE(2))
    assert told == [(used[0], 5)]
    assert used[0] != threading.current_thread().name
