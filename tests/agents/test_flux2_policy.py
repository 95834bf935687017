"""FLUX.2-klein: the same images as diffusers' own pipeline with any number of references, exact policy gradients."""

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
from agents.policies.flux2 import Flux2KleinPolicy
from agents.policies.loading import load_backbone
from agents.policies.tiny.flux import make_tiny_flux2_klein
from rewards.base import Prompt
from tests.agents import flux_checks as checks
from tests.agents.flux_checks import SETTINGS, SIZES, asks, plain_pipeline

TASKS = [0, 1, 2]
"""Numbers of source images."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("klein")
    make_tiny_flux2_klein(made, seed=3)
    return made


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return plain_pipeline(folder, "Flux2KleinPipeline")


@pytest.fixture(scope="module")
def policy(folder: Path) -> BackbonePolicy:
    """For tests that change nothing in it."""
    return load_backbone(folder, SETTINGS)


def pipeline_images(pipeline: Any, policy: BackbonePolicy, prompts: list[Prompt], **given: Any) -> NDArray[np.float32]:
    """What diffusers' own pipeline draws from the policy's initial latents, in [0, 1]; references are a call's."""
    height, width = policy.image_size
    images = [
        pipeline(
            **given,
            prompt=prompt.text,
            image=checks.pictures(prompt.source_images) or None,
            height=height,
            width=width,
            latents=latents[None],
            max_sequence_length=SETTINGS.max_sequence_length,
            output_type="np",
        ).images
        for prompt, latents in zip(prompts, checks.initial_latents(policy), strict=True)
    ]
    return np.concatenate(images)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_sources", TASKS)
def test_deterministic_sampling_is_the_pipelines(
    folder: Path, pipeline: Any, num_sources: int, size: tuple[int, int]
) -> None:
    policy = load_backbone(folder, replace(SETTINGS, height=size[0], width=size[1]))
    prompts = asks(policy, num_sources)
    for guidance_scale, steps in ((1.0, 4), (3.0, 3)):
        x_0 = checks.rollout(policy, prompts, checks.deterministic(steps, guidance_scale)).x_0
        expected = pipeline_images(pipeline, policy, prompts, num_inference_steps=steps, guidance_scale=guidance_scale)
        checks.check_images(policy, x_0, expected)


def test_references_are_the_pipelines_latents_in_order(pipeline: Any, policy: BackbonePolicy) -> None:
    prompts = asks(policy, 2)
    condition = policy.encode(prompts)
    for sample, prompt in enumerate(prompts):
        images = [pipeline.image_processor.preprocess(picture) for picture in checks.pictures(prompt.source_images)]
        with torch.no_grad():
            expected, _ = pipeline.prepare_image_latents(images, 1, None, "cpu", torch.float32)
        ours = [condition.tensors[f"reference_{index}"][sample] for index in range(2)]
        packed = torch.cat([latents.flatten(1).T for latents in ours])
        torch.testing.assert_close(packed, expected[0], atol=1e-5, rtol=1e-5)


