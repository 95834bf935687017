"""What the KL to the reference is divided by: the step's variance, or what the published code has in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agents import samplers
from agents.algorithms.base import Learning
from agents.algorithms.flow_grpo import FlowGRPO
from agents.functional import KLDivisor
from agents.policies.scenes import ScenesPolicy
from agents.policies.weights import FullWeights
from agents.rollout import denoise
from agents.samplers import CPS, ODE, DanceSDE, FlowSDE, Sampler
from agents.types import Chunk
from rewards.base import Prompt

DIVISORS: list[KLDivisor] = ["variance", "diffusion"]


def chunk_of(policy: ScenesPolicy, sampler: Sampler) -> Chunk:
    """Two samples with advantage 0, so that the KL is all there is of a loss."""
    condition = policy.encode([Prompt("a red circle", id="0")]).repeat_interleave(2)
    with torch.no_grad():
        trajectory = denoise(policy, condition, sampler, sampler.stochastic_steps(), seeds=[0, 1])
    return Chunk(trajectory, torch.zeros(2), (0, 1))


def move_from_reference(weights: FullWeights) -> None:
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(0.01)


def kl_and_loss(policy: ScenesPolicy, weights: FullWeights, chunk: Chunk, algorithm: FlowGRPO) -> tuple[float, float]:
    learning = Learning(policy, weights, 0, {})
    losses = sum(float(loss.detach()) for loss in algorithm.losses(learning, chunk))
    values = learning.metrics["kl_loss"]
    return sum(values) / len(values), losses


def test_both_divisors_by_hand() -> None:
    """g = 2 at sigma .8, dt = -.3: std^2 = 1.2; velocities 2 apart are means .3 (1 + 4 .2 / 1.6) 2 = .9 apart."""
    x, g = torch.zeros(1, 3), samplers.flow_sde_g(1.0)
    step, reference = (samplers.sde_transition(x, torch.full((1, 3), v), 0.8, 0.5, g) for v in (2.0, 0.0))
    assert step.diffusion is not None
    assert step.diffusion.item() == pytest.approx(2.0)
    assert samplers.kl(step, reference).item() == pytest.approx(0.81 / 2 / 1.2)
    assert samplers.kl(step, reference, "variance").item() == pytest.approx(0.81 / 2 / 1.2)
    assert samplers.kl(step, reference, "diffusion").item() == pytest.approx(0.81 / 2 / 4)


@pytest.mark.parametrize("sampler", [FlowSDE(), FlowSDE(shift=3.0), DanceSDE()], ids=str)
def test_published_divisor_leaves_the_steps_size_out(sampler: Sampler) -> None:
    generator = torch.Generator().manual_seed(0)
    x, velocity, other = torch.randn(3, 2, 4, 5, 5, generator=generator)
    sigmas = sampler.sigmas()
    for index in sampler.stochastic_steps():
        step, reference = (sampler.transition(x, v, sigmas, index) for v in (velocity, other))
        size = sigmas[index] - sigmas[index + 1]
        published = samplers.kl(step, reference, "diffusion")
        torch.testing.assert_close(published, size * samplers.kl(step, reference))
        assert torch.equal(samplers.kl(step, step, "diffusion"), torch.zeros(2))


@pytest.mark.parametrize("divisor", DIVISORS)
def test_the_loss_has_the_kl_by_its_divisor(tiny_policy: ScenesPolicy, divisor: KLDivisor) -> None:
    """One stochastic step, from 1 to .5: half as much where its size is left out."""
    sampler, weights = FlowSDE(2), FullWeights(tiny_policy)
    chunk = chunk_of(tiny_policy, sampler)
    algorithm = FlowGRPO(sampler, kl_coef=0.04, kl_divisor=divisor)
    assert kl_and_loss(tiny_policy, weights, chunk, algorithm) == (0.0, 0.0)
    move_from_reference(weights)
    variance, _ = kl_and_loss(tiny_policy, weights, chunk, FlowGRPO(sampler, kl_coef=0.04))
    kl, loss = kl_and_loss(tiny_policy, weights, chunk, algorithm)
    assert variance > 0
    assert kl == pytest.approx({"variance": 1.0, "diffusion": 0.5}[divisor] * variance)
    assert loss == pytest.approx(0.04 * kl)


def test_each_step_has_its_own_size(tiny_policy: ScenesPolicy) -> None:
    """A shifted schedule's steps differ: the ratio of the two losses is between the smallest and the largest."""
    sampler, weights = FlowSDE(4, shift=3.0), FullWeights(tiny_policy)
    chunk = chunk_of(tiny_policy, sampler)
    move_from_reference(weights)
    losses = {
        divisor: kl_and_loss(tiny_policy, weights, chunk, FlowGRPO(sampler, kl_divisor=divisor))[1]
        for divisor in DIVISORS
    }
    sigmas = sampler.sigmas()
    sizes = (sigmas[:-1] - sigmas[1:])[list(sampler.stochastic_steps())]
    assert sizes.min() < losses["diffusion"] / losses["variance"] < sizes.max()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kl_divisor": "published"}, "kl_divisor: expected one of variance, diffusion, got 'published'"),
        ({"kl_divisor": "diffusion", "rollout_sampler": CPS()}, 'expected "variance" for a sampler .* with CPS'),
        ({"kl_divisor": "diffusion", "rollout_sampler": ODE()}, "no stochastic step"),
    ],
)
def test_a_divisor_that_cannot_be_is_refused_at_construction(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FlowGRPO(**settings)


def test_a_step_without_g_has_no_such_kl() -> None:
    x = torch.zeros(1, 2)
    step = CPS().transition(x, x, CPS().sigmas(), 0)
    assert samplers.kl(step, step).item() == 0
    with pytest.raises(ValueError, match=r"got one without g; use .variance."):
        samplers.kl(step, step, "diffusion")


def test_the_default_is_what_a_run_had_before_there_was_a_choice() -> None:
    assert FlowGRPO().kl_divisor == "variance"
