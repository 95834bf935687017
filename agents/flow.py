"""The identities of rectified flow, as pure functions.

``x_sigma = (1 - sigma) x_0 + sigma noise`` and ``velocity = noise - x_0``; ``sigma`` in [0, 1] is the only time,
1 is pure noise and 0 is clean. Rectified flow (arXiv:2209.03003), with SD3's schedules (arXiv:2403.03206).
All arithmetic is fp32 whatever the dtype of the inputs, and all results are fp32.

Shapes: B samples, ... the latent dimensions, T denoising steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def broadcast_sigma(sigma: Tensor | float, like: Tensor) -> Tensor:
    """``sigma`` as fp32, shaped to multiply ``like``.

    Args:
        sigma: a number, a tensor [] or [B], or one that already has as many dimensions as ``like``.
        like: the tensor it will meet, [B, ...].

    Returns:
        [] for a scalar, [B, 1, ...] for a vector.

    Raises:
        ValueError: if ``sigma`` is neither a scalar nor one value for each sample.
    """
    tensor = torch.as_tensor(sigma, dtype=torch.float32)
    if tensor.ndim == 0:
        # A scalar stays on its device: torch multiplies a CPU scalar into any tensor, without a synchronisation.
        return tensor
    tensor = tensor.to(like.device)
    if tensor.ndim == like.ndim and like.ndim > 1:
        return tensor
    if tensor.shape != like.shape[:1]:
        raise ValueError(
            f"sigma: expected a scalar or one value a sample, shape [{like.shape[0]}], got shape {list(tensor.shape)}"
            f" for latents {list(like.shape)}; pass sigmas[k] for a whole batch at step k"
        )
    return tensor.view(-1, *[1] * (like.ndim - 1))


def interpolate(x_0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """The forward process, ``x_sigma = (1 - sigma) x_0 + sigma noise``.

    Args:
        x_0: clean latents, [B, ...].
        noise: standard normal, [B, ...].
        sigma: [] or [B].

    Returns:
        Noisy latents, [B, ...].
    """
    sigma = broadcast_sigma(sigma, x_0)
    return (1 - sigma) * x_0.float() + sigma * noise.float()


def velocity_target(x_0: Tensor, noise: Tensor) -> Tensor:
    """What a flow model regresses on, ``velocity = noise - x_0 = d x_sigma / d sigma``. [B, ...] -> [B, ...]."""
    return noise.float() - x_0.float()


def x_0_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """The clean latents that a velocity implies, ``x_0 = x - sigma velocity``. [B, ...] -> [B, ...]."""
    return x.float() - broadcast_sigma(sigma, x) * velocity.float()


def noise_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """The noise that a velocity implies, ``noise = x + (1 - sigma) velocity``. [B, ...] -> [B, ...]."""
    return x.float() + (1 - broadcast_sigma(sigma, x)) * velocity.float()


def score_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """The score that a velocity implies, ``grad log p_sigma(x) = -(x + (1 - sigma) velocity) / sigma``.

    Infinite at ``sigma = 0``, where a clean image has no smoothed density. [B, ...] -> [B, ...].
    """
    return -noise_from_velocity(x, velocity, sigma) / broadcast_sigma(sigma, x)


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """Move the schedule towards noise, ``sigma' = shift sigma / (1 + (shift - 1) sigma)``.

    SD3 (arXiv:2403.03206), Eq. 23. The end points 0 and 1 stay exactly where they are.

    Args:
        sigma: any shape, in [0, 1].
        shift: positive; 1 changes nothing, 3 is SD3's.

    Returns:
        The shape of ``sigma``.

    Raises:
        ValueError: if ``shift`` is not a positive number.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift: expected a positive number, got {shift}; 1.0 leaves the schedule as it is")
    sigma = sigma.float()
    # The denominator is written so that sigma = 1 gives shift / shift, which is 1 without rounding.
    return shift * sigma / (shift * sigma + (1 - sigma))


def linear_sigmas(num_inference_steps: int, shift: float = 1.0) -> Tensor:
    """The sampling schedule, T + 1 equal steps from 1 down to 0, then shifted.

    Differs: diffusers' SD3 scheduler spends its last step on sigma = 0.009 (at shift 3); this grid is even before the
    shift, as FLUX's is.

    Args:
        num_inference_steps: T, at least 1.
        shift: see ``shift_sigmas``.

    Returns:
        [T + 1] on the CPU, strictly falling, first exactly 1 and last exactly 0.

    Raises:
        ValueError: if T is less than 1 or ``shift`` is not positive.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: expected at least 1, got {num_inference_steps}; 10 is a usual choice")
    return shift_sigmas(torch.linspace(1, 0, num_inference_steps + 1), shift)


def uniform_sigmas(num_samples: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Training times ``sigma ~ U(0, 1]``, then shifted. Never 0, so the score and 1/sigma stay finite.

    Args:
        num_samples: B.
        generator: where the draw comes from; the result lies on its device.
        shift: see ``shift_sigmas``.

    Returns:
        [B].
    """
    uniform = torch.rand(num_samples, generator=generator, device=generator.device)
    return shift_sigmas(1 - uniform, shift)


def logit_normal_sigmas(
    num_samples: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Training times ``sigma = sigmoid(mean + std z)``, ``z ~ N(0, 1)``, then shifted.

    SD3 (arXiv:2403.03206), section 3.1: puts the training where the velocity is hardest to tell, the middle.

    Args:
        num_samples: B.
        generator: where the draw comes from; the result lies on its device.
        mean: of the logit; positive prefers noise.
        std: of the logit, positive.
        shift: see ``shift_sigmas``.

    Returns:
        [B].

    Raises:
        ValueError: if ``std`` is not positive.
    """
    if not std > 0:
        raise ValueError(f"std: expected a positive number, got {std}; SD3 uses 1.0")
    normal = torch.randn(num_samples, generator=generator, device=generator.device)
    return shift_sigmas(torch.sigmoid(mean + std * normal), shift)
