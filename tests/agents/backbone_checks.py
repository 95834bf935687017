"""What every policy on a published pipeline is held to; a backbone's tests call these with policies of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import Learner, LearnerSettings
from agents.policies.backbone import BackbonePolicy
from agents.policies.embeddings import content_hash
from agents.policies.weights import PolicyWeights
from agents.rollout import Ask, denoise, encode_asks
from agents.samplers import ODE, Sampler, derive_seed, sample_noise
from agents.types import Rollout
from rewards.base import Prompt

Tensors = dict[str, Tensor]
TEXTS = ("a red circle", "two blue squares left of a tree")


def picture(size: tuple[int, int], seed: int = 0) -> Any:
    """A smooth random picture, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.linspace(0, 3, size[0])[:, None, None], np.linspace(0, 3, size[1])[None, :, None]
    waves = np.sin(rows * rng.normal(size=3) * 3 + rng.normal(size=3)) * np.cos(columns * rng.normal(size=3) * 3)
    return ((waves + 1) * 127.5).astype(np.uint8)


def prompts_for(policy: BackbonePolicy, num_sources: int = 0, texts: Sequence[str] = TEXTS) -> list[Prompt]:
    """Prompts with different sources each."""
    size = policy.image_size
    return [
        Prompt(text, tuple(picture(size, 10 * i + j) for j in range(num_sources)), id=str(i))
        for i, text in enumerate(texts)
    ]


def draw(policy: BackbonePolicy, prompts: Sequence[Prompt], sampler: Sampler, seed: int = 0) -> Tensor:
    """Final latents, one of each prompt."""
    with torch.no_grad():
        return denoise(policy, policy.encode(prompts), sampler, (), range(seed, seed + len(prompts))).x_0


def first_noise(policy: BackbonePolicy, count: int, seed: int = 0) -> Tensor:
    """What :func:`draw` starts from."""
    return sample_noise(range(seed, seed + count), (1, *policy.latent_shape))[:, 0].to(policy.dtype)


def encoded_by_hand(vae: Any, image: Any, shift: float, scale: float) -> Tensor:
    """A source of UniPic 2.0's models as latents, drawn by the VAE's own sampler with the policies' seed for it."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    generator = torch.Generator().manual_seed(derive_seed("source", content_hash(image)))
    with torch.no_grad():
        drawn = vae.encode(pixels).latent_dist.sample(generator)
    latents: Tensor = (drawn - shift) * scale
    return latents


def kontext_by_hand(
    transformer: Any, images: Sequence[Tensor], timestep: Tensor, states: Tensor, pooled: Tensor
) -> Tensor:
    """UniPic 2.0's released pass: SD3's blocks, called one by one, on all latents' tokens; the last latents' velocity.

    Of patches of 2 x 2; the latents are [B, C, h, w] each.
    """
    batch, channels, height, width = images[-1].shape
    tokens = torch.cat([transformer.pos_embed(image) for image in images], dim=1)
    temb, context = transformer.time_text_embed(timestep, pooled), transformer.context_embedder(states)
    for block in transformer.transformer_blocks:
        context, tokens = block(tokens, context, temb)
    tokens = transformer.proj_out(transformer.norm_out(tokens, temb))[:, -(height * width // 4) :]
    patches = tokens.reshape(batch, height // 2, width // 2, 2, 2, channels)
    return torch.einsum("bhwpqc->bchpwq", patches).reshape(batch, channels, height, width)


def rollout_of(policy: BackbonePolicy, prompts: Sequence[Prompt], sampler: Sampler, group_size: int = 2) -> Rollout:
    """One chunk with the weights in use; the first of each pair was good and the second bad."""
    asks = [Ask(prompt.text, tuple(prompt.source_images)) for prompt in prompts for _ in range(group_size)]
    policy.prepare(prompts)
    steps = sampler.stochastic_steps(torch.Generator().manual_seed(0))
    trajectory = denoise(policy, encode_asks(policy, asks), sampler, steps, range(len(asks)))
    signs = torch.tensor([1.0, -1.0]).repeat(len(asks) // 2)
    return Rollout((trajectory,), signs, {}, torch.arange(len(asks)) // group_size, signs)


def update(policy: BackbonePolicy, weights: PolicyWeights, rollout: Rollout, sampler: Sampler) -> dict[str, float]:
    """One optimiser step of Flow-GRPO on a rollout; -> its metrics, the ratio's distance from 1 among them."""
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-2, weight_decay=0.0)
    algorithm = FlowGRPO(sampler, clip_range=1.0, kl_coef=0.01)
    learner = Learner(policy, weights, algorithm, optimizer, LearnerSettings(1, ema_decay=0.0))
    return learner.update([rollout])


def check_ratio_is_one(
    policy: BackbonePolicy, weights: PolicyWeights, prompts: Sequence[Prompt], sampler: Sampler
) -> None:
    """At the weights that drew every ratio is 1 to the bit, and the reference, equal to them, is at no distance."""
    metrics = update(policy, weights, rollout_of(policy, prompts, sampler), sampler)
    assert metrics["ratio_error"] == 0
    assert metrics["kl_loss"] == 0
    assert metrics["grad_norm"] > 0


def all_tensors(policy: BackbonePolicy) -> Tensors:
    """Every parameter and buffer of the policy's parts, copied, by part and name; adapted layers by their own names."""
    parts = {"transformer": policy.transformer, "vae": policy.pipeline.vae}
    parts |= {f"text_encoder/{i}": module for i, module in enumerate(policy.text_encoders)}
    return {
        f"{part}.{name.replace('.base_layer.', '.')}": tensor.detach().clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def changed(before: Tensors, after: Tensors) -> set[str]:
    """Names of tensors that are not what they were, to the bit."""
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def check_saving(policy: BackbonePolicy, folder: Any, num_sources: int = 0, **options: Any) -> BackbonePolicy:
    """A saved policy loads with its settings and draws the same latents; -> it."""
    from agents.policies.loading import load_backbone

    sampler = ODE(num_inference_steps=2, guidance_scale=3.0, shift=None)
    prompts = prompts_for(policy, num_sources)
    policy.save(folder)
    loaded = load_backbone(folder)
    assert type(loaded) is type(policy)
    assert loaded.settings == replace(policy.settings, **options)
    assert torch.allclose(draw(loaded, prompts, sampler), draw(policy, prompts, sampler), atol=1e-5)
    return loaded
