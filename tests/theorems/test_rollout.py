"""Rollouts and their replay: the importance ratio is exactly 1 at the weights that drew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agents.policies.scenes import ScenesPolicy
from agents.rollout import Ask, denoise, encode_asks
from agents.samplers import CPS, ODE, DanceSDE, FixedWindow, FlowSDE, RandomWindow, Sampler, log_prob

SAMPLERS: list[Sampler] = [
    FlowSDE(6),
    FlowSDE(6, shift=3.0),
    DanceSDE(6),
    CPS(6),
    CPS(6, log_prob="gaussian"),
    FlowSDE(6, window=FixedWindow(1, 2)),
    FlowSDE(6, window=RandomWindow(2, 0, 4)),
]
ASKS = [Ask("a red circle")] * 4 + [Ask("two squares")] * 4


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_ratio_is_exactly_one_at_the_rollouts_weights(
    tiny_policy: ScenesPolicy, sampler: Sampler, guidance_scale: float
) -> None:
    sampler = replace(sampler, guidance_scale=guidance_scale)
    steps = sampler.stochastic_steps(torch.Generator().manual_seed(0))
    trajectory = denoise(tiny_policy, encode_asks(tiny_policy, ASKS), sampler, steps, range(8))
    tiny_policy.transformer.requires_grad_(True)
    for index, step in enumerate(steps):
        latents, sigmas = trajectory.latents[:, index], trajectory.sigmas
        velocity = tiny_policy.velocity(latents, sigmas[step], trajectory.condition, guidance_scale)
        transition = sampler.transition(latents, velocity, sigmas, step)
        replayed = log_prob(transition, trajectory.next_latents[:, index])
        assert replayed.requires_grad
        assert torch.equal(replayed, trajectory.log_probs[:, index])


def test_chunks_of_any_size_draw_the_same_samples(tiny_policy: ScenesPolicy) -> None:
    sampler = FlowSDE(6)
    steps = sampler.stochastic_steps()
    whole = denoise(tiny_policy, encode_asks(tiny_policy, ASKS), sampler, steps, range(8))
    for size in (1, 2, 4):
        parts = [
            denoise(tiny_policy, encode_asks(tiny_policy, ASKS[i : i + size]), sampler, steps, range(i, i + size))
            for i in range(0, 8, size)
        ]
        # The noise is the same to the bit; a matrix product's last bits depend on the batch it is part of.
        assert torch.allclose(torch.cat([p.x_0 for p in parts]), whole.x_0, atol=1e-4)


def test_no_noise_is_the_ode(tiny_policy: ScenesPolicy) -> None:
    condition = encode_asks(tiny_policy, ASKS)
    ode = denoise(tiny_policy, condition, ODE(6), (), range(8))
    still = FlowSDE(6, noise_level=1e-6)
    assert torch.allclose(denoise(tiny_policy, condition, still, range(5), range(8)).x_0, ode.x_0, atol=1e-4)
    # Without stochastic steps every sampler is the ODE, to the bit.
    assert torch.equal(denoise(tiny_policy, condition, CPS(6), (), range(8)).x_0, ode.x_0)


def test_a_groups_members_differ_and_a_seed_repeats(tiny_policy: ScenesPolicy) -> None:
    condition = encode_asks(tiny_policy, ASKS[:3])
    drawn = denoise(tiny_policy, condition, FlowSDE(4), (0, 1), [7, 8, 7])
    assert torch.allclose(drawn.x_0[0], drawn.x_0[2], atol=1e-5)
    assert not torch.allclose(drawn.x_0[0], drawn.x_0[1], atol=1e-2)
