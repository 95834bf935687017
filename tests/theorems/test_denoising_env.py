"""``pdtr/Denoising-v0`` under a policy's own actions is the chain that ``collect`` draws, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import VectorEnv

from agents.policies.scenes import ScenesPolicy
from agents.rollout import Ask, Draw, collect, encode_asks
from agents.samplers import CPS, ODE, FixedWindow, FlowSDE, RandomWindow, Sampler, derive_seed, sample_noise
from agents.types import Condition, Rollout
from envs.chain import DenoisingChain
from envs.denoising import DenoisingEnv, DenoisingVectorEnv
from envs.image_editing import ImageEditingEnv, ImageEditingVectorEnv
from envs.scenes.suite import edit_prompts, t2i_prompts
from envs.text_to_image import TextToImageEnv, TextToImageVectorEnv
from rewards.base import Prompt

GROUP_SIZE = 2
DRAW = Draw(GROUP_SIZE, seed=17, keep_images=True)
SAMPLERS: list[Sampler] = [
    FlowSDE(5),
    FlowSDE(5, guidance_scale=2.0),
    FlowSDE(5, shift=3.0, window=RandomWindow(2, 0, 4)),
    CPS(4, window=FixedWindow(1, 2)),
    ODE(5),
]
TASKS = {
    "t2i": (t2i_prompts("held_out", 2, 3), TextToImageEnv, TextToImageVectorEnv),
    "edit": (edit_prompts("held_out", 2, 3), ImageEditingEnv, ImageEditingVectorEnv),
}


def branches(condition: Condition) -> list[Condition]:
    return [condition] if condition.negative is None else [condition, *branches(condition.negative)]


class Agent:
    """The policy as an agent of the environment: it sees observations only, and brings its own noise."""

    def __init__(self, policy: ScenesPolicy, sampler: Sampler, example: Ask) -> None:
        self.policy, self.sampler, self.example = policy, sampler, encode_asks(policy, [example])
        self.steps = sampler.stochastic_steps(torch.Generator().manual_seed(derive_seed(DRAW.seed, "window")))

    def noise(self, seed: int) -> torch.Tensor:
        return sample_noise([seed], (len(self.steps) + 1, *self.policy.latent_shape))

    def embed(self, observation: dict[str, Any]) -> Any:
        """The whole condition as one vector, which :meth:`condition` reads back."""
        sources = (observation["source_image"],) if "source_image" in observation else ()
        found = encode_asks(self.policy, [Ask(str(observation["prompt"]), sources)])
        return torch.cat([t.flatten() for branch in branches(found) for t in branch.tensors.values()]).numpy()

    def condition(self, vector: Any) -> Condition:
        rest, read = torch.from_numpy(vector), []
        for branch in branches(self.example):
            tensors = {}
            for name, like in branch.tensors.items():
                tensors[name], rest = rest[: like.numel()].reshape(like.shape), rest[like.numel() :]
            read.append(Condition(tensors))
        assert len(rest) == 0
        return replace(read[0], negative=read[1])

    def chain(self) -> DenoisingChain:
        return DenoisingChain(
            sigmas=self.sampler.sigmas().tolist(),
            latent_shape=self.policy.latent_shape,
            decode=lambda latents: self.policy.decode(torch.from_numpy(latents)).numpy(),
            initial_latents=lambda seed: self.noise(seed)[0, 0].numpy(),
            embed=self.embed,
            embedding_size=sum(t.numel() for branch in branches(self.example) for t in branch.tensors.values()),
            bound=float("inf"),
        )

    @torch.no_grad()
    def act(self, observation: dict[str, Any], step: int, noise: torch.Tensor) -> torch.Tensor:
        """The next latents, [1, C, h, w], from one member's observation and the noise of its chain [1, S + 1, ...]."""
        latents, sigma = torch.from_numpy(observation["latents"])[None], torch.from_numpy(observation["sigma"])
        sigmas = self.sampler.sigmas()
        assert torch.equal(sigma, sigmas[step : step + 1])
        condition = self.condition(observation["condition"])
        velocity = self.policy.velocity(latents, sigma, condition, self.sampler.guidance_scale)
        is_stochastic = step in self.steps
        drawn = noise[:, self.steps.index(step) + 1] if is_stochastic else None
        return self.sampler.step(latents, velocity, sigmas, step, is_stochastic, drawn)[0]


