"""FLUX.1-dev and FLUX.1-Kontext: the same images as diffusers' own pipelines, and exact policy gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from agents.policies.backbone import BackbonePolicy
from agents.policies.flux import FluxKontextPolicy, FluxPolicy
from agents.policies.loading import load_backbone
from agents.policies.tiny.flux import make_tiny_flux, make_tiny_flux_kontext
from rewards.base import Prompt
from tests.agents import flux_checks as checks
from tests.agents.flux_checks import SETTINGS, SIZES, TEXTS, asks, plain_pipeline

MODELS = {"dev": (make_tiny_flux, "FluxPipeline"), "kontext": (make_tiny_flux_kontext, "FluxKontextPipeline")}
TASKS = [("dev", 0), ("kontext", 0), ("kontext", 1)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in made.items():
        MODELS[name][0](folder, seed=3)
    return made


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: plain_pipeline(folder, MODELS[name][1]) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def policies(folders: dict[str, Path]) -> dict[str, BackbonePolicy]:
    """For tests that change nothing in them."""
    return {name: load_backbone(folder, SETTINGS) for name, folder in folders.items()}


def pipeline_images(pipeline: Any, policy: BackbonePolicy, prompts: list[Prompt], **given: Any) -> NDArray[np.float32]:
    """What diffusers' own pipeline draws from the policy's initial latents, in [0, 1]."""
    latents = checks.initial_latents(policy)
    height, width = policy.image_size
    given |= {"prompt": [prompt.text for prompt in prompts], "negative_prompt": ["noise"] * len(prompts)}
    if prompts[0].source_images:
        given["image"] = checks.pictures([prompt.source_images[0] for prompt in prompts])
    if isinstance(policy, FluxKontextPolicy):
        given |= {"max_area": height * width, "_auto_resize": False}
    images: NDArray[np.float32] = pipeline(
        **given,
        height=height,
        width=width,
        latents=pipeline._pack_latents(latents, *latents.shape),
        max_sequence_length=SETTINGS.max_sequence_length,
        output_type="np",
    ).images
    return images


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "num_sources"), TASKS)
def test_deterministic_sampling_is_the_pipelines(
    folders: dict[str, Path], pipelines: dict[str, Any], name: str, num_sources: int, size: tuple[int, int]
) -> None:
    settings = replace(SETTINGS, height=size[0], width=size[1], negative_prompt="noise", edit_negative_prompt="noise")
    policy = load_backbone(folders[name], settings)
    prompts = asks(policy, num_sources)
    default_guidance = {"dev": 3.5, "kontext": 2.5}[name]
    for guidance_scale, steps in ((1.0, 4), (3.0, 3)):
        x_0 = checks.rollout(policy, prompts, checks.deterministic(steps, guidance_scale)).x_0
        expected = pipeline_images(
            pipelines[name], policy, prompts, num_inference_steps=steps, guidance_scale=default_guidance,
            true_cfg_scale=guidance_scale,
        )  # fmt: skip
        checks.check_images(policy, x_0, expected)


def test_distilled_guidance_is_a_setting_and_reaches_the_transformer(
    folders: dict[str, Path], pipelines: dict[str, Any], policies: dict[str, BackbonePolicy]
) -> None:
    policy = load_backbone(folders["dev"], replace(SETTINGS, distilled_guidance=7.0))
    sampler = checks.deterministic(3, 1.0)
    x_0 = checks.rollout(policy, asks(policy, 0), sampler).x_0
    expected = pipeline_images(pipelines["dev"], policy, asks(policy, 0), num_inference_steps=3, guidance_scale=7.0)
    checks.check_images(policy, x_0, expected)
    assert not torch.allclose(x_0, checks.rollout(policies["dev"], asks(policy, 0), sampler).x_0, atol=1e-3)


def test_a_reference_is_the_mode_of_the_vaes_posterior(
    pipelines: dict[str, Any], policies: dict[str, BackbonePolicy]
) -> None:
    policy, pipeline = policies["kontext"], pipelines["kontext"]
    prompts = asks(policy, 1)
    images = pipeline.image_processor.preprocess(checks.pictures([prompt.source_images[0] for prompt in prompts]))
    with torch.no_grad():
        expected = pipeline._encode_vae_image(images, generator=torch.Generator())
    condition = policy.encode(prompts)
    assert condition.negative is not None
    for branch in (condition, condition.negative):
        torch.testing.assert_close(branch.tensors["reference_0"], expected, atol=1e-5, rtol=1e-5)


def test_prompts_and_references_are_heard(policies: dict[str, BackbonePolicy]) -> None:
    policy = policies["kontext"]
    plain, edit = asks(policy, 0), asks(policy, 1)
    other = [Prompt(text, checks.sources(1, policy.image_size, seed=9)) for text in TEXTS]
    velocities = [checks.some_velocity(policy, policy.encode(prompts)) for prompts in (plain, plain[::-1], edit, other)]
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(velocities[first], velocities[second], atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(("name", "num_sources"), TASKS)
def test_ratio_is_exactly_one_at_the_weights_that_drew(
    policies: dict[str, BackbonePolicy], name: str, num_sources: int, guidance_scale: float
) -> None:
    checks.check_ratio_is_one(policies[name], num_sources, guidance_scale)


@pytest.mark.parametrize("float32_weights", [False, True])
def test_ratio_is_exactly_one_in_bfloat16(folders: dict[str, Path], float32_weights: bool) -> None:
    settings = replace(SETTINGS, dtype="bfloat16", float32_weights=float32_weights)
    policy = load_backbone(folders["kontext"], settings)
    checks.check_ratio_is_one(policy, num_sources=1, guidance_scale=3.0)


@pytest.mark.parametrize("make_weights", [checks.lora, checks.full])
@pytest.mark.parametrize(("name", "num_sources"), [("dev", 0), ("kontext", 1)])
def test_an_update_changes_what_is_trainable_and_nothing_else(
    folders: dict[str, Path], name: str, num_sources: int, make_weights: Any
) -> None:
    policy = load_backbone(folders[name], SETTINGS)
    checks.check_update(policy, make_weights(policy), num_sources)


@pytest.mark.parametrize(("name", "num_sources"), [("dev", 0), ("kontext", 1)])
def test_adapters_load_into_diffusers_own_pipeline(
    folders: dict[str, Path], tmp_path: Path, name: str, num_sources: int
) -> None:
    policy, pipeline = load_backbone(folders[name], SETTINGS), plain_pipeline(folders[name], MODELS[name][1])
    prompts, given = asks(policy, num_sources), {"num_inference_steps": 3, "guidance_scale": policy.distilled_guidance}
    before = pipeline_images(pipeline, policy, prompts, **given)
    weights = checks.lora(policy)
    for _ in range(3):
        checks.learn_once(policy, weights, num_sources)
    pipeline.load_lora_weights(str(weights.save_lora(tmp_path).parent))
    after = pipeline_images(pipeline, policy, prompts, **given)
    assert np.abs(after - before).max() > 1e-3
    checks.check_images(policy, checks.rollout(policy, prompts, checks.deterministic(3, 1.0)).x_0, after)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_policy_goes_on_as_if_never_saved(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    checks.check_saved(load_backbone(folders[name], SETTINGS), tmp_path / "saved")


@pytest.mark.parametrize(("name", "num_sources"), [("dev", 0), ("kontext", 1)])
def test_checkpointing_changes_no_gradient(folders: dict[str, Path], name: str, num_sources: int) -> None:
    checks.check_checkpointing(folders[name], num_sources)


def test_own_schedule_has_the_published_shifts(folders: dict[str, Path]) -> None:
    """mu rises from 0.5 at 256 tokens to 1.15 at 4096: by hand, e^1.15 = 3.158 at 1024 x 1024."""
    policy = load_backbone(folders["dev"], replace(SETTINGS, height=1024, width=1024))
    assert isinstance(policy, FluxPolicy)
    assert policy.latent_shape == (16, 128, 128)
    assert policy.own_shift == pytest.approx(math.exp(1.15))
    sigmas = policy.own_sigmas(2)
    assert sigmas.tolist() == pytest.approx([1, 3.158 / (1 + 3.158), 0], abs=1e-4)
    assert sigmas[0] == 1
    small = load_backbone(folders["dev"], replace(SETTINGS, height=256, width=256))
    assert small.own_shift == pytest.approx(math.exp(0.5))


def test_a_schedule_without_dynamic_shift_keeps_its_own(folders: dict[str, Path]) -> None:
    """FLUX.1-schnell's scheduler has a shift of 1 at every size."""
    policy = load_backbone(folders["dev"], SETTINGS)
    policy.pipeline.scheduler = type(policy.pipeline.scheduler)(shift=1.0)
    assert policy.own_shift == 1
    assert policy.own_sigmas(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(("name", "num_sources", "most"), [("dev", 1, 0), ("kontext", 2, 1)])
def test_more_source_images_than_the_model_takes_are_refused(
    policies: dict[str, BackbonePolicy], name: str, num_sources: int, most: int
) -> None:
    with pytest.raises(ValueError, match=f"expected at most {most} a prompt for .* got {num_sources}"):
        policies[name].encode(asks(policies[name], num_sources))


def test_settings_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"width: expected a multiple of 16 pixels for FluxPolicy, got 72; 64 would do"
    ):
        load_backbone(folders["dev"], replace(SETTINGS, width=72))
    with pytest.raises(ValueError, match=r"max_sequence_length: expected at most 512 for FLUX.1, got 600"):
        load_backbone(folders["dev"], replace(SETTINGS, max_sequence_length=600))
    with pytest.raises(ValueError, match="distilled_guidance: expected 0 or more, or None, got -1"):
        replace(SETTINGS, distilled_guidance=-1.0)
