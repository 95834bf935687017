"""The objective of pre-training's stages: flow matching on a supervised batch, with gradients for what is trained."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.flow import interpolate, logit_normal_sigmas, uniform_sigmas, velocity_target
from agents.policies.backbone import BackbonePolicy
from agents.policies.base import FlowPolicy
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.prompted import PromptedPolicy
from agents.policies.unipic2 import KontextPolicy
from agents.rollout import Ask
from agents.types import Condition
from envs.scenes.pretraining import SupervisedBatch
from pdtr.pretraining_stages import Stage, StageConfig


def trained_modules(policy: FlowPolicy, stage: Stage) -> dict[str, nn.Module]:
    """What a stage trains, by the name that its checkpoints have.

    Raises:
        ValueError: stages A and C need a connector, and the policy has none.
    """
    if stage == "B":
        return {"transformer": policy.transformer}
    if not isinstance(policy, MetaQueryPolicy):
        raise ValueError(
            f"stage {stage}: expected a MetaQueryPolicy, whose connector it trains, got {type(policy).__name__}; "
            "put one together with MetaQueryPipeline.from_parts"
        )
    connector: dict[str, nn.Module] = {"connector": policy.connector}
    return connector if stage == "A" else {**connector, "transformer": policy.transformer}


def flow_matching_loss(
    config: StageConfig, policy: FlowPolicy, task: str, batch: SupervisedBatch, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity on a batch, a scalar.

    Args:
        config: the law of sigmas, and how many texts are dropped.
        policy: gradients reach what :func:`trained_modules` names.
        task: of the batch.
        batch: pictures of one size; a published model's policy is resized to it.
        generator: on the CPU; sigmas, noise and dropout come from it.

    Raises:
        ValueError: the policy cannot draw at the pictures' size.
    """
    set_size(policy, (batch.targets.shape[1], batch.targets.shape[2]))
    dropout = config.edit_text_dropout if task == "edit" else config.text_dropout
    kept = (torch.rand(len(batch.texts), generator=generator) >= dropout).tolist()
    texts = [text if keep else "" for text, keep in zip(batch.texts, kept, strict=True)]
    x_0 = clean_latents(policy, batch.targets)
    sigma = _sigmas(config, len(x_0), generator).to(x_0.device)
    noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    noisy = interpolate(x_0, noise, sigma).to(policy.dtype)
    velocity = policy.velocity(noisy, sigma, _condition(config.stage, policy, texts, batch), guidance_scale=1.0)
    return (velocity.float() - velocity_target(x_0, noise)).square().mean()


def set_size(policy: FlowPolicy, size: tuple[int, int]) -> None:
    """Have the policy draw at (height, width).

    Raises:
        ValueError: it cannot.
    """
    if size == policy.image_size:
        return
    if not isinstance(policy, BackbonePolicy):
        raise ValueError(
            f"pictures: expected (height, width) {policy.image_size}, got {size}; have the data source resize them"
        )
    policy.resize(*size)


def clean_latents(policy: FlowPolicy, pictures: NDArray[np.uint8]) -> Tensor:
    """Latents [B, C, h, w] of pictures, uint8 [B, H, W, 3], without a gradient.

    Raises:
        ValueError: the policy is of a kind whose latents cannot be had here.
    """
    images = torch.from_numpy(pictures).to(policy.device)
    with torch.no_grad():
        if isinstance(policy, BackbonePolicy):
            return policy.encode_sources(images)
        if isinstance(policy, KontextPolicy):
            return policy.codec.encode(images)
    raise ValueError(f"policy: expected a BackbonePolicy or a KontextPolicy, got {type(policy).__name__}")


def _sigmas(config: StageConfig, count: int, generator: torch.Generator) -> Tensor:
    draw = uniform_sigmas if config.sigma_law == "uniform" else logit_normal_sigmas
    return draw(count, generator, shift=config.sigma_shift)


def _condition(stage: Stage, policy: FlowPolicy, texts: list[str], batch: SupervisedBatch) -> Condition:
    """The positive branch; with a gradient where the connector is trained."""
    if stage != "B":
        assert isinstance(policy, MetaQueryPolicy)
        return Condition(policy.embed_with_gradient(texts, batch.sources))
    sources = [() for _ in texts] if batch.sources is None else [(source,) for source in batch.sources]
    asks = [Ask(text, images) for text, images in zip(texts, sources, strict=True)]
    if isinstance(policy, PromptedPolicy):
        return policy.encode_batch(asks)
    return Condition(policy.encode(asks).tensors)
