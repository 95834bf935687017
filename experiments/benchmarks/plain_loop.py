"""The straightforward loop that the library is measured against: diffusers' pipeline with a callback, step by step.

It is what one writes first: every sample's prompt is embedded, the pipeline draws with guidance and a callback turns
its Euler steps into SDE steps, old log-probabilities are computed once more before the update, the reference is a copy
of the transformer, and each step is a forward pass of its own. Its arithmetic is the library's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.functional import clipped_surrogate, ratio
from agents.samplers import FlowSDE, kl, log_prob


@dataclass(frozen=True)
class PlainSamples:
    """What one call of the pipeline drew: T - 1 stochastic steps of B samples.

    Attributes:
        images: uint8 [B, H, W, 3].
        latents: before each step, [T - 1, B, C, h, w].
        next_latents: after it.
        embeds: prompt embeddings and pooled ones, a row a sample; as many negatives first where there is guidance.
    """

    images: NDArray[np.uint8]
    latents: Tensor
    next_latents: Tensor
    embeds: tuple[Tensor, Tensor]


@torch.no_grad()
def draw(pipeline: Any, texts: Sequence[str], sampler: FlowSDE, size: tuple[int, int], seed: int) -> PlainSamples:
    """Draw one image a text.

    Args:
        pipeline: diffusers' StableDiffusion3Pipeline.
        texts: one a sample, repeated within a group.
        sampler: steps, guidance of 1 (none) or more, and noise level; its shift is the scheduler's.
        size: (height, width).
        seed: of all noise.
    """
    generator, before, after = torch.Generator().manual_seed(seed), list[Tensor](), list[Tensor]()
    is_guided = sampler.guidance_scale > 1
    positive, negative, pooled, negative_pooled = pipeline.encode_prompt(
        list(texts), None, None, negative_prompt="", do_classifier_free_guidance=is_guided
    )
    shape = (len(texts), pipeline.transformer.config.in_channels, size[0] // 8, size[1] // 8)
    noise = torch.randn(shape, generator=generator)
    current = [noise]

    def to_sde(pipe: Any, step: int, _: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        sigmas, x, euler = pipe.scheduler.sigmas, current[0], values["latents"]
        drawn = euler
        if step < len(sigmas) - 2:
            velocity = (euler - x) / (sigmas[step + 1] - sigmas[step])
            transition = sampler.transition(x, velocity, sigmas, step)
            drawn = transition.mean + transition.std * torch.randn(shape, generator=generator)
            before.append(x)
            after.append(drawn)
        current[0] = drawn
        return {"latents": drawn}

    found = pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        latents=noise,
        height=size[0],
        width=size[1],
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
        callback_on_step_end=to_sde,
        output_type="np",
    ).images
    embeds = (positive, pooled)
    if is_guided:
        embeds = (torch.cat([negative, positive]), torch.cat([negative_pooled, pooled]))
    return PlainSamples((found * 255).round().astype(np.uint8), torch.stack(before), torch.stack(after), embeds)


class PlainUpdate:
    """Flow-GRPO's update of adapters as it is first written.

    Args:
        pipeline: whose transformer has the adapter that learns.
        sampler: that drew.
        optimizer: over the adapter.
        kl_coef: weight of the KL to a copy of the transformer.
    """

    def __init__(self, pipeline: Any, sampler: FlowSDE, optimizer: torch.optim.Optimizer, kl_coef: float) -> None:
        self.pipeline, self.sampler, self.optimizer, self.kl_coef = pipeline, sampler, optimizer, kl_coef
        self.reference = copy.deepcopy(pipeline.transformer).requires_grad_(False)

    def __call__(self, samples: PlainSamples, advantages: Tensor) -> None:
        """One optimiser step on all steps of all samples."""
        transformer = self.pipeline.transformer
        with torch.no_grad():
            old = [self._log_prob(transformer, samples, step)[0] for step in range(len(samples.latents))]
        for step, old_log_prob in enumerate(old):
            new, transition = self._log_prob(transformer, samples, step)
            with torch.no_grad():
                reference = self._log_prob(self.reference, samples, step)[1]
            surrogate = clipped_surrogate(ratio(new, old_log_prob), advantages, 1e-4).mean()
            loss = surrogate + self.kl_coef * kl(transition, reference).mean()
            (loss / len(samples.latents)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _log_prob(self, transformer: Any, samples: PlainSamples, step: int) -> tuple[Tensor, Any]:
        x, sigmas, guidance = samples.latents[step], self.pipeline.scheduler.sigmas, self.sampler.guidance_scale
        embeds, pooled = samples.embeds
        branches = len(embeds) // len(x)
        velocity = transformer(
            hidden_states=torch.cat([x] * branches),
            timestep=(sigmas[step] * 1000).expand(branches * len(x)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample
        if branches == 2:
            negative, positive = velocity.chunk(2)
            velocity = negative + guidance * (positive - negative)
        transition = self.sampler.transition(x, velocity, sigmas, step)
        return log_prob(transition, samples.next_latents[step]), transition
