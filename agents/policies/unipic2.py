"""UniPic2-SD3.5M-Kontext: SD3's transformer with a reference image in the same sequence (arXiv:2509.04548).

The weights are those of ``SD3Transformer2DModel``, key for key: nothing is added but a second input. The tiny policy
of the embedded world and the published 2-billion-parameter model are this one function at two sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from agents.policies.base import FlowPolicy
from agents.types import Condition, PromptLike


def kontext_forward(
    transformer: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    pooled: Tensor,
    reference_latents: Tensor | None = None,
) -> Tensor:
    """SD3's velocity, with the reference's tokens before the target's.

    The reference goes through the target's own patch embedding, positions included, shares its timestep, and is
    dropped after the last block; without one this is SD3's own forward pass.

    Args:
        transformer: diffusers' SD3 transformer, unchanged.
        latents: noisy target, [B, C, H, W].
        timestep: 1000 sigma, [B].
        prompt_embeds: text states, [B, L, D].
        pooled: pooled text state, [B, P].
        reference_latents: clean reference of the target's shape, [B, C, H, W], or None.

    Returns:
        Velocity, [B, C, H, W].
    """
    # The submodules are diffusers' own; as attributes of an nn.Module they are untyped.
    parts: Any = transformer
    tokens = parts.pos_embed(latents)
    num_target_tokens = tokens.shape[1]
    if reference_latents is not None:
        if reference_latents.shape != latents.shape:
            raise ValueError(
                f"reference_latents: expected the target's shape {tuple(latents.shape)}, "
                f"got {tuple(reference_latents.shape)}; resize the source image to the output's size"
            )
        tokens = torch.cat([parts.pos_embed(reference_latents), tokens], dim=1)
    temb = parts.time_text_embed(timestep, pooled)
    text = parts.context_embedder(prompt_embeds)
    for block in parts.transformer_blocks:
        text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=temb)
    tokens = tokens[:, -num_target_tokens:]
    patches = parts.proj_out(parts.norm_out(tokens, temb))
    return _unpatchify(patches, latents.shape, parts.config.patch_size)


def num_channels(transformer: nn.Module) -> int:
    """Latent channels of an SD3 transformer."""
    config: Any = transformer.config
    return int(config.in_channels)


def _unpatchify(patches: Tensor, shape: torch.Size, patch_size: int) -> Tensor:
    """[B, (H/p)(W/p), p p C] -> [B, C, H, W]."""
    batch, _, height, width = shape
    grid = patches.reshape(batch, height // patch_size, width // patch_size, patch_size, patch_size, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


Device = torch.device | str


class PromptEncoder(Protocol):
    """Texts to (states [B, L, D], pooled [B, P]); the length may depend on whether there is a source image."""

    def encode(self, texts: Sequence[str], has_source: bool) -> tuple[Tensor, Tensor]:
        """Encode a batch of texts."""
        ...

    def to(self, device: Device, /) -> Any:
        """Move to a device."""
        ...


class ImageCodec(Protocol):
    """Images uint8 [B, H, W, 3] to latents [B, C, h, w] and back."""

    def encode(self, images: Tensor) -> Tensor:
        """Images to latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images."""
        ...

    def to(self, device: Device, /) -> Any:
        """Move to a device."""
        ...


class KontextPolicy(FlowPolicy):
    """SD3 with Kontext conditioning: text-to-image without, editing with a source image; one set of weights.

    The negative branch of guidance has an empty prompt and, in editing, the same reference (UniPic 2.0's released
    pipeline feeds the reference to both branches).
    """

    def __init__(
        self,
        transformer: nn.Module,
        prompt_encoder: PromptEncoder,
        codec: ImageCodec,
        image_size: tuple[int, int],
        latent_size: tuple[int, int],
    ) -> None:
        self._transformer = transformer
        self.prompt_encoder = prompt_encoder
        self.codec = codec
        self._image_size = image_size
        self._latent_shape = (num_channels(transformer), *latent_size)

    @property
    def transformer(self) -> nn.Module:
        """SD3's transformer."""
        return self._transformer

    @transformer.setter
    def transformer(self, module: nn.Module) -> None:
        self._transformer = module

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self._latent_shape

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._image_size

    def to(self, device: Device) -> None:
        """Move transformer, prompt encoder and codec to a device."""
        for part in (self._transformer, self.prompt_encoder, self.codec):
            part.to(device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[PromptLike]) -> Condition:
        """Encode prompts, all with one source image or all without: [B]."""
        references = self._references(prompts)
        texts = [prompt.text for prompt in prompts]
        positive = self.embed(texts, references)
        return Condition(positive, Condition(self.embed([""] * len(texts), references)))

    def embed(self, texts: Sequence[str], references: Tensor | None) -> dict[str, Tensor]:
        """Texts and reference latents to one branch's tensors; gradients reach the prompt encoder."""
        states, pooled = self.prompt_encoder.encode(texts, references is not None)
        tensors = {"prompt_embeds": states, "pooled": pooled}
        if references is not None:
            tensors["reference_latents"] = references
        return {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}

    def _references(self, prompts: Sequence[PromptLike]) -> Tensor | None:
        counts = {len(prompt.source_images) for prompt in prompts}
        if counts == {0}:
            return None
        if counts != {1}:
            raise ValueError(
                f"prompts: expected all with one source image or all without, got {sorted(counts)} images a prompt; "
                "encode the two tasks apart"
            )
        shapes = {prompt.source_images[0].shape for prompt in prompts}
        if shapes != {(*self.image_size, 3)}:
            raise ValueError(f"source images: expected shape {(*self.image_size, 3)}, got {sorted(shapes)}")
        images = np.stack([np.asarray(prompt.source_images[0]) for prompt in prompts])
        return self.codec.encode(torch.from_numpy(images).to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images, uint8 [B, height, width, 3]."""
        with torch.no_grad():
            return self.codec.decode(latents)

    def conditional_velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity at timestep ``1000 sigma``."""
        tensors = condition.tensors
        return kontext_forward(
            self._transformer,
            latents,
            sigma * 1000,
            tensors["prompt_embeds"],
            tensors["pooled"],
            tensors.get("reference_latents"),
        )
