"""Z-Image and Z-Image-Turbo (arXiv:2511.22699), on diffusers' pipeline: text-to-image.

Its transformer's time runs from noise to picture, ``1 - sigma``, and its output is the velocity with the other sign.
A batch is a list, each caption at its own length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.policies.backbone import BackbonePolicy
from agents.policies.embeddings import Row
from agents.samplers import ODE

_MAX_SEQUENCE_LENGTH = 512


class ZImagePolicy(BackbonePolicy):
    """Z-Image: text-to-image; Z-Image-Turbo is drawn without guidance, in 8 steps.

    Differs: ``guidance_scale`` is the library's, ``v_negative + s (v_positive - v_negative)``; the pipeline's is
    ``v_positive + g (v_positive - v_negative)``, so ``s = g + 1``: its 5 is 6 here, and its 0 is 1. Latents are kept
    in ``settings.dtype``, where the pipeline keeps them in float32.
    """

    pipeline_name = "ZImagePipeline"
    max_sources = 0
    default_sampler = ODE(num_inference_steps=50, guidance_scale=6.0, shift=None)
    lora_targets = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    """Flow-Factory's for Z-Image (github.com/X-GenGroup/Flow-Factory)."""
    guidance_limit: float = 0.0
    """Guidance makes a sample's velocity at most so many times as long as the prompted branch's, the pipeline's
    ``cfg_normalization``; 0, as in the pipeline, is no limit."""

    def embed_prompts(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """``prompt_embeds`` [L, D], the states before the last layer, and ``prompt_mask`` [L], which tells padding."""
        length = self.settings.max_sequence_length or _MAX_SEQUENCE_LENGTH
        rows: list[Row] = []
        for text in texts:
            encoded, _ = self.pipeline.encode_prompt(
                [text], self._device, do_classifier_free_guidance=False, max_sequence_length=length
            )
            mask = torch.ones(len(encoded[0]), dtype=torch.bool)
            rows.append({"prompt_embeds": encoded[0], "prompt_mask": mask})
        return rows

    def network_velocity(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The transformer's output at time ``1 - sigma``, the sign turned."""
        lengths = tensors["prompt_mask"].sum(dim=1).tolist()
        captions = [states[:length] for states, length in zip(tensors["prompt_embeds"], lengths, strict=True)]
        network: Any = self.transformer
        # By way of thousandths, as the pipeline rounds it.
        time = (1000 - sigma * 1000) / 1000
        outputs = network(list(latents.unsqueeze(2)), time, captions, return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2)

    def guide(self, negative: Tensor, positive: Tensor, guidance_scale: float) -> Tensor:
        """``v = v_negative + s (v_positive - v_negative)``, shortened to ``guidance_limit |v_positive|`` if longer."""
        guided = super().guide(negative, positive, guidance_scale)
        if self.guidance_limit == 0:
            return guided
        length, prompted = (velocity.float().flatten(1).norm(dim=1) for velocity in (guided, positive))
        factor: Tensor = (self.guidance_limit * prompted / length).clamp(max=1)
        return guided * factor.to(guided.dtype).view(-1, 1, 1, 1)
