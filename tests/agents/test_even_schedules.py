"""Even schedules that shift with the image's tokens: diffusers' own numbers, and a first sigma of exactly 1."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from agents.policies.schedules import dynamic_mu, even_sigmas, scheduler_shift, scheduler_sigmas
from agents.samplers import FlowSDE

FlowMatchEulerDiscreteScheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize("num_tokens", [16, 256, 1024, 4096])
def test_mu_is_the_pipelines(num_tokens: int) -> None:
    plain = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    own = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
    )
    assert dynamic_mu(plain, num_tokens) == pytest.approx(calculate_shift(num_tokens))
    assert dynamic_mu(own, num_tokens) == pytest.approx(calculate_shift(num_tokens, 256, 8192, 0.5, 0.9))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_the_shift_it_is_called(kind: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    shift, even = scheduler_shift(scheduler, 0.8), np.linspace(1, 1 / 5, 5)
    assert shift == pytest.approx(np.exp(0.8) if kind == "exponential" else 0.8)
    assert np.allclose(
        scheduler_sigmas(scheduler, 5, 0.8, even_sigmas(5)), [*(shift * even / (1 + (shift - 1) * even)), 0], atol=1e-6
    )


@pytest.mark.parametrize("shift", [1.57, 2.07, 4.03])
def test_the_first_sigma_is_one_where_the_scheduler_rounds_it(shift: float) -> None:
    """One shift in ten misses 1 by a rounding, and ``1 / (1 - sigma)`` would be millions, or negative."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=even_sigmas(4))
    assert scheduler.sigmas[0] != 1
    sigmas = scheduler_sigmas(scheduler, 4, None, even_sigmas(4))
    assert sigmas[0] == 1
    assert torch.equal(sigmas[1:], scheduler.sigmas[1:])
    x = torch.zeros(1, 2, 2, 2)
    assert FlowSDE(4).transition(x, x, sigmas, 0).std < 3


def test_the_scheduler_that_is_asked_stays_as_it_was() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    before = scheduler.sigmas.clone()
    scheduler_sigmas(scheduler, 3, 0.7, even_sigmas(3))
    assert torch.equal(scheduler.sigmas, before)
