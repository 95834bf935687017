"""Pictures in policies on published pipelines: prompts' sources, the references of a condition, both ends of a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.policies.embeddings import content_hash
from agents.samplers import derive_seed, sample_noise
from agents.types import PromptLike


def check_sources(prompts: Sequence[PromptLike], image_size: tuple[int, int], most: int | None, model: str) -> None:
    """A model takes the source images of prompts.

    Args:
        prompts: any number of them.
        image_size: (height, width) that each source image must have.
        most: source images a prompt may have; None is any number.
        model: the model's name, for the message.

    Raises:
        ValueError: it does not.
    """
    found = max((len(prompt.source_images) for prompt in prompts), default=0)
    if most is not None and found > most:
        raise ValueError(
            f"source images: expected at most {most} a prompt for {model}, got {found}; "
            "docs/backbones.md says which models edit, and with how many"
        )
    shapes = {np.asarray(image).shape for prompt in prompts for image in prompt.source_images}
    if shapes - {(*image_size, 3)}:
        raise ValueError(f"source images: expected shape {(*image_size, 3)}, got {sorted(shapes)}")


def check_same_number_of_sources(prompts: Sequence[PromptLike]) -> None:
    """All prompts of a batch have as many source images.

    Raises:
        ValueError: they do not.
    """
    counts = {len(prompt.source_images) for prompt in prompts}
    if len(counts) > 1:
        raise ValueError(
            f"prompts: expected as many source images for each, got {sorted(counts)} images a prompt; encode them apart"
        )


def references(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """A condition's reference latents in order, each [B, C, h, w]; none in text-to-image."""
    count = sum(name.startswith("reference_") for name in tensors)
    return [tensors[f"reference_{index}"] for index in range(count)]


def pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images, uint8 [B, H, W, 3], to what a VAE encodes: [-1, 1], [B, 3, H, W]."""
    return (images.permute(0, 3, 1, 2).float() / 255 * 2 - 1).to(dtype)


def drawn_latents(vae: Any, images: Tensor) -> Tensor:
    """Images, uint8 [B, H, W, 3], to ``(z - shift) scaling`` [B, C, h, w], z drawn from the VAE's Gaussian.

    The draw's seed is a hash of the image, so that an image has one encoding at any time and place.
    """
    gaussian = vae.encode((images.permute(0, 3, 1, 2).float() / 127.5 - 1).to(vae.dtype)).latent_dist
    seeds = [derive_seed("source", content_hash(image.cpu().numpy())) for image in images]
    noise = sample_noise(seeds, gaussian.mean.shape[1:], gaussian.mean.device)
    drawn = gaussian.mean + gaussian.std * noise.to(gaussian.mean.dtype)
    latents: Tensor = (drawn - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] to a VAE's images of ``latents / scaling + shift``, in [-1, 1], [B, 3, H, W]."""
    images: Tensor = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    return images
