"""Rollouts: the inner denoising chain, drawn in chunks while the chunk before is being scored.

Every draw is seeded by (seed, prompt, sample), so the chunk size and the number of processes change nothing in it.
Processes share a rollout by whole chunks, see ``agents.sharing``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from agents.types import Condition, Elsewhere, Rollout, Seconds, Trajectory

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


@dataclass(frozen=True)
class Share:
    """One process's part of a rollout.

    Attributes:
        chunks: numbers of the chunks that it draws, ascending.
        num_idle: images that it draws beside them and drops: with sharded weights every process takes part in the
            forward passes of the one that has the most chunks.
    """

    chunks: tuple[int, ...]
    num_idle: int = 0


def collect(
    policy: FlowPolicy,
    envs: Sequence[VectorEnv[Any, Any, Any]],
    prompts: Sequence[Any],
    draw: Draw,
    sampler: Sampler,
    share: Share | None = None,
) -> Rollout:
    """Draw ``group_size`` images a prompt and have the environment score them.

    Args:
        policy: with the weights that are to act in use.
        envs: two equal environments, used in turn: one scores its chunk in a thread while the other's is drawn. One
            alone works too, without overlap. Their ``num_envs`` is the chunk's size.
        prompts: handed to the environments as they are; a group each. The policy sees them first, so as to prepare.
        draw: group size and seed.
        sampler: how latents are drawn.
        share: what this process draws; everything by default.

    Returns:
        The rollout, groups in the order of the prompts. A prompt's samples are drawn alike whatever it is drawn with,
        and whichever process draws them. What is not in the share is :class:`Elsewhere`, with NaN for rewards.

    Raises:
        ValueError: the samples do not fill whole chunks, or episodes take more than one step.
    """
    chunk_size = envs[0].num_envs
    num_chunks = _num_chunks(len(prompts), draw.group_size, chunk_size)
    share = Share(tuple(range(num_chunks))) if share is None else share
    steps = sampler.stochastic_steps(torch.Generator().manual_seed(derive_seed(draw.seed, "window")))
    samples = {
        number: [divmod(i, draw.group_size) for i in range(number * chunk_size, (number + 1) * chunk_size)]
        for number in share.chunks
    }
    drawn: dict[int, Trajectory] = {}
    images: list[Images] = []
    pending: list[Future[tuple[Step, float]]] = []
    waited = 0.0
    policy.prepare([prompts[p] for p in dict.fromkeys(p for chunk in samples.values() for p, _ in chunk)])
    with _scoring_thread() as scorer:
        for turn, (number, chunk) in enumerate(samples.items()):
            env = envs[turn % len(envs)]
            if turn >= len(envs):
                waited += _wait(pending[turn - len(envs)])
            observation, _ = env.reset(options={"prompts": [prompts[p] for p, _ in chunk]})
            seeds = [derive_seed(draw.seed, "sample", p, s) for p, s in chunk]
            condition = encode_asks(policy, list(asks(observation)))
            drawn[number] = denoise(policy, condition, sampler, steps, seeds)
            images.append(policy.decode(drawn[number].x_0).cpu().numpy())
            pending.append(scorer.submit(_timed, env.step, images[-1]))
        for _ in range(share.num_idle):
            denoise(policy, policy.encode(prompts[:1]), sampler, steps, [0])
        waited += sum(map(_wait, pending))
    outcomes = {number: future.result()[0] for number, future in zip(drawn, pending, strict=True)}
    seconds = Seconds(waited, sum(future.result()[1] for future in pending))
    trajectories = [drawn.get(number, Elsewhere(chunk_size)) for number in range(num_chunks)]
    return _rollout(trajectories, outcomes, images if draw.keep_images else [], draw, seconds)


def _num_chunks(num_prompts: int, group_size: int, chunk_size: int) -> int:
    total = num_prompts * group_size
    if total == 0 or total % chunk_size:
        raise ValueError(
            f"collect: expected prompts x group_size to fill whole chunks, got {num_prompts} x {group_size} "
            f"= {total} with a chunk size of {chunk_size}; change one of the three"
        )
    return total // chunk_size


def _timed(step: Callable[[Images], Step], images: Images) -> tuple[Step, float]:
    started = perf_counter()
    return step(images), perf_counter() - started


def _wait(future: Future[tuple[Step, float]]) -> float:
    started = perf_counter()
    future.result()
    return perf_counter() - started


def _rollout(
    trajectories: Sequence[Trajectory | Elsewhere],
    outcomes: Mapping[int, Step],
    images: Sequence[Images],
    draw: Draw,
    seconds: Seconds,
) -> Rollout:
    if not all(np.all(terminated | truncated) for _, _, terminated, truncated, _ in outcomes.values()):
        raise ValueError("collect: expected episodes of one step, got one that goes on; use one turn")
    starts = list(accumulate(map(len, trajectories), initial=0))
    total = starts.pop()

    def joined(parts: Mapping[int, Any]) -> Tensor:
        """[N] of one part a chunk; NaN where a chunk has none, or is another process's."""
        values = np.full(total, np.nan, np.float32)
        for number, part in parts.items():
            values[starts[number] : starts[number] + len(trajectories[number])] = part
        return torch.from_numpy(values)

    infos: dict[int, Mapping[str, Any]] = {number: outcome[4] for number, outcome in outcomes.items()}
    components = {number: info.get("components", {}) for number, info in infos.items()}
    names = dict.fromkeys(name for known in components.values() for name in known)
    return Rollout(
        trajectories=tuple(trajectories),
        rewards=joined({number: outcome[1] for number, outcome in outcomes.items()}),
        components={
            name: joined({number: known[name] for number, known in components.items() if known.get(name) is not None})
            for name in names
        },
        group_ids=torch.arange(total) // draw.group_size,
        advantages=torch.zeros(total),
        seed=draw.seed,
        images=np.concatenate(images) if images else None,
        seconds=seconds,
        reasons={starts[n] + i: why for n, info in infos.items() for i, why in info.get("reasons", {}).items()},
    )


def _scoring_thread() -> ThreadPoolExecutor:
    """One thread on the GPU of this one: CUDA's current device is a thread's own, and the first GPU at the start."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ThreadPoolExecutor(max_workers=1)
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))


def asks(observation: Mapping[str, Any]) -> Iterator[Ask]:
    """A batched observation of an image environment, one :class:`Ask` an environment."""
    one, several = observation.get("source_image"), observation.get("source_images")
    for index, text in enumerate(observation["prompt"]):
        sources = [] if several is None else several[index]
        yield Ask(str(text), tuple(map(np.asarray, sources if one is None else [one[index]])))


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
