"""Qwen-Image's policies are its pipelines: the same latents and images, step by step, from the same noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from agents.policies.backbone import BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.qwen_image import QwenImageEditPlusPolicy, QwenImageEditPolicy, QwenImagePolicy
from agents.policies.tiny.qwen_image import (
    make_tiny_qwen_image,
    make_tiny_qwen_image_edit,
    make_tiny_qwen_image_edit_plus,
)
from agents.rollout import denoise
from agents.samplers import ODE, sample_noise
from rewards.base import Prompt

TEXTS = ("two red circles", "a photo of the blue square left of one dog")
NEGATIVE = "blurry"
SEEDS = (3, 4)
STEPS = 3
AREA = 64 * 64
SETTINGS = BackboneSettings(
    height=64,
    width=64,
    dtype="float32",
    negative_prompt=NEGATIVE,
    edit_negative_prompt=NEGATIVE,
    reference_pixels=AREA,
)


@dataclass(frozen=True)
class Kind:
    make: Callable[[Path], Path]
    policy: type[QwenImagePolicy]


KINDS = {
    "image": Kind(make_tiny_qwen_image, QwenImagePolicy),
    "edit": Kind(make_tiny_qwen_image_edit, QwenImageEditPolicy),
    "plus": Kind(make_tiny_qwen_image_edit_plus, QwenImageEditPlusPolicy),
    "plus-2511": Kind(lambda folder: make_tiny_qwen_image_edit_plus(folder, zero_cond_t=True), QwenImageEditPlusPolicy),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: kind.make(tmp_path_factory.mktemp(name)) for name, kind in KINDS.items()}


def _load(folders: dict[str, Path], kind: str, settings: BackboneSettings = SETTINGS) -> QwenImagePolicy:
    policy = load_backbone(folders[kind], settings)
    assert type(policy) is KINDS[kind].policy
    return policy


def _prompts(num_sources: int, size: tuple[int, int]) -> list[Prompt]:
    random = np.random.default_rng(0)
    low = random.integers(0, 256, (len(TEXTS), num_sources, 4, 4, 3), np.uint8)
    height, width = size
    sources = low.repeat(height // 4, axis=2).repeat(width // 4, axis=3)
    return [Prompt(text, tuple(images)) for text, images in zip(TEXTS, sources, strict=True)]


def _drawn_by_us(policy: QwenImagePolicy, prompts: Sequence[Prompt], guidance_scale: float) -> Tensor:
    sampler = ODE(num_inference_steps=STEPS, guidance_scale=guidance_scale, shift=None)
    return denoise(policy, policy.encode(prompts), sampler, (), SEEDS[: len(prompts)]).x_0


@functools.cache
def _pipeline(folder: Path, name: str) -> Any:
    """Diffusers' own pipeline, loaded apart from any policy."""
    pipeline_class: Any = diffusers.DiffusionPipeline
    pipeline = pipeline_class.from_pretrained(str(folder))
    if type(pipeline).__name__ != name:
        parts = {part: module for part, module in pipeline.components.items() if part != "processor"}
        pipeline = getattr(diffusers, name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _drawn_by_diffusers(
    folder: Path, policy: QwenImagePolicy, prompts: Sequence[Prompt], guidance_scale: float
) -> tuple[Tensor, NDArray[np.float32]]:
    """Final latents and images in [0, 1]; text-to-image in one batch, editing one by one, as its pipelines want it."""
    name = "QwenImagePipeline" if not prompts[0].source_images else policy.pipeline_name
    pipeline = _pipeline(folder, name)
    noise = sample_noise(SEEDS, policy.latent_shape)
    groups = [[0, 1]] if not prompts[0].source_images else [[0], [1]]
    latents: list[Tensor] = []
    images: list[NDArray[np.float32]] = []

    def keep(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == STEPS - 1:
            latents.append(tensors["latents"])
        return tensors

    for group in groups:
        pictures = [Image.fromarray(image) for image in prompts[group[0]].source_images]
        height, width = policy.image_size
        more = {"image": pictures if len(pictures) > 1 else pictures[0]} if pictures else {}
        result = pipeline(
            prompt=[prompts[i].text for i in group],
            negative_prompt=[NEGATIVE] * len(group) if guidance_scale > 1 else None,
            true_cfg_scale=guidance_scale,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            latents=pipeline._pack_latents(noise[group], len(group), *policy.latent_shape),
            callback_on_step_end=keep,
            output_type="np",
            **more,
        )
        images.append(result.images)
    unpacked = pipeline._unpack_latents(torch.cat(latents), *policy.image_size, pipeline.vae_scale_factor)
    return unpacked.squeeze(2), np.concatenate(images)


def _shrink_references(monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    """The pipelines have their area in their code."""
    original: Any = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: original(pixels, ratio))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", pixels)


def _check_equal(folder: Path, policy: QwenImagePolicy, num_sources: int, guidance_scale: float) -> None:
    prompts = _prompts(num_sources, policy.image_size)
    latents = _drawn_by_us(policy, prompts, guidance_scale)
    expected_latents, expected = _drawn_by_diffusers(folder, policy, prompts, guidance_scale)
    assert torch.allclose(latents, expected_latents, atol=1e-4)
    assert not torch.allclose(_drawn_by_us(policy, prompts[::-1], guidance_scale), latents, atol=2e-2)
    ours = policy.decode(latents).numpy()
    assert ours.shape == (len(prompts), *policy.image_size, 3)
    # Nothing but rounding to whole levels lies between them, and pictures differ by far more.
    assert np.abs(ours - expected * 255).max() < 0.6
    assert expected.std() > 0.05
    assert np.abs(expected[0] - expected[1]).max() > 0.1


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=str)
@pytest.mark.parametrize(
    ("kind", "num_sources"), [("image", 0), ("edit", 0), ("edit", 1), ("plus", 0), ("plus", 1), ("plus", 2)]
)
def test_draws_what_the_pipeline_draws(
    folders: dict[str, Path],
    kind: str,
    num_sources: int,
    size: tuple[int, int],
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _shrink_references(monkeypatch, AREA)
    policy = _load(folders, kind, replace(SETTINGS, height=size[0], width=size[1]))
    _check_equal(folders[kind], policy, num_sources, guidance_scale)


def test_sources_of_time_zero_are_modulated_apart(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _shrink_references(monkeypatch, AREA)
    _check_equal(folders["plus-2511"], _load(folders, "plus-2511"), 2, 4.0)


def test_sources_have_the_pipelines_own_area_by_default(folders: dict[str, Path]) -> None:
    policies = [_load(folders, kind, replace(SETTINGS, width=48, reference_pixels=0)) for kind in ("edit", "plus")]
    edit, plus = policies
    assert isinstance(edit, QwenImageEditPolicy)
    assert isinstance(plus, QwenImageEditPlusPolicy)
    assert edit.reference_pixels == edit.seen_pixels == plus.reference_pixels == 1024 * 1024
    assert plus.seen_pixels == pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
    size_of_area: Any = pipeline_qwenimage_edit.calculate_dimensions
    width, height, _ = size_of_area(1024 * 1024, 48 / 64)
    with torch.no_grad():
        latents = edit.encode_sources(torch.zeros(1, *edit.image_size, 3, dtype=torch.uint8))
    assert latents.shape == (1, 16, height // 8, width // 8)


@pytest.mark.parametrize("kind", ["image", "edit", "plus"])
def test_tiny_templates_begin_with_as_many_tokens_as_published_ones(folders: dict[str, Path], kind: str) -> None:
    pipeline = _load(folders, kind).pipeline
    beginning = pipeline.prompt_template_encode.split("{}")[0].split("<|vision_start|>")[0]
    assert len(pipeline.tokenizer(beginning).input_ids) == pipeline.prompt_template_encode_start_idx


def test_the_schedule_is_the_pipelines(folders: dict[str, Path]) -> None:
    policy = _load(folders, "image")
    sigmas = policy.own_sigmas(8)
    # 16 tokens of a line from 0.5 at 256 to 0.9 at 8192.
    mu = 0.5 - 0.4 * 240 / 7936
    assert policy.own_shift == pytest.approx(np.exp(mu))
    even = np.linspace(1, 1 / 8, 8)
    shifted = np.exp(mu) / (np.exp(mu) + 1 / even - 1)
    stretched = 1 - (1 - shifted) * 0.98 / (1 - shifted[-1])
    assert np.allclose(sigmas, [*stretched, 0], atol=1e-6)
    assert sigmas[0] == 1
    with pytest.raises(ValueError, match="expected 2 or more, got 1: this model's first and last steps start at 1 and"):
        policy.own_sigmas(1)


def test_guidance_keeps_the_prompted_length_of_every_token(folders: dict[str, Path]) -> None:
    policy = _load(folders, "image", replace(SETTINGS, width=96))
    negative, positive = torch.randn(2, 3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    guided = policy.guide(negative, positive, 3.0)
    plain = negative + 3.0 * (positive - negative)

    def tokens(latents: Tensor) -> Tensor:
        """[B, 4 x 6 tokens, 16 channels of 2 x 2]."""
        return latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    assert tokens(guided).shape == (3, 24, 64)
    assert torch.allclose(tokens(guided).norm(dim=2), tokens(positive).norm(dim=2), rtol=1e-5)
    assert torch.allclose(torch.cosine_similarity(tokens(guided), tokens(plain), dim=2), torch.ones(3, 24))
    assert not torch.allclose(guided, plain, atol=0.1)


def test_padding_of_a_longer_neighbours_length_is_not_attended_to(folders: dict[str, Path]) -> None:
    policy = _load(folders, "plus")
    prompts = _prompts(2, policy.image_size)
    both = policy.encode(prompts)
    lengths = both.tensors["prompt_mask"].sum(dim=1)
    assert lengths[0] < lengths[1] == both.tensors["prompt_mask"].shape[1]
    latents, sigma = torch.randn(2, *policy.latent_shape), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        together = policy.velocity(latents, sigma, both)
        for i, prompt in enumerate(prompts):
            alone = policy.velocity(latents[i : i + 1], sigma[i : i + 1], policy.encode([prompt]))
            assert torch.allclose(alone, together[i : i + 1], atol=1e-5)


def test_which_picture_is_the_first_matters(folders: dict[str, Path]) -> None:
    policy = _load(folders, "plus")
    prompt = _prompts(2, policy.image_size)[0]
    swapped = Prompt(prompt.text, prompt.source_images[::-1])
    one, other = policy.encode([prompt]), policy.encode([swapped])
    assert torch.equal(one.tensors["reference_0"], other.tensors["reference_1"])
    assert not torch.allclose(one.tensors["prompt_embeds"], other.tensors["prompt_embeds"], atol=1e-2)
    latents = torch.randn(1, *policy.latent_shape)
    with torch.no_grad():
        first, second = (policy.velocity(latents, torch.tensor(0.5), condition) for condition in (one, other))
    assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize(("kind", "num_sources", "at_most"), [("image", 1, 0), ("edit", 2, 1)])
def test_more_sources_than_a_model_takes_are_refused(
    folders: dict[str, Path], kind: str, num_sources: int, at_most: int
) -> None:
    policy = _load(folders, kind)
    message = f"expected at most {at_most} a prompt for {KINDS[kind].policy.__name__}, got {num_sources}"
    with pytest.raises(ValueError, match=message):
        policy.encode(_prompts(num_sources, policy.image_size))


def test_an_area_without_a_token_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"reference_pixels: expected 0 .* or 32 x 32 and more, got 100"):
        _load(folders, "edit", replace(SETTINGS, reference_pixels=100))


def test_weights_in_float32_are_run_in_bfloat16(folders: dict[str, Path]) -> None:
    policy = _load(folders, "edit", replace(SETTINGS, dtype="bfloat16", float32_weights=True))
    exact = _load(folders, "edit")
    prompts = _prompts(1, policy.image_size)
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = policy.velocity(latents.bfloat16(), torch.tensor(0.5), policy.encode(prompts), 2.0)
        expected = exact.velocity(latents, torch.tensor(0.5), exact.encode(prompts), 2.0)
    assert {parameter.dtype for parameter in policy.transformer.parameters()} == {torch.float32}
    assert velocity.dtype == torch.bfloat16
    assert torch.cosine_similarity(velocity.float().flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(("cached", "prepared"), [(6, 3), (5, 2), (4, 2), (2, 1), (1, 0)])
def test_an_instruction_and_its_negative_are_kept_together(
    folders: dict[str, Path], cached: int, prepared: int
) -> None:
    """The encoder sees the picture with either, so each prompt has two embeddings, and is asked for both but once."""
    policy = _load(folders, "edit", replace(SETTINGS, cached_prompts=cached))
    asked: list[int] = []
    policy.text_encoders[0].register_forward_hook(lambda *_: asked.append(1))
    words = ("red", "blue", "pale")
    prompts = [Prompt(f"make it {word}", (np.full((64, 64, 3), 60 * i, np.uint8),)) for i, word in enumerate(words)]
    policy.prepare(prompts)
    assert len(asked) == 2 * prepared
    for prompt in prompts:
        policy.encode([prompt])
    assert len(asked) == 6
