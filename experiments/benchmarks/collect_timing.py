"""What is timed of rollouts and updates, with everything of a recipe but the rewards' cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.learner import Learner
from agents.policies.base import FlowPolicy
from agents.rollout import Ask, Draw, collect, encode_asks
from agents.samplers import sample_noise
from agents.types import Condition, PromptLike, Rollout
from experiments.benchmarks.timing import interleaved
from pdtr.config import TrainConfig
from pdtr.tasks import Task
from pdtr.trainer import make_optimizer, make_weights

if TYPE_CHECKING:
    from rewards.base import Images, Prompt

Answer = TypeVar("Answer")
SEED = 0


class StopwatchPolicy(FlowPolicy):
    """A policy that passes every call on to another and adds up the seconds it took.

    Attributes:
        inner: the policy that is timed.
        seconds: since the last :meth:`restart`, by "encode", "forward" and "decode".
    """

    def __init__(self, inner: FlowPolicy) -> None:
        self.inner = inner
        self.restart()

    def restart(self) -> None:
        """Begin at zero."""
        self.seconds = {"encode": 0.0, "forward": 0.0, "decode": 0.0}

    @property
    def transformer(self) -> nn.Module:
        """The inner policy's."""
        return self.inner.transformer

    @transformer.setter
    def transformer(self, module: nn.Module) -> None:
        self.inner.transformer = module

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The inner policy's."""
        return self.inner.latent_shape

    @property
    def image_size(self) -> tuple[int, int]:
        """The inner policy's."""
        return self.inner.image_size

    def to(self, device: torch.device | str) -> None:
        """Move the inner policy."""
        self.inner.to(device)

    def save(self, folder: Path) -> None:
        """Save the inner policy."""
        self.inner.save(folder)

    @property
    def own_shift(self) -> float:
        """The inner policy's."""
        return self.inner.own_shift

    def own_sigmas(self, num_inference_steps: int) -> Tensor:
        """The inner policy's."""
        return self.inner.own_sigmas(num_inference_steps)

    def guide(self, negative: Tensor, positive: Tensor, guidance_scale: float) -> Tensor:
        """The inner policy's."""
        return self.inner.guide(negative, positive, guidance_scale)

    def prepare(self, prompts: Sequence[PromptLike]) -> None:
        """Timed as "encode"."""
        self._timed("encode", lambda: self.inner.prepare(prompts))

    def encode(self, prompts: Sequence[PromptLike]) -> Condition:
        """Timed as "encode"."""
        return self._timed("encode", lambda: self.inner.encode(prompts))

    def decode(self, latents: Tensor) -> Tensor:
        """Timed as "decode"."""
        return self._timed("decode", lambda: self.inner.decode(latents))

    def conditional_velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Timed as "forward"."""
        return self._timed("forward", lambda: self.inner.conditional_velocity(latents, sigma, condition))

    def _timed(self, name: str, call: Callable[[], Answer]) -> Answer:
        started = perf_counter()
        answer = call()
        self.seconds[name] += perf_counter() - started
        return answer


@dataclass(frozen=True)
class CollectTimes:
    """Seconds at each repeat, [n] each.

    Attributes:
        collect: a whole ``collect``.
        bare: the bare forward passes: as many, of the same shapes.
        encode: of ``collect``, encoding prompts and source images.
        forward: of ``collect``, its own forward passes.
        decode: of ``collect``, decoding latents.
    """

    collect: NDArray[np.float64]
    bare: NDArray[np.float64]
    encode: NDArray[np.float64]
    forward: NDArray[np.float64]
    decode: NDArray[np.float64]

    @property
    def cost(self) -> NDArray[np.float64]:
        """``(collect - decode) / bare``: 1 where all but the forward passes is free."""
        return (self.collect - self.decode) / self.bare

    @property
    def cost_within(self) -> NDArray[np.float64]:
        """``(collect - decode) / forward``: the same within one call, which noise from outside hits less."""
        return (self.collect - self.decode) / self.forward


def zero_reward(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """A reward that costs nothing."""
    return np.zeros(len(images), np.float32)


def training_prompts(task: Task, config: TrainConfig) -> list[Prompt]:
    """An iteration's prompts."""
    return task.pool.draw(np.random.default_rng(SEED), config.num_prompts)


