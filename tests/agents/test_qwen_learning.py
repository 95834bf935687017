"""Learning with Qwen-Image and Z-Image: exact ratios, updates that touch what is trainable, saving, checkpointing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor

from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import Learner, LearnerSettings
from agents.policies.backbone import BackbonePolicy, BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.tiny.qwen_image import (
    make_tiny_qwen_image,
    make_tiny_qwen_image_edit,
    make_tiny_qwen_image_edit_plus,
)
from agents.policies.tiny.z_image import make_tiny_z_image
from agents.policies.weights import FullWeights, LoraSettings, LoraWeights, PolicyWeights
from agents.rollout import denoise
from agents.samplers import FlowSDE, log_prob
from agents.types import Rollout, Trajectory
from rewards.base import Prompt

SETTINGS = BackboneSettings(height=32, width=48, dtype="float32", max_sequence_length=96, reference_pixels=32 * 32)
TEXTS = ("two red circles", "a photo of the blue square left of one dog")
SAMPLER = FlowSDE(4, shift=None, noise_level=0.7)


@dataclass(frozen=True)
class Case:
    """A model and how many source images its prompts have."""

    make: Callable[[Path], Path]
    num_sources: int = 0


CASES = {
    "qwen-image": Case(make_tiny_qwen_image),
    "qwen-image-edit": Case(make_tiny_qwen_image_edit, 1),
    "qwen-image-edit-plus": Case(lambda folder: make_tiny_qwen_image_edit_plus(folder, zero_cond_t=True), 2),
    "z-image": Case(make_tiny_z_image),
}
Make = Callable[[BackbonePolicy], PolicyWeights]


def _lora(policy: BackbonePolicy) -> LoraWeights:
    return LoraWeights(policy, LoraSettings(2, 4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: case.make(tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy(folders: dict[str, Path], name: str) -> BackbonePolicy:
    return load_backbone(folders[name], SETTINGS)


def _prompts(name: str) -> list[Prompt]:
    random = np.random.default_rng(0)
    shape = (len(TEXTS), CASES[name].num_sources, SETTINGS.height, SETTINGS.width, 3)
    sources = random.integers(0, 256, shape, np.uint8)
    return [Prompt(text, tuple(images)) for text, images in zip(TEXTS, sources, strict=True)]


def _draw(policy: BackbonePolicy, name: str, sampler: FlowSDE = SAMPLER) -> Trajectory:
    return denoise(policy, policy.encode(_prompts(name)), sampler, sampler.stochastic_steps(), (3, 4))


def _velocity(policy: BackbonePolicy, name: str) -> Tensor:
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return policy.velocity(latents, torch.tensor(0.6), policy.encode(_prompts(name)), 2.0)


def _learn(policy: BackbonePolicy, weights: PolicyWeights, name: str) -> dict[str, float]:
    """One optimiser step of Flow-GRPO on a drawn rollout."""
    algorithm = FlowGRPO(replace(SAMPLER, guidance_scale=2.0), kl_coef=0.0)
    trajectory = _draw(policy, name, replace(SAMPLER, guidance_scale=2.0))
    rollout = Rollout((trajectory,), torch.tensor([1.0, 0.0]), {}, torch.zeros(2, dtype=torch.long), torch.zeros(2))
    rollout = rollout.with_advantages(algorithm.advantages(rollout))
    optimizer = torch.optim.SGD(weights.parameters(), lr=10.0)
    settings = LearnerSettings(num_minibatches=1, ema_decay=0.0)
    return Learner(policy, weights, algorithm, optimizer, settings).update([rollout])


def _tensors(policy: BackbonePolicy) -> dict[str, Tensor]:
    """Parameters and buffers of every part."""
    parts = {"transformer": policy.transformer, "vae": policy.pipeline.vae, "text": policy.pipeline.text_encoder}
    return {f"{part}.{name}": tensor for part, m in parts.items() for name, tensor in m.state_dict().items()}


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_ratio_is_exactly_one_at_the_rollouts_weights(policy: BackbonePolicy, name: str, guidance_scale: float) -> None:
    sampler = replace(SAMPLER, guidance_scale=guidance_scale)
    trajectory = _draw(policy, name, sampler)
    assert trajectory.sigmas[0] == 1
    assert trajectory.next_latents.abs().max() < 20, "the first step's noise is that of the second sigma"
    policy.transformer.requires_grad_(True)
    for index, step in enumerate(trajectory.steps):
        latents, sigmas = trajectory.latents[:, index], trajectory.sigmas
        velocity = policy.velocity(latents, sigmas[step], trajectory.condition, guidance_scale)
        replayed = log_prob(sampler.transition(latents, velocity, sigmas, step), trajectory.next_latents[:, index])
        assert replayed.requires_grad
        assert torch.equal(replayed, trajectory.log_probs[:, index])


@pytest.mark.parametrize("make", [_lora, FullWeights], ids=["lora", "full"])
def test_an_update_changes_what_is_trainable_and_nothing_else(policy: BackbonePolicy, name: str, make: Make) -> None:
    weights = make(policy)
    trained = {parameter.data_ptr() for parameter in weights.parameters()}
    before = {key: tensor.clone() for key, tensor in _tensors(policy).items()}
    base = _velocity(policy, name)
    metrics = _learn(policy, weights, name)
    assert metrics["ratio_error"] == 0
    assert metrics["skipped_updates"] == 0
    after = _tensors(policy)
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed <= {key for key, tensor in after.items() if tensor.data_ptr() in trained}
    # A fresh adapter's second factor is zero, so the first has no gradient yet.
    kind = "lora_B.current" if make is _lora else "attn" if name != "z-image" else "attention"
    moved = [key for key in changed if kind in key]
    assert moved
    assert not torch.allclose(_velocity(policy, name), base, atol=1e-5)
    if make is _lora:
        assert changed == set(moved)
        still = {key for key in after if kind in key} - changed
        # The text's states are dropped after the last block of Qwen-Image: what makes them learns nothing there.
        assert all("blocks.1." in key and re.search("txt_mlp|add_q_proj|to_add_out", key) for key in still)


def test_saved_and_loaded_it_draws_and_learns_on_as_before(policy: BackbonePolicy, name: str, tmp_path: Path) -> None:
    _learn(policy, FullWeights(policy, ()), name)
    policy.save(tmp_path / "saved")
    loaded = load_backbone(tmp_path / "saved", SETTINGS)
    assert type(loaded) is type(policy)
    assert torch.equal(_velocity(loaded, name), _velocity(policy, name))
    for each in (policy, loaded):
        _learn(each, FullWeights(each, ()), name)
    assert torch.equal(_velocity(loaded, name), _velocity(policy, name))


def test_diffusers_own_pipeline_draws_with_adapters_trained_here(
    policy: BackbonePolicy, folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    weights = _lora(policy)
    base = _velocity(policy, name)
    _learn(policy, weights, name)
    weights.save_lora(tmp_path)
    pipeline_class: Any = DiffusionPipeline
    pipeline = pipeline_class.from_pretrained(str(folders[name]))
    pipeline.load_lora_weights(str(tmp_path))
    adapted = {f"{key}.weight" for key, m in pipeline.transformer.named_modules() if isinstance(m, LoraLayer)}
    assert len(adapted) == len(policy.lora_targets) * sum(
        key.endswith(f"{policy.lora_targets[0]}.weight") for key in adapted
    )
    theirs = type(policy)(pipeline, SETTINGS)
    assert not torch.allclose(_velocity(policy, name), base, atol=1e-4)
    assert torch.allclose(_velocity(theirs, name), _velocity(policy, name), atol=1e-5)


def test_adapters_are_restored_on_a_fresh_base(policy: BackbonePolicy, folders: dict[str, Path], name: str) -> None:
    weights = _lora(policy)
    base = _velocity(policy, name)
    _learn(policy, weights, name)
    fresh = load_backbone(folders[name], SETTINGS)
    _lora(fresh).load_state(weights.state())
    assert not torch.allclose(_velocity(policy, name), base, atol=1e-5)
    assert torch.equal(_velocity(fresh, name), _velocity(policy, name))


def test_gradient_checkpointing_gives_the_same_gradients(folders: dict[str, Path], name: str) -> None:
    gradients = []
    for is_on in (False, True):
        policy = load_backbone(folders[name], replace(SETTINGS, gradient_checkpointing=is_on))
        policy.transformer.requires_grad_(True)
        latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
        velocity = policy.velocity(latents, torch.tensor(0.6), policy.encode(_prompts(name)), 2.0)
        velocity.square().mean().backward()  # type: ignore[no-untyped-call]
        gradients.append({key: p.grad for key, p in policy.transformer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 1e-3
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][key], gradient, rtol=1e-4, atol=1e-7), key
