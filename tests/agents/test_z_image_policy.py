"""Z-Image's policy is its pipeline: the same latents and images from the same noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from agents.policies.backbone import BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.tiny.z_image import make_tiny_z_image
from agents.policies.z_image import ZImagePolicy
from agents.rollout import denoise
from agents.samplers import ODE, sample_noise
from rewards.base import Prompt

TEXTS = ("two red circles", "a photo of the blue square " + "left of one dog " * 12)
NEGATIVE = "blurry"
SEEDS = (3, 4)
STEPS = 3
SETTINGS = BackboneSettings(height=64, width=64, dtype="float32", negative_prompt=NEGATIVE, max_sequence_length=96)
PROMPTS = [Prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_z_image(tmp_path_factory.mktemp("z_image"))


def _load(folder: Path, settings: BackboneSettings = SETTINGS) -> ZImagePolicy:
    policy = load_backbone(folder, settings)
    assert isinstance(policy, ZImagePolicy)
    return policy


@pytest.mark.parametrize(("guidance_scale", "limit"), [(1.0, 0.0), (5.0, 0.0), (5.0, 1.0)])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=str)
def test_draws_what_the_pipeline_draws(
    folder: Path, size: tuple[int, int], guidance_scale: float, limit: float
) -> None:
    policy = _load(folder, replace(SETTINGS, height=size[0], width=size[1]))
    policy.guidance_limit = limit
    condition = policy.encode(PROMPTS)
    lengths = condition.tensors["prompt_mask"].sum(dim=1).tolist()
    # Captions are padded to multiples of 32: two groups of them need a mask.
    assert lengths[0] < 32 < lengths[1]
    latents = denoise(policy, condition, ODE(STEPS, guidance_scale, shift=None), (), SEEDS).x_0
    kept: list[Tensor] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(tensors["latents"])
        return tensors

    pipeline_class: Any = diffusers.ZImagePipeline
    pipeline = pipeline_class.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=list(TEXTS),
        negative_prompt=[NEGATIVE] * len(TEXTS),
        guidance_scale=guidance_scale - 1,
        cfg_normalization=limit,
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        latents=sample_noise(SEEDS, policy.latent_shape),
        max_sequence_length=SETTINGS.max_sequence_length,
        callback_on_step_end=keep,
        output_type="np",
    ).images
    assert torch.allclose(latents, kept[-1], atol=1e-4)
    assert not torch.allclose(latents, sample_noise(SEEDS, policy.latent_shape), atol=0.1)
    ours = policy.decode(latents).numpy()
    assert ours.shape == (len(TEXTS), *size, 3)
    assert np.abs(ours - expected * 255).max() < 0.6
    assert expected.std() > 0.05
    assert np.abs(expected[0] - expected[1]).max() > 0.1


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_the_schedule_is_shifted_alike_at_any_size(folder: Path, shift: float) -> None:
    policy = _load(folder)
    policy.pipeline.scheduler.set_shift(shift)
    even = np.linspace(1, 1 / 8, 8)
    assert policy.own_shift == shift
    assert np.allclose(policy.own_sigmas(8), [*(shift * even / (1 + (shift - 1) * even)), 0], atol=1e-6)
    assert policy.own_sigmas(8)[0] == 1
    assert policy.own_sigmas(1).tolist() == [1, 0]


def test_guidance_is_shortened_to_its_limit(folder: Path) -> None:
    policy = _load(folder)
    negative, positive = torch.randn(2, 3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    free = policy.guide(negative, positive, 4.0)
    assert torch.equal(free, negative + 4.0 * (positive - negative))
    policy.guidance_limit = 1.5
    limited = policy.guide(negative, positive, 4.0)
    assert torch.allclose(limited.flatten(1).norm(dim=1), 1.5 * positive.flatten(1).norm(dim=1))
    assert torch.allclose(torch.cosine_similarity(limited.flatten(1), free.flatten(1)), torch.ones(3))
    policy.guidance_limit = 100.0
    assert torch.equal(policy.guide(negative, positive, 4.0), free)


def test_source_images_are_refused(folder: Path) -> None:
    policy = _load(folder)
    picture = np.zeros((*policy.image_size, 3), np.uint8)
    with pytest.raises(ValueError, match="expected at most 0 a prompt for ZImagePolicy, got 1"):
        policy.encode([Prompt("make it green", (picture,))])


def test_weights_in_float32_are_run_in_bfloat16(folder: Path) -> None:
    policy, exact = _load(folder, replace(SETTINGS, dtype="bfloat16", float32_weights=True)), _load(folder)
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = policy.velocity(latents.bfloat16(), torch.tensor(0.5), policy.encode(PROMPTS), 2.0)
        expected = exact.velocity(latents, torch.tensor(0.5), exact.encode(PROMPTS), 2.0)
    assert {parameter.dtype for parameter in policy.transformer.parameters()} == {torch.float32}
    assert torch.cosine_similarity(velocity.float().flatten(), expected.flatten(), dim=0) > 0.99
