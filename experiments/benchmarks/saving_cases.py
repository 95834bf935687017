"""What the library does once, or not at all, and what that is worth: seconds without it over seconds with it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from agents.samplers import FixedWindow
from agents.types import Trajectory
from experiments.benchmarks.timing import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable

    from experiments.benchmarks.backbone_savings import Bench


def savings(bench: Bench) -> dict[str, NDArray[np.float64]]:
    """Ratios by saving, [repeats] each; the last is of memory, one number."""
    return {
        "a prompt's embedding shared by its group": _embedding(bench),
        "two of the steps stochastic (window), updates": _window(bench),
        "all steps replayed in one forward pass, updates": _batched_replay(bench),
        "old log-probabilities kept from the rollout, updates": _kept_log_probs(bench),
        "reference by a disabled adapter, weights held": _reference(bench),
    }


def _ratio(bench: Bench, without: Callable[[], object], having: Callable[[], object]) -> NDArray[np.float64]:
    seconds = interleaved({"without": without, "having": having}, bench.options.repeats)
    return seconds["without"] / seconds["having"]


def _embedding(bench: Bench) -> NDArray[np.float64]:
    """Both branches' texts of a rollout, embedded a sample each or each distinct one once."""
    policy = bench.policy()
    texts = [*bench.texts, *[""] * len(bench.texts)]

    def embed(chosen: list[str]) -> None:
        with torch.no_grad():
            policy.embed_prompts(chosen, [()] * len(chosen))

    return _ratio(bench, lambda: embed(texts), lambda: embed(list(dict.fromkeys(texts))))


def _window(bench: Bench) -> NDArray[np.float64]:
    policy = bench.policy()
    whole = bench.update(policy, bench.rollout(policy))
    other = bench.policy()
    sampler = replace(bench.sampler, window=FixedWindow(0, 2))
    windowed = bench.update(other, bench.rollout(other, sampler), rollout_sampler=sampler)
    return _ratio(bench, whole, windowed)


def _batched_replay(bench: Bench) -> NDArray[np.float64]:
    first, second = bench.policy(), bench.policy()
    one_by_one = bench.update(first, bench.rollout(first))
    count = bench.options.num_inference_steps - 1
    together = bench.update(second, bench.rollout(second), steps_per_forward=count)
    return _ratio(bench, one_by_one, together)


def _kept_log_probs(bench: Bench) -> NDArray[np.float64]:
    """The update with one more forward pass a step, as where old log-probabilities are computed again."""
    policy = bench.policy()
    rollout = bench.rollout(policy)
    update = bench.update(policy, rollout)
    (trajectory,) = rollout.trajectories
    assert isinstance(trajectory, Trajectory)

    def again() -> None:
        with torch.no_grad():
            for index, step in enumerate(trajectory.steps):
                x, sigma = trajectory.latents[:, index], trajectory.sigmas[step]
                policy.velocity(x, sigma, trajectory.condition, bench.sampler.guidance_scale)
        update()

    return _ratio(bench, again, update)


def _reference(bench: Bench) -> NDArray[np.float64]:
    """Bytes of the transformer and its copy over bytes of the transformer and both adapters."""
    from agents.policies.weights import LoraSettings, LoraWeights

    policy = bench.policy()
    base = _bytes(policy.transformer)
    LoraWeights(policy, LoraSettings(), ("reference",))
    adapter = (_bytes(policy.transformer) - base) / 2
    return np.array([(2 * base + adapter) / (base + 2 * adapter)])


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