def test_prompts_and_references_and_their_order_are_heard(policy: BackbonePolicy) -> None:
    plain, one, two = (asks(policy, count) for count in TASKS)
    swapped = [Prompt(prompt.text, prompt.source_images[::-1]) for prompt in two]
    velocities = [
        checks.some_velocity(policy, policy.encode(prompts)) for prompts in (plain, plain[::-1], one, two, swapped)
    ]
    for first in range(5):
        for second in range(first):
            assert not torch.allclose(velocities[first], velocities[second], atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("num_sources", TASKS)
def test_ratio_is_exactly_one_at_the_weights_that_drew(
    policy: BackbonePolicy, num_sources: int, guidance_scale: float
) -> None:
    checks.check_ratio_is_one(policy, num_sources, guidance_scale)


@pytest.mark.parametrize("float32_weights", [False, True])
def test_ratio_is_exactly_one_in_bfloat16(folder: Path, float32_weights: bool) -> None:
    settings = replace(SETTINGS, dtype="bfloat16", float32_weights=float32_weights)
    checks.check_ratio_is_one(load_backbone(folder, settings), num_sources=1, guidance_scale=3.0)


@pytest.mark.parametrize("make_weights", [checks.lora, checks.full])
@pytest.mark.parametrize("num_sources", [0, 2])
def test_an_update_changes_what_is_trainable_and_nothing_else(
    folder: Path, num_sources: int, make_weights: Any
) -> None:
    policy = load_backbone(folder, SETTINGS)
    checks.check_update(policy, make_weights(policy), num_sources)


@pytest.mark.parametrize("num_sources", [0, 1])
def test_adapters_load_into_diffusers_own_pipeline(folder: Path, tmp_path: Path, num_sources: int) -> None:
    policy, pipeline = load_backbone(folder, SETTINGS), plain_pipeline(folder, "Flux2KleinPipeline")
    prompts, given = asks(policy, num_sources), {"num_inference_steps": 3, "guidance_scale": 1.0}
    before = pipeline_images(pipeline, policy, prompts, **given)
    weights = checks.lora(policy)
    for _ in range(3):
        checks.learn_once(policy, weights, num_sources)
    pipeline.load_lora_weights(str(weights.save_lora(tmp_path).parent))
    after = pipeline_images(pipeline, policy, prompts, **given)
    assert np.abs(after - before).max() > 1e-3
    checks.check_images(policy, checks.rollout(policy, prompts, checks.deterministic(3, 1.0)).x_0, after)


def test_a_saved_policy_goes_on_as_if_never_saved(folder: Path, tmp_path: Path) -> None:
    checks.check_saved(load_backbone(folder, SETTINGS), tmp_path / "saved")


@pytest.mark.parametrize("num_sources", [0, 1])
def test_checkpointing_changes_no_gradient(folder: Path, num_sources: int) -> None:
    checks.check_checkpointing(folder, num_sources)


def test_a_distilled_checkpoint_takes_no_guidance(tmp_path: Path) -> None:
    make_tiny_flux2_klein(tmp_path, seed=3, is_distilled=True)
    policy = load_backbone(tmp_path, SETTINGS)
    expected = pipeline_images(
        plain_pipeline(tmp_path, "Flux2KleinPipeline"), policy, asks(policy, 0), num_inference_steps=4,
        guidance_scale=1.0,
    )  # fmt: skip
    checks.check_images(policy, checks.rollout(policy, asks(policy, 0), checks.deterministic(4, 1.0)).x_0, expected)
    with pytest.raises(ValueError, match=r"expected 1 for a distilled FLUX.2-klein, .* got 2.0"):
        checks.some_velocity(policy)
    # By hand, 16 tokens at 4 steps: from 10 steps at 1.899731 to 200 at 0.459375.
    assert policy.own_shift == pytest.approx(math.exp(1.899731 + 6 / 190 * (1.899731 - 0.459375)), rel=1e-5)


def test_latents_and_schedule_are_those_of_the_image_size(folder: Path) -> None:
    policy = load_backbone(folder, replace(SETTINGS, height=512, width=768))
    assert isinstance(policy, Flux2KleinPolicy)
    assert policy.latent_shape == (128, 32, 48)
    # By hand, 1536 tokens at 50 steps: from 10 steps at 2.032551 to 200 at 0.716665.
    assert policy.own_shift == pytest.approx(math.exp(2.032551 - 40 / 190 * (2.032551 - 0.716665)), rel=1e-5)
    sigmas = policy.own_sigmas(10)
    assert float(sigmas[5]) == pytest.approx(1 / (1 + math.exp(-2.032551)), rel=1e-4)
    assert (float(sigmas[0]), float(sigmas[-1]), len(sigmas)) == (1, 0, 11)