def collected(policy: ScenesPolicy, task: str, sampler: Sampler) -> Rollout:
    prompts, _, vector = TASKS[task]
    envs: list[VectorEnv[Any, Any, Any]] = [vector(1), vector(1)]
    return collect(policy, envs, prompts, DRAW, sampler)


def make_agent(policy: ScenesPolicy, sampler: Sampler, prompt: Prompt) -> Agent:
    return Agent(policy, sampler, Ask(prompt.text, prompt.source_images))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_environments_chain_is_collects(tiny_policy: ScenesPolicy, sampler: Sampler, task: str) -> None:
    rollout = collected(tiny_policy, task, sampler)
    assert rollout.images is not None
    prompts, single, _ = TASKS[task]
    agent = make_agent(tiny_policy, sampler, prompts[0])
    env = DenoisingEnv(single(), agent.chain(), render_mode="rgb_array")
    for row, trajectory in enumerate(rollout.trajectories):
        seed = derive_seed(DRAW.seed, "sample", *divmod(row, GROUP_SIZE))
        observation, _ = env.reset(options={"prompts": [prompts[row // GROUP_SIZE]], "latent_seeds": [seed]})
        assert trajectory.steps == agent.steps
        noise, before, after = agent.noise(seed), [], []
        for step in range(sampler.num_inference_steps):
            before += [observation["latents"]] if step in agent.steps else []
            observation, reward, terminated, _, info = env.step(agent.act(observation, step, noise)[0].numpy())
            after += [observation["latents"]] if step in agent.steps else []
            assert terminated == (step == sampler.num_inference_steps - 1)
        np.testing.assert_array_equal(observation["latents"], trajectory.x_0[0].numpy())
        if agent.steps:
            np.testing.assert_array_equal(np.stack(before), trajectory.latents[0].numpy())
            np.testing.assert_array_equal(np.stack(after), trajectory.next_latents[0].numpy())
        np.testing.assert_array_equal(env.render(), rollout.images[row])
        assert reward == float(rollout.rewards[row])
        assert info["components"] == {name: float(values[row]) for name, values in rollout.components.items()}
    assert len({image.tobytes() for image in rollout.images}) == len(rollout)


@pytest.mark.parametrize("task", TASKS)
def test_chains_in_step_are_collects_too(tiny_policy: ScenesPolicy, task: str) -> None:
    """The vector environment, every member driven by itself: the batch changes no bit of a chain."""
    sampler = FlowSDE(4)
    rollout = collected(tiny_policy, task, sampler)
    assert rollout.images is not None
    prompts, _, vector = TASKS[task]
    agent = make_agent(tiny_policy, sampler, prompts[0])
    count = len(rollout)
    env = DenoisingVectorEnv(count, vector(count), agent.chain())
    seeds = [derive_seed(DRAW.seed, "sample", *divmod(row, GROUP_SIZE)) for row in range(count)]
    asked = [prompts[row // GROUP_SIZE] for row in range(count)]
    observations, _ = env.reset(options={"prompts": asked, "latent_seeds": seeds})
    for step in range(sampler.num_inference_steps):
        members = [{name: values[row] for name, values in observations.items()} for row in range(count)]
        actions = [agent.act(one, step, agent.noise(seeds[row])) for row, one in enumerate(members)]
        observations, rewards, *_ = env.step(torch.cat(actions).numpy())
    np.testing.assert_array_equal(observations["latents"], torch.cat([t.x_0 for t in rollout.trajectories]).numpy())
    np.testing.assert_array_equal(rewards, rollout.rewards.double().numpy())


def test_another_action_is_another_chain(tiny_policy: ScenesPolicy) -> None:
    """The equality above is no accident of a policy that ignores its input: one bit of one latent shows in the end."""
    sampler, prompts = ODE(4), TASKS["t2i"][0]
    agent = make_agent(tiny_policy, sampler, prompts[0])
    env = DenoisingEnv(TextToImageEnv(), agent.chain())
    finals = []
    for nudge in (0, 1):
        observation, _ = env.reset(options={"prompts": prompts[:1], "latent_seeds": [5]})
        for step in range(4):
            action = agent.act(observation, step, agent.noise(5))[0].numpy()
            if nudge and step == 0:
                action[0, 0, 0] = np.nextafter(action[0, 0, 0], np.float32(9))
            observation, *_ = env.step(action)
        finals.append(observation["latents"])
    assert not np.array_equal(*finals)