def time_collect(policy: FlowPolicy, task: Task, config: TrainConfig, num_repeats: int) -> CollectTimes:
    """Time ``collect`` with a reward that costs nothing beside the bare forward passes, in turn in one process."""
    stopwatch, envs = StopwatchPolicy(policy), replace(task, reward=zero_reward).make_envs(config.chunk_size)
    prompts, draw, sampler = training_prompts(task, config), Draw(config.group_size, SEED), config.algorithm.sampler()
    parts: list[dict[str, float]] = []

    def whole() -> None:
        stopwatch.restart()
        collect(stopwatch, envs, prompts, draw, sampler)
        parts.append(stopwatch.seconds)

    bare = bare_forward_passes(policy, prompts, config)
    seconds = interleaved({"collect": whole, "bare": bare}, num_repeats)
    # The first is the round that is not counted.
    encode, forward, decode = (np.array([part[name] for part in parts[1:]]) for name in ("encode", "forward", "decode"))
    return CollectTimes(seconds["collect"], seconds["bare"], encode, forward, decode)


def bare_forward_passes(policy: FlowPolicy, prompts: Sequence[Prompt], config: TrainConfig) -> Callable[[], None]:
    """The forward passes that ``collect`` makes for these prompts, and nothing else; all inputs are ready."""
    asks = [Ask(prompt.text, tuple(prompt.source_images)) for prompt in prompts for _ in range(config.group_size)]
    size, sampler = config.chunk_size, config.algorithm.sampler()
    conditions = [encode_asks(policy, asks[start : start + size]) for start in range(0, len(asks), size)]
    latents = sample_noise(range(size), policy.latent_shape, policy.device)
    sigmas = policy.sigmas(sampler).to(policy.device)

    @torch.no_grad()
    def run() -> None:
        for condition in conditions:
            for step in range(len(sigmas) - 1):
                policy.velocity(latents, sigmas[step], condition, sampler.guidance_scale)

    return run


def time_rollout(policy: FlowPolicy, task: Task, config: TrainConfig, num_repeats: int) -> NDArray[np.float64]:
    """Images per second of ``collect`` as it trains: decoding and the task's own reward included, [n]."""
    envs, prompts, sampler = (
        task.make_envs(config.chunk_size),
        training_prompts(task, config),
        config.algorithm.sampler(),
    )
    draw = Draw(config.group_size, SEED)
    seconds = interleaved({"rollout": lambda: collect(policy, envs, prompts, draw, sampler)}, num_repeats)
    return len(prompts) * config.group_size / seconds["rollout"]


def time_update(policy: FlowPolicy, task: Task, config: TrainConfig, num_repeats: int) -> NDArray[np.float64]:
    """Samples per second of the learner's whole update (all minibatches), [n].

    The weights are trained on: measure the rollouts first. Rewards are random, so that no group is masked.
    """
    weights = make_weights(config, policy)
    learner = Learner(policy, weights, config.algorithm, make_optimizer(config, weights), config.learner)
    envs = replace(task, reward=zero_reward).make_envs(config.chunk_size)
    draw = Draw(config.group_size, SEED)
    rollout: Rollout = collect(policy, envs, training_prompts(task, config), draw, config.algorithm.sampler())
    random = torch.rand(len(rollout), generator=torch.Generator().manual_seed(SEED))
    rollout = rollout.with_rewards(random)
    rollout = rollout.with_advantages(config.algorithm.advantages(rollout))
    seconds = interleaved({"update": lambda: learner.update([rollout])}, num_repeats)
    return len(rollout) / seconds["update"]
