"""What FLUX.1 and FLUX.2 policies are held to alike; each test file says which models and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import Learner, LearnerSettings
from agents.policies.backbone import BackbonePolicy, BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.weights import FullWeights, LoraSettings, LoraWeights, PolicyWeights
from agents.rollout import denoise
from agents.samplers import ODE, FlowSDE, Sampler, log_prob, sample_noise
from agents.types import Condition, Rollout, Trajectory
from rewards.base import Prompt

SETTINGS = BackboneSettings(height=64, width=64, dtype="float32", max_sequence_length=48)
SIZES = ((64, 64), (64, 96))
SEEDS = (11, 12)
TEXTS = ("a red circle left of a blue square", "make the three dogs purple")


def sources(count: int, size: tuple[int, int], seed: int = 0) -> tuple[NDArray[np.uint8], ...]:
    """Source images, each of its own colours."""
    rng = np.random.default_rng((seed, count))
    base, grain = rng.integers(40, 216, (count, 1, 1, 3)), rng.integers(-40, 41, (count, *size, 3))
    return tuple((base + grain).astype(np.uint8))


def asks(policy: BackbonePolicy, num_sources: int) -> list[Prompt]:
    """Two prompts of one task; their source images differ."""
    size = policy.image_size
    return [Prompt(text, sources(num_sources, size, seed=index)) for index, text in enumerate(TEXTS)]


def plain_pipeline(folder: Path, name: str) -> Any:
    """Diffusers' own pipeline, loaded apart from the policy."""
    import diffusers

    pipeline = getattr(diffusers, name).from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(images: Sequence[NDArray[np.uint8]]) -> list[Image.Image]:
    """Arrays as PIL images."""
    return [Image.fromarray(image) for image in images]


def initial_latents(policy: BackbonePolicy) -> Tensor:
    """What a rollout with SEEDS starts from."""
    return sample_noise(SEEDS, (1, *policy.latent_shape))[:, 0]


def rollout(policy: BackbonePolicy, prompts: Sequence[Prompt], sampler: Sampler) -> Trajectory:
    """Draw one sample a prompt."""
    steps = sampler.stochastic_steps(torch.Generator().manual_seed(0))
    return denoise(policy, policy.encode(prompts), sampler, steps, SEEDS)


def check_images(policy: BackbonePolicy, x_0: Tensor, expected: NDArray[np.float32]) -> None:
    """Final latents decode to a pipeline's images in [0, 1], before and after rounding."""
    with torch.no_grad():
        ours = (policy.decode_latents(x_0) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert ours.shape == expected.shape
    assert expected.std() > 0.02, "a constant image would agree with anything"
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    levels = policy.decode(x_0).numpy()
    assert levels.dtype == np.uint8
    assert np.abs(levels - 255 * expected).max() < 0.51


def check_ratio_is_one(policy: BackbonePolicy, num_sources: int, guidance_scale: float) -> None:
    """Replayed with gradients, every stochastic step has the very log-probability that it was drawn with."""
    sampler = FlowSDE(num_inference_steps=4, guidance_scale=guidance_scale, shift=None)
    drawn = rollout(policy, asks(policy, num_sources), sampler)
    assert drawn.log_probs.shape == (2, 3)
    for index, step in enumerate(drawn.steps):
        latents = drawn.latents[:, index]
        velocity = policy.velocity(latents, drawn.sigmas[step], drawn.condition, guidance_scale)
        transition = sampler.transition(latents, velocity, drawn.sigmas, step)
        assert torch.equal(log_prob(transition, drawn.next_latents[:, index]), drawn.log_probs[:, index])


def some_velocity(policy: BackbonePolicy, condition: Condition | None = None) -> Tensor:
    """A guided velocity of two prompts."""
    condition = policy.encode(asks(policy, 0)) if condition is None else condition
    latents = initial_latents(policy).to(policy.dtype)
    with torch.no_grad():
        return policy.velocity(latents, torch.tensor(0.7), condition, 2.0)


def learn_once(policy: BackbonePolicy, weights: PolicyWeights, num_sources: int) -> dict[str, float]:
    """One optimiser step of Flow-GRPO on one rollout of two samples."""
    sampler = FlowSDE(num_inference_steps=3, shift=None)
    drawn = rollout(policy, asks(policy, num_sources), sampler)
    batch = Rollout((drawn,), torch.tensor([1.0, 0.0]), {}, torch.zeros(2, dtype=torch.long), torch.zeros(2))
    algorithm = FlowGRPO(sampler, kl_coef=0.0)
    batch = batch.with_advantages(algorithm.advantages(batch))
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-2)
    learner = Learner(policy, weights, algorithm, optimizer, LearnerSettings(num_minibatches=1, ema_decay=0))
    return learner.update([batch])


