"""What SD3's transformer costs: floating-point operations of its passes, counted by torch on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agents.policies.unipic2 import KontextPolicy
from agents.types import Condition

TEXT_TOKENS = 333
_PIXELS_A_LATENT = 8


@dataclass(frozen=True)
class Passes:
    """Floating-point operations of one image (or edit) at one sigma.

    Attributes:
        forward: of a forward pass.
        update_lora: of a forward and a backward pass when adapters alone learn.
        update_full: when every parameter learns.
        recomputed: what gradient checkpointing adds to an update.
    """

    forward: int
    update_lora: int
    update_full: int
    recomputed: int


class RandomTexts:
    """A prompt encoder of random states, for where only the transformer is timed; [B, 333, D] and [B, P]."""

    def __init__(self, config: Any, device: torch.device | str, dtype: torch.dtype) -> None:
        self._sizes = (config.joint_attention_dim, config.pooled_projection_dim)
        self._device, self._dtype = device, dtype

    def encode(self, texts: Sequence[str], has_source: bool) -> tuple[Tensor, Tensor]:
        """States and pooled state of texts."""
        states, pooled = self._sizes
        make: Any = {"device": self._device, "dtype": self._dtype}
        return torch.randn(len(texts), TEXT_TOKENS, states, **make), torch.randn(len(texts), pooled, **make)

    def to(self, device: torch.device | str) -> None:
        """States are drawn on a device, and not moved."""
        self._device = device


class RandomCodec:
    """A codec that knows only the sizes."""

    def __init__(self, num_channels: int) -> None:
        self._num_channels = num_channels

    def encode(self, images: Tensor) -> Tensor:
        """Random latents of images' size."""
        height, width = images.shape[1] // _PIXELS_A_LATENT, images.shape[2] // _PIXELS_A_LATENT
        return torch.randn(len(images), self._num_channels, height, width, device=images.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Black images."""
        height, width = latents.shape[2] * _PIXELS_A_LATENT, latents.shape[3] * _PIXELS_A_LATENT
        return torch.zeros(len(latents), height, width, 3, dtype=torch.uint8)

    def to(self, device: torch.device | str) -> None:
        """Nothing to move."""


class RandomPolicy(KontextPolicy):
    """A transformer with random conditions; only the transformer can be saved.

    Forward passes are in bfloat16, by autocast where the weights are not.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of forward passes and latents."""
        return torch.bfloat16

    def conditional_velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity."""
        weights = next(self.transformer.parameters()).dtype
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=weights != torch.bfloat16):
            return super().conditional_velocity(latents, sigma, condition)

    def save(self, folder: Path) -> None:
        """Write the transformer as diffusers does."""
        transformer: Any = self.transformer
        transformer.save_pretrained(str(folder))


def random_policy(
    sizes: Mapping[str, Any], image_size: int, device: torch.device | str, dtype: torch.dtype
) -> KontextPolicy:
    """SD3's transformer with random weights and random conditions, as a policy.

    Args:
        sizes: arguments of ``SD3Transformer2DModel``.
        image_size: side of a square image in pixels.
        device: where the weights are made; on "meta" they are only counted.
        dtype: of the weights.
    """
    from diffusers import SD3Transformer2DModel

    build: Any = SD3Transformer2DModel
    with torch.device(device):
        # The method of torch itself: diffusers' own warns of layers that it would keep in float32, and has none here.
        transformer: Any = nn.Module.to(build(**sizes), dtype).eval()
    side = image_size // _PIXELS_A_LATENT
    texts, codec = RandomTexts(transformer.config, device, torch.bfloat16), RandomCodec(transformer.config.in_channels)
    return RandomPolicy(transformer, texts, codec, (image_size, image_size), (side, side))


def count_passes(sizes: Mapping[str, Any], image_size: int, num_references: int) -> Passes:
    """Count a forward pass, and a forward and a backward pass, of one image; no weight is made.

    A multiplication and an addition are two operations; only matrix products and attention are counted, as torch does.
    """
    policy = random_policy(sizes, image_size, "meta", torch.bfloat16)
    transformer: Any = policy.transformer
    side = image_size // _PIXELS_A_LATENT
    latents = torch.empty(1, transformer.config.in_channels, side, side, device="meta", dtype=torch.bfloat16)
    texts, pooled = policy.prompt_encoder.encode([""], num_references > 0)
    tensors = {"prompt_embeds": texts, "pooled": pooled}
    tensors |= {f"reference_{index}": latents for index in range(num_references)}
    forward = _count(policy, latents, tensors, requires_grad=None)
    full = _count(policy, latents, tensors, requires_grad="weights")
    lora = _count(policy, latents, tensors, requires_grad="latents")
    return Passes(forward, lora, full, forward)


def _count(policy: KontextPolicy, latents: Tensor, tensors: Mapping[str, Tensor], requires_grad: str | None) -> int:
    """Operations of one pass, with the backward pass where something learns.

    Adapters cost a hundredth of the layers that they adapt; what they need is the gradient of the activations, which is
    counted with the latents as what learns.
    """
    from agents.policies.unipic2 import kontext_velocity

    policy.transformer.requires_grad_(requires_grad == "weights")
    x = latents.detach().requires_grad_(requires_grad == "latents")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(requires_grad is not None):
        velocity = kontext_velocity(policy.transformer, x, torch.ones(1, device="meta"), tensors)
        if requires_grad is not None:
            velocity.float().square().mean().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def initialise(module: nn.Module, seed: int) -> None:
    """Small random weights, so that bfloat16 passes stay finite however deep the model is."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02, generator=generator)
