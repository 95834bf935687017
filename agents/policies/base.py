"""The contract of a flow policy: prompts in, velocities and images out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from agents.flow import linear_sigmas
from agents.policies.sharding import as_forward
from agents.samplers import Sampler
from agents.types import Condition, PromptLike, join_conditions

# Flow-GRPO's adapted layers for SD3 (arXiv:2505.05470): the joint attention, as diffusers names its layers in every
# backbone that has it; not SD3.5's second attention and not the MLPs.
JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class FlowPolicy(ABC):
    """A flow-matching image generator seen as a policy over latents.

    ``x_sigma = (1 - sigma) x_0 + sigma noise``; the velocity is ``noise - x_0``; sigma is the only time. Everything
    about a backbone (timestep scaling, packing, VAE scaling, text encoders) stays in the subclass's own file.
    """

    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    """Ends of the names of the linear layers that adapters go into, where ``LoraSettings`` names none."""

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
    def save(self, folder: Path) -> None:
        """Write the policy as a folder that it can be loaded from."""

    def prepare(self, prompts: Sequence[PromptLike]) -> None:  # noqa: B027
        """Called with all prompts of a rollout before the first of them is encoded; nothing by default.

        A backbone with large text encoders embeds them here in one go, so that the encoders visit the device once.
        """

    @property
    def own_shift(self) -> float:
        """The shift of the backbone's own schedule at its image size, for samplers that give none."""
        return 1.0

    def own_sigmas(self, num_inference_steps: int) -> Tensor:
        """The backbone's own schedule at its image size, [T + 1] on the CPU, falling from 1 to 0."""
        return linear_sigmas(num_inference_steps, self.own_shift)

    @final
    def sigmas(self, sampler: Sampler) -> Tensor:
        """The schedule that a sampler is to follow: its own, or the backbone's where its shift is None."""
        return self.own_sigmas(sampler.num_inference_steps) if sampler.shift is None else sampler.sigmas()

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

        ``v = v_negative + guidance_scale (v_positive - v_negative)`` unless :meth:`guide` says otherwise, both branches
        in one forward pass, negatives first; gradients flow through both.

        Args:
            latents: [B, C, H, W].
            sigma: scalar or [B], in [0, 1].
            condition: [B].
            guidance_scale: 1 means no guidance, and one branch only.
        """
        sigma = sigma.expand(len(latents))
        if guidance_scale == 1.0:
            return as_forward(self.transformer, self.conditional_velocity, latents, sigma, condition)
        if condition.negative is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a condition with a negative branch; it has none")
        both = join_conditions([condition.negative, Condition(condition.tensors)])
        twice = torch.cat([latents, latents]), torch.cat([sigma, sigma]), both
        velocity = as_forward(self.transformer, self.conditional_velocity, *twice)
        negative, positive = velocity.chunk(2)
        return self.guide(negative, positive, guidance_scale)

    def guide(self, negative: Tensor, positive: Tensor, guidance_scale: float) -> Tensor:
        """Both branches' velocities [B, C, H, W] to the guided one; a backbone with another rule says so here."""
        return negative + guidance_scale * (positive - negative)

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's, and that of latents and conditions; SDE arithmetic is fp32 whatever it is."""
        return next(self.transformer.parameters()).dtype

    @property
    @final
    def device(self) -> torch.device:
        """Where the transformer lives."""
        return next(self.transformer.parameters()).device
