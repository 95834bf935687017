"""FLUX.1: text-to-image (FLUX.1-dev) and editing (FLUX.1-Kontext, arXiv:2506.15742).

Both are one transformer: 2 x 2 patches of the latents are its tokens, CLIP's pooled state and T5's states its text,
and a distilled model takes its guidance as a number, beside which classifier-free guidance is still possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from agents.policies.backbone import BackbonePolicy, BackboneSettings
from agents.policies.base import JOINT_ATTENTION
from agents.policies.embeddings import Row, unstack
from agents.policies.pictures import pixels, references
from agents.policies.schedules import pipeline_timestep
from agents.samplers import ODE

T5_TOKENS = 512
"""The pipelines' default and their most; all prompts are padded to it, so fewer save time in every forward pass."""


class Flux1Policy(BackbonePolicy):
    """What FLUX.1-dev and FLUX.1-Kontext share; latents are [B, 16, H / 8, W / 8], packed for the transformer only.

    Differs: position ids are float32; the pipelines round theirs to the latents' dtype, which is exact up to 256
    tokens a side (4096 pixels).
    """

    default_guidance: ClassVar[float]
    """What a distilled transformer is told where the settings say nothing."""
    default_sampler = ODE(num_inference_steps=28, guidance_scale=1.0, shift=None)
    lora_targets: ClassVar[tuple[str, ...]] = (
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    """Those of Flow-GRPO's published code for FLUX.1-dev (arXiv:2505.05470), and of Flow-Factory's."""

    def __init__(self, pipeline: Any, settings: BackboneSettings) -> None:
        if settings.max_sequence_length > T5_TOKENS:
            raise ValueError(
                f"max_sequence_length: expected at most {T5_TOKENS} for FLUX.1, got {settings.max_sequence_length}"
            )
        super().__init__(pipeline, settings)

    @property
    @final
    def text_encoders(self) -> Sequence[nn.Module]:
        """CLIP and T5."""
        return self.pipeline.text_encoder, self.pipeline.text_encoder_2

    @property
    @final
    def distilled_guidance(self) -> float:
        """The guidance that is an input of the transformer; guidance_scale of a sampler is another, and true CFG."""
        given = self.settings.distilled_guidance
        return self.default_guidance if given is None else given

    @final
    def embed_prompts(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """T5's states ``prompt_embeds`` [L, D] and CLIP's ``pooled`` [P] of each text."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            device=self.pipeline.text_encoder_2.device,
            max_sequence_length=self.settings.max_sequence_length or T5_TOKENS,
        )
        return unstack({"prompt_embeds": embeds, "pooled": pooled})

    @final
    def encode_sources(self, images: Tensor) -> Tensor:
        """The mode of the VAE's posterior, scaled: [B, 16, H / 8, W / 8]."""
        vae = self.pipeline.vae
        mode = vae.encode(pixels(images, self.dtype)).latent_dist.mode()
        latents: Tensor = (mode - vae.config.shift_factor) * vae.config.scaling_factor
        return latents

    @final
    def network_velocity(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The transformer's velocity.

        A reference's tokens follow the target's, at the same places but with first coordinate 1; what the transformer
        says of them is dropped.
        """
        batch, channels, height, width = latents.shape
        images = [latents, *references(tensors)]
        tokens = torch.cat([self.pipeline._pack_latents(x, batch, channels, height, width) for x in images], dim=1)
        ids = torch.cat([self._position_ids(index, x) for index, x in enumerate(images)])
        transformer: Any = self.transformer
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full((batch,), self.distilled_guidance, device=latents.device)
        velocity = transformer(
            hidden_states=tokens,
            timestep=pipeline_timestep(sigma, latents.dtype),
            guidance=guidance,
            pooled_projections=tensors["pooled"],
            encoder_hidden_states=tensors["prompt_embeds"],
            txt_ids=ids.new_zeros(tensors["prompt_embeds"].shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        scale, of_target = self.pipeline.vae_scale_factor, height * width // 4
        unpacked: Tensor = self.pipeline._unpack_latents(velocity[:, :of_target], height * scale, width * scale, scale)
        return unpacked

    def _position_ids(self, index: int, latents: Tensor) -> Tensor:
        """(image, row, column) of each token, [h w / 4, 3]."""
        batch, _, height, width = latents.shape
        ids: Tensor = self.pipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, latents.device, torch.float32
        )
        ids[:, 0] = index
        return ids


@final
class FluxPolicy(Flux1Policy):
    """FLUX.1-dev, and FLUX.1-schnell, which takes no guidance: text-to-image."""

    pipeline_name = "FluxPipeline"
    max_sources = 0
    default_guidance = 3.5


@final
class FluxKontextPolicy(Flux1Policy):
    """FLUX.1-Kontext (arXiv:2506.15742): text-to-image without, editing with one source image.

    Source images come at the policy's own size: the pipeline's table of preferred resolutions is the caller's affair.
    Both branches of classifier-free guidance see the reference, as in the pipeline.
    """

    pipeline_name = "FluxKontextPipeline"
    max_sources = 1
    default_guidance = 2.5
