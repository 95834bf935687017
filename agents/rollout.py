"""Rollouts: the inner denoising chain, drawn in chunks while the chunk before is being scored.

Every draw is seeded by (seed, prompt, sample), so the chunk size and the number of processes change nothing in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.policies.base import FlowPolicy
from agents.samplers import Sampler, derive_seed, sample_noise
from agents.types import Condition, Rollout, Trajectory

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

Images = NDArray[np.uint8]
Step = tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]


@dataclass(frozen=True)
class Ask:
    """One observation of an image environment: what a policy encodes."""

    text: str
    source_images: tuple[Images, ...] = ()


@dataclass(frozen=True)
class Draw:
    """How many samples a prompt gets, and where their randomness comes from.

    Attributes:
        group_size: samples a prompt.
        seed: of this rollout; derive it from (run seed, iteration).
        keep_images: keep the decoded images in the rollout.
    """

    group_size: int
    seed: int
    keep_images: bool = False


def collect(
    policy: FlowPolicy, envs: Sequence[VectorEnv[Any, Any, Any]], prompts: Sequence[Any], draw: Draw, sampler: Sampler
) -> Rollout:
    """Draw ``group_size`` images a prompt and have the environment score them.

    Args:
        policy: with the weights that are to act in use.
        envs: two equal environments, used in turn: one scores its chunk in a thread while the other's is drawn. One
            alone works too, without overlap. Their ``num_envs`` is the chunk's size.
        prompts: handed to the environments as they are; a group each. The policy sees them first, so as to prepare.
        draw: group size and seed.
        sampler: how latents are drawn.

    Returns:
        The rollout, groups in the order of the prompts. A prompt's samples are drawn alike whatever it is drawn with.

    Raises:
        ValueError: the samples do not fill whole chunks, or episodes take more than one step.
    """
    chunk_size = envs[0].num_envs
    total = len(prompts) * draw.group_size
    if total == 0 or total % chunk_size:
        raise ValueError(
            f"collect: expected prompts x group_size to fill whole chunks, got {len(prompts)} x {draw.group_size} "
            f"= {total} with a chunk size of {chunk_size}; change one of the three"
        )
    steps = sampler.stochastic_steps(torch.Generator().manual_seed(derive_seed(draw.seed, "window")))
    trajectories: list[Trajectory] = []
    images: list[Images] = []
    pending: list[Future[Step]] = []
    waited = 0.0
    policy.prepare(prompts)
    with ThreadPoolExecutor(max_workers=1) as scorer:
        for number, start in enumerate(range(0, total, chunk_size)):
            env = envs[number % len(envs)]
            if number >= len(envs):
                waited += _wait(pending[number - len(envs)])
            samples = [divmod(i, draw.group_size) for i in range(start, start + chunk_size)]
            observation, _ = env.reset(options={"prompts": [prompts[p] for p, _ in samples]})
            seeds = [derive_seed(draw.seed, "sample", p, s) for p, s in samples]
            condition = encode_asks(policy, list(asks(observation)))
            trajectories.append(denoise(policy, condition, sampler, steps, seeds))
            chunk_images = policy.decode(trajectories[-1].x_0).cpu().numpy()
            images.append(chunk_images)
            pending.append(scorer.submit(env.step, chunk_images))
        waited += sum(map(_wait, pending))
    return _rollout(trajectories, [f.result() for f in pending], images if draw.keep_images else [], draw, waited)


def _wait(future: Future[Step]) -> float:
    started = perf_counter()
    future.result()
    return perf_counter() - started


def _rollout(
    trajectories: Sequence[Trajectory], outcomes: Sequence[Step], images: Sequence[Images], draw: Draw, waited: float
) -> Rollout:
    if not all(np.all(terminated | truncated) for _, _, terminated, truncated, _ in outcomes):
        raise ValueError("collect: expected episodes of one step, got one that goes on; use one turn")
    rewards = torch.from_numpy(np.concatenate([np.asarray(o[1], np.float32) for o in outcomes]))
    parts: list[Mapping[str, Any]] = [o[4].get("components", {}) for o in outcomes]
    components = {
        name: torch.from_numpy(np.concatenate([_component(o, name) for o in outcomes]))
        for name in dict.fromkeys(name for part in parts for name in part)
    }
    starts = list(accumulate((len(o[1]) for o in outcomes), initial=0))[:-1]
    whys = [o[4].get("reasons", {}) for o in outcomes]
    return Rollout(
        trajectories=tuple(trajectories),
        rewards=rewards,
        components=components,
        group_ids=torch.arange(len(rewards)) // draw.group_size,
        advantages=torch.zeros(len(rewards)),
        seed=draw.seed,
        images=np.concatenate(images) if images else None,
        seconds_waited=waited,
        reasons={start + i: why for start, known in zip(starts, whys, strict=True) for i, why in known.items()},
    )


def _component(outcome: Step, name: str) -> NDArray[np.float32]:
    """A component of one chunk; NaN where its reward was not available as a whole, and had none."""
    values = outcome[4].get("components", {}).get(name)
    return np.full(len(outcome[1]), np.nan, np.float32) if values is None else np.asarray(values, np.float32)


def asks(observation: Mapping[str, Any]) -> Iterator[Ask]:
    """A batched observation of an image environment, one :class:`Ask` an environment."""
    sources = observation.get("source_image")
    for index, text in enumerate(observation["prompt"]):
        yield Ask(str(text), () if sources is None else (np.asarray(sources[index]),))


def encode_asks(policy: FlowPolicy, chunk: Sequence[Ask]) -> Condition:
    """Encode every distinct ask of a chunk once: a group shares its embedding and its reference latents."""
    keys = [(ask.text, *(image.tobytes() for image in ask.source_images)) for ask in chunk]
    first: dict[tuple[Any, ...], int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    rows = {key: row for row, key in enumerate(first)}
    condition = policy.encode([chunk[index] for index in first.values()])
    return condition.select(torch.tensor([rows[key] for key in keys], device=policy.device))


@torch.no_grad()
def denoise(
    policy: FlowPolicy, condition: Condition, sampler: Sampler, steps: Sequence[int], seeds: Sequence[int]
) -> Trajectory:
    """Draw one chunk: from noise at sigma 1 down to x_0, stochastic at ``steps``.

    Args:
        policy: with the weights that are to act in use.
        condition: [B].
        sampler: the transitions.
        steps: indices of the stochastic steps, ascending.
        seeds: one a sample; its initial noise and its steps' noise come from it alone.

    Returns:
        The trajectory, [B], with what the stochastic steps saw and drew.
    """
    shape = (len(steps) + 1, *policy.latent_shape)
    noise = sample_noise(seeds, shape, policy.device)
    sigmas = policy.sigmas(sampler).to(policy.device)
    order = {step: index for index, step in enumerate(steps)}
    x, before, after, log_probs = noise[:, 0].to(policy.dtype), [], [], []
    for step in range(len(sigmas) - 1):
        velocity = policy.velocity(x, sigmas[step], condition, sampler.guidance_scale)
        step_noise = noise[:, order[step] + 1] if step in order else None
        x_next, log_prob = sampler.step(x, velocity, sigmas, step, step in order, step_noise)
        if log_prob is not None:
            before.append(x)
            after.append(x_next)
            log_probs.append(log_prob)
        x = x_next
    return Trajectory(
        condition, x, sigmas, tuple(steps), _stacked(before, x), _stacked(after, x), _stacked(log_probs, x[:, 0, 0, 0])
    )


def _stacked(steps: Sequence[Tensor], like: Tensor) -> Tensor:
    """[B, ...] a step -> [B, S, ...], and [B, 0, ...] where no step is stochastic."""
    return torch.stack(list(steps), dim=1) if steps else like.new_empty((len(like), 0, *like.shape[1:]))
