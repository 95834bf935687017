"""The schedules of diffusers' flow-matching schedulers, for policies on published pipelines."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROUNDING = 1e-6


def scheduler_sigmas(
    scheduler: Any, num_inference_steps: int, mu: float | None = None, sigmas: Sequence[float] | None = None
) -> Tensor:
    """What a pipeline's scheduler would step through.

    Args:
        scheduler: diffusers' ``FlowMatchEulerDiscreteScheduler``; it is left as it was.
        num_inference_steps: T.
        mu: of its dynamic shift, which :func:`dynamic_mu` computes; None where the shift is static.
        sigmas: the unshifted grid that some pipelines give, T values; the scheduler's own where None.

    Returns:
        [T + 1] on the CPU, float32, falling from 1 to exactly 0. The first is exactly 1 where it is but for the
        scheduler's rounding: at any other sigma ``FlowSDE`` divides by ``1 - sigma``.

    Raises:
        ValueError: T is 1 where the scheduler prescribes its first and its last step's sigma.
    """
    if scheduler.config.shift_terminal and num_inference_steps < 2:
        raise ValueError(
            f"num_inference_steps: expected 2 or more, got {num_inference_steps}: this model's first and last steps "
            f"start at 1 and at {scheduler.config.shift_terminal}"
        )
    own = copy.deepcopy(scheduler)
    arguments = {} if mu is None else {"mu": mu}
    if sigmas is None:
        own.set_timesteps(num_inference_steps, device="cpu", **arguments)
    else:
        own.set_timesteps(sigmas=list(sigmas), device="cpu", **arguments)
    result: Tensor = own.sigmas.to("cpu", torch.float32)
    if abs(float(result[0]) - 1) < _ROUNDING:
        result[0] = 1.0
    return result


def dynamic_mu(scheduler: Any, num_tokens: int) -> float | None:
    """The dynamic shift's mu, linear in the number of image tokens; None where the scheduler's shift is static.

    SD3 and FLUX (arXiv:2403.03206, section 5.3.2, as published in code): ``base_shift`` at ``base_image_seq_len``
    tokens, ``max_shift`` at ``max_image_seq_len``.
    """
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return None
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    return float(slope * num_tokens + (config.base_shift - slope * low))


def even_sigmas(num_inference_steps: int) -> list[float]:
    """The grid that most pipelines hand to their schedulers to be shifted: T equal steps from 1 down to 1 / T."""
    grid: list[float] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
    return grid


def pipeline_timestep(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Sigma [B] as most pipelines hand it to their transformers: rounded to the latents' dtype as a timestep."""
    return (sigma * 1000).to(dtype) / 1000


def scheduler_shift(scheduler: Any, mu: float | None = None) -> float:
    """The shift that :func:`agents.flow.shift_sigmas` takes: the static one, or that of a mu (its exponential)."""
    if mu is None:
        return float(scheduler.shift)
    return math.exp(mu) if scheduler.config.time_shift_type == "exponential" else mu
