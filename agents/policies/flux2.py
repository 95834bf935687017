"""FLUX.2-klein: text-to-image, and editing with one or several references, on one transformer.

A small Qwen3 reads the prompt as a user's turn; the states of three of its layers, side by side, are the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from agents.policies.backbone import BackbonePolicy
from agents.policies.base import JOINT_ATTENTION
from agents.policies.embeddings import Row, unstack
from agents.policies.pictures import pixels, references
from agents.policies.schedules import pipeline_timestep, scheduler_shift
from agents.samplers import ODE

PROMPT_TOKENS = 512
"""The pipeline's default; all prompts are padded to it, so fewer save time in every forward pass."""
BASE_STEPS, DISTILLED_STEPS = 50, 4
"""Steps of the base and of the step-distilled checkpoints, as published."""


@final
class Flux2KleinPolicy(BackbonePolicy):
    """FLUX.2-klein, base or distilled; latents are [B, 128, H / 16, W / 16], the pipeline's own before packing.

    They are 2 x 2 patches of the VAE's 32 channels, normalised by the statistics of the VAE's batch norm. Source
    images come at the policy's own size. Both branches of classifier-free guidance see the references.

    The distilled checkpoints have guidance built in, and their pipeline ignores a scale; here it is refused.
    """

    pipeline_name = "Flux2KleinPipeline"
    default_sampler = ODE(num_inference_steps=BASE_STEPS, guidance_scale=4.0, shift=None)
    lora_targets: ClassVar[tuple[str, ...]] = (
        *JOINT_ATTENTION,
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",
    )
    """Those of Flow-Factory's published code for FLUX.2-klein; the last one is of the single-stream blocks."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(128, H / 16, W / 16)."""
        side = 2 * self.pipeline.vae_scale_factor
        return 4 * self.pipeline.vae.config.latent_channels, self.settings.height // side, self.settings.width // side

    @property
    def own_shift(self) -> float:
        """``e^mu`` of the image size at the checkpoint's published number of steps, on which mu depends here."""
        steps = DISTILLED_STEPS if self.pipeline.config.is_distilled else BASE_STEPS
        return scheduler_shift(self.pipeline.scheduler, self.schedule_mu(steps))

    def embed_prompts(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """Qwen3's states ``prompt_embeds`` [L, 3 D] of each text, three layers side by side."""
        embeds, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.settings.max_sequence_length or PROMPT_TOKENS,
        )
        return unstack({"prompt_embeds": embeds})

    def encode_sources(self, images: Tensor) -> Tensor:
        """The mode of the VAE's posterior, patchified and normalised: [B, 128, H / 16, W / 16]."""
        latents: Tensor = self.pipeline._encode_vae_image(pixels(images, self.dtype), generator=None)
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See :meth:`BackbonePolicy.decode_latents`."""
        vae = self.pipeline.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latents)
        images: Tensor = vae.decode(self.pipeline._unpatchify_latents(latents * std + mean), return_dict=False)[0]
        return images

    def network_velocity(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The transformer's velocity.

        References' tokens follow the target's, at the same places but at times 10, 20, ...; what the transformer says
        of them is dropped.
        """
        pipeline: Any = self.pipeline
        transformer: Any = self.transformer
        embeds, others = tensors["prompt_embeds"], references(tensors)
        ids = pipeline._prepare_latent_ids(latents[:1])
        if others:
            ids = torch.cat([ids, pipeline._prepare_image_ids([x[:1] for x in others])], dim=1)
        velocity: Tensor = transformer(
            hidden_states=torch.cat([pipeline._pack_latents(x) for x in (latents, *others)], dim=1),
            timestep=pipeline_timestep(sigma, latents.dtype),
            encoder_hidden_states=embeds,
            txt_ids=pipeline._prepare_text_ids(embeds[:1])[0].to(latents.device),
            img_ids=ids[0].to(latents.device),
            return_dict=False,
        )[0]
        return velocity[:, : latents[0, 0].numel()].transpose(1, 2).reshape(latents.shape)

    def guide(self, negative: Tensor, positive: Tensor, guidance_scale: float) -> Tensor:
        """Classifier-free guidance, for the base checkpoints.

        Raises:
            ValueError: the checkpoint is a distilled one.
        """
        if self.pipeline.config.is_distilled:
            raise ValueError(
                f"guidance_scale: expected 1 for a distilled FLUX.2-klein, which has guidance built in, got "
                f"{guidance_scale}; set it to 1 or take a base checkpoint"
            )
        return super().guide(negative, positive, guidance_scale)

    def schedule_mu(self, num_inference_steps: int) -> float | None:
        """Of the image's number of tokens and the number of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        if not self.pipeline.scheduler.config.use_dynamic_shifting:
            return None
        _, height, width = self.latent_shape
        return compute_empirical_mu(height * width, num_inference_steps)
