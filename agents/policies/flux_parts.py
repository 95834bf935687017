"""What FLUX.1 and FLUX.2 share: the pipelines' grid of sigmas, their timesteps, pixels and references."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def even_sigmas(num_inference_steps: int) -> list[float]:
    """The grid that the pipelines hand to their schedulers to be shifted: T equal steps from 1 down to 1 / T."""
    grid: list[float] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
    return grid


def pipeline_timestep(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Sigma [B] as the pipelines hand it to their transformers: rounded to the latents' dtype as a timestep."""
    return (sigma * 1000).to(dtype) / 1000


def pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images, uint8 [B, H, W, 3], to what a VAE encodes: [-1, 1], [B, 3, H, W]."""
    return (images.permute(0, 3, 1, 2).float() / 255 * 2 - 1).to(dtype)


def references(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """A condition's reference latents in order, each [B, C, h, w]; none in text-to-image."""
    count = sum(name.startswith("reference_") for name in tensors)
    return [tensors[f"reference_{index}"] for index in range(count)]
