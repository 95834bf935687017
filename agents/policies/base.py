"""The contract of a flow policy: prompts in, velocities and images out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from agents.types import Condition, PromptLike, join_conditions


class FlowPolicy(ABC):
    """A flow-matching image generator seen as a policy over latents.

    ``x_sigma = (1 - sigma) x_0 + sigma noise``; the velocity is ``noise - x_0``; sigma is the only time. Everything
    about a backbone (timestep scaling, packing, VAE scaling, text encoders) stays in the subclass's own file.
    """

    @property
    @abstractmethod
    def transformer(self) -> nn.Module:
        """The network that learns. Assignable: weights are switched by replacing it."""

    @transformer.setter
    @abstractmethod
    def transformer(self, module: nn.Module) -> None: ...

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample's latents."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(height, width) of decoded images in pixels."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move every part to a device."""

    @abstractmethod
    def encode(self, prompts: Sequence[PromptLike]) -> Condition:
        """Encode prompts of one kind (all with, or all without source images), negatives included: [B, ...]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] to images, uint8 [B, height, width, 3]."""

    @abstractmethod
    def conditional_velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The network's velocity without guidance; latents [B, C, H, W], sigma [B] -> [B, C, H, W]."""

    @final
    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """The velocity, with classifier-free guidance where the scale is not 1.

        ``v = v_negative + guidance_scale (v_positive - v_negative)``, both branches in one forward pass, negatives
        first; gradients flow through both.

        Args:
            latents: [B, C, H, W].
            sigma: scalar or [B], in [0, 1].
            condition: [B].
            guidance_scale: 1 means no guidance, and one branch only.
        """
        sigma = sigma.expand(len(latents))
        if guidance_scale == 1.0:
            return self.conditional_velocity(latents, sigma, condition)
        if condition.negative is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a condition with a negative branch; it has none")
        both = join_conditions([condition.negative, Condition(condition.tensors)])
        velocity = self.conditional_velocity(torch.cat([latents, latents]), torch.cat([sigma, sigma]), both)
        negative, positive = velocity.chunk(2)
        return negative + guidance_scale * (positive - negative)

    @property
    @final
    def dtype(self) -> torch.dtype:
        """The transformer's, and that of latents and conditions; SDE arithmetic is fp32 whatever it is."""
        return next(self.transformer.parameters()).dtype

    @property
    @final
    def device(self) -> torch.device:
        """Where the transformer lives."""
        return next(self.transformer.parameters()).device