def lora(policy: BackbonePolicy) -> LoraWeights:
    """Adapters on the layers that the backbone names."""
    return LoraWeights(policy, LoraSettings(2, 4), versions=())


def full(policy: BackbonePolicy) -> FullWeights:
    """Everything learns."""
    return FullWeights(policy, versions=())


def check_update(policy: BackbonePolicy, weights: PolicyWeights, num_sources: int) -> None:
    """One optimiser step moves what is trainable, in every adapted or every layer, and nothing else."""
    before = _snapshot(policy)
    trainable = {id(parameter) for parameter in weights.parameters()}
    named = _named(policy)
    learnt = {name for name, tensor in named.items() if id(tensor) in trainable}
    metrics = learn_once(policy, weights, num_sources)
    assert metrics["ratio_error"] == 0
    assert metrics["skipped_updates"] == 0
    changed = {name for name, tensor in _named(policy).items() if not torch.equal(tensor, before[name])}
    # A fresh adapter's B is 0, so its A has no gradient yet; weight decay alone moves it.
    assert changed == learnt
    moved = [name for name in learnt if "lora_B" in name or isinstance(weights, FullWeights)]
    assert moved
    assert all(float((named[name] - before[name]).detach().abs().max()) > 1e-3 for name in moved)


def check_saved(policy: BackbonePolicy, folder: Path) -> None:
    """After an update the policy is saved, loaded by what its folder says, and learns on as if never saved."""
    learn_once(policy, full(policy), num_sources=0)
    policy.save(folder)
    loaded = load_backbone(folder, policy.settings)
    assert type(loaded) is type(policy)
    assert torch.equal(some_velocity(loaded), some_velocity(policy))
    for each in (policy, loaded):
        learn_once(each, full(each), num_sources=0)
    assert torch.equal(some_velocity(loaded), some_velocity(policy))


def check_checkpointing(folder: Path, num_sources: int) -> None:
    """Gradients are those of a backward pass that keeps its activations."""
    gradients = []
    for is_on in (False, True):
        policy = load_backbone(folder, replace(SETTINGS, gradient_checkpointing=is_on))
        weights = full(policy)
        velocity = policy.velocity(
            initial_latents(policy), torch.tensor(0.7), policy.encode(asks(policy, num_sources)), 2.0
        )
        velocity.square().mean().backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in weights.parameters()])
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in gradients[0] if gradient is not None)
    for without, with_it in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without)


def deterministic(num_inference_steps: int, guidance_scale: float) -> ODE:
    """Euler's method on the backbone's own schedule."""
    return ODE(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, shift=None)


def _named(policy: BackbonePolicy) -> dict[str, Tensor]:
    modules = {"transformer": policy.transformer, "vae": policy.pipeline.vae}
    modules |= {f"text_encoder_{index}": module for index, module in enumerate(policy.text_encoders)}
    return {
        f"{part}.{name}": tensor
        for part, m in modules.items()
        for name, tensor in (*m.named_parameters(), *m.named_buffers())
    }


def _snapshot(policy: BackbonePolicy) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _named(policy).items()}
