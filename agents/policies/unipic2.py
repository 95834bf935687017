"""UniPic2-SD3.5M-Kontext: SD3's transformer with a reference image in the same sequence (arXiv:2509.04548).

The weights are those of ``SD3Transformer2DModel``, key for key: nothing is added but a second input. The tiny policy
of the embedded world and the published 2-billion-parameter model are this one function at two sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from agents.policies.base import FlowPolicy
from agents.policies.pictures import references
from agents.types import Condition, PromptLike


def kontext_forward(
    transformer: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    pooled: Tensor,
    reference_latents: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """SD3's velocity, with the references' tokens before the target's.

    A reference goes through the target's own patch embedding, positions included, shares its timestep, and is dropped
    after the last block; without one this is SD3's own forward pass. Blocks are checkpointed where the transformer's
    ``gradient_checkpointing`` is on, as in that pass.

    Differs: the release takes one reference; here several stand one after the other, nothing but their content telling
    them apart. With one it is the release's pass.

    Args:
        transformer: diffusers' SD3 transformer, unchanged.
        latents: noisy target, [B, C, H, W].
        timestep: 1000 sigma, [B].
        prompt_embeds: text states, [B, L, D].
        pooled: pooled text state, [B, P].
        reference_latents: clean references of the target's shape, [B, C, H, W] each; one, several or None.

    Returns:
        Velocity, [B, C, H, W].

    Raises:
        ValueError: a reference has another shape than the target.
    """
    # The submodules are diffusers' own; as attributes of an nn.Module they are untyped.
    parts: Any = transformer
    references = [reference_latents] if isinstance(reference_latents, Tensor) else list(reference_latents or ())
    for reference in references:
        if reference.shape != latents.shape:
            raise ValueError(
                f"reference_latents: expected the target's shape {tuple(latents.shape)}, "
                f"got {tuple(reference.shape)}; resize the source image to the output's size"
            )
    sequence = [parts.pos_embed(image) for image in (*references, latents)]
    num_target_tokens = sequence[-1].shape[1]
    tokens, text = torch.cat(sequence, dim=1), parts.context_embedder(prompt_embeds)
    temb = parts.time_text_embed(timestep, pooled)
    is_checkpointed = parts.gradient_checkpointing and torch.is_grad_enabled()
    for block in parts.transformer_blocks:
        if is_checkpointed:
            text, tokens = parts._gradient_checkpointing_func(block, tokens, text, temb)
        else:
            text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=temb)
    tokens = tokens[:, -num_target_tokens:]
    patches = parts.proj_out(parts.norm_out(tokens, temb))
    return _unpatchify(patches, latents.shape, parts.config.patch_size)


def kontext_velocity(transformer: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """:func:`kontext_forward` on a condition's tensors.

    Args:
        transformer: diffusers' SD3 transformer.
        latents: [B, C, H, W].
        sigma: [B].
        tensors: ``prompt_embeds`` [B, L, D], ``pooled`` [B, P], and in editing ``reference_0``, ``reference_1``, ...,
            [B, C, H, W] each.
    """
    texts = tensors["prompt_embeds"], tensors["pooled"]
    return kontext_forward(transformer, latents, sigma * 1000, *texts, references(tensors))


def edit_size(source_size: tuple[int, int], longer_edge: int = 512, factor: int = 32) -> tuple[int, int]:
    """The size at which UniPic 2.0's released scripts edit a picture, and at which its source is shown to the model.

    The longer side becomes ``longer_edge``, the other keeps the proportions as far as multiples of ``factor`` allow.
    Differs: never less than one multiple.

    Args:
        source_size: (height, width) in pixels.
        longer_edge: in pixels.
        factor: in pixels.

    Returns:
        (height, width).
    """
    longer = max(source_size)

    def side(length: int) -> int:
        return (
            longer_edge if length == longer else max(factor, round(length * (longer_edge / longer) / factor) * factor)
        )

    return side(source_size[0]), side(source_size[1])


def num_channels(transformer: nn.Module) -> int:
    """Latent channels of an SD3 transformer."""
    config: Any = transformer.config
    return int(config.in_channels)


def check_positions(transformer: nn.Module, pixels_per_latent: int, image_size: tuple[int, int]) -> None:
    """Whether an SD3 transformer's table of positions holds a size: 6144 pixels a side for SD3.5, 1536 for SD3.

    Args:
        transformer: SD3's.
        pixels_per_latent: the side of what its VAE makes one latent of.
        image_size: (height, width) in pixels.

    Raises:
        ValueError: it does not.
    """
    config: Any = transformer.config
    largest = config.pos_embed_max_size * config.patch_size * pixels_per_latent
    for name, side in zip(("height", "width"), image_size, strict=True):
        if side > largest:
            raise ValueError(f"{name}: expected at most {largest} pixels for these weights' positions, got {side}")


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
            tensors["reference_0"] = references
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
        return kontext_velocity(self._transformer, latents, sigma, condition.tensors)
