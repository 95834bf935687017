"""UniPic2-MetaQuery draws what the published pipelines draw, and learns as every backbone does: tiny, real classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from agents.policies.backbone import BackbonePolicy, BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.weights import FullWeights, LoraSettings, LoraWeights, PolicyWeights
from agents.samplers import ODE, FlowSDE
from tests.agents.backbone_checks import (
    TEXTS,
    all_tensors,
    changed,
    check_ratio_is_one,
    check_saving,
    draw,
    encoded_by_hand,
    first_noise,
    kontext_by_hand,
    prompts_for,
    rollout_of,
    update,
)
from tests.agents.tiny_metaquery import NUM_QUERIES, make_metaquery

SETTINGS = BackboneSettings(
    height=64, width=64, dtype="float32", negative_prompt="noise", edit_negative_prompt="bad noise"
)
SDE = FlowSDE(num_inference_steps=3, shift=None)
Load = Callable[..., MetaQueryPolicy]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose velocity depends on its input: SD3's output layer starts at zero."""
    root = tmp_path_factory.mktemp("metaquery")
    policy = load_backbone(make_metaquery(root, SETTINGS), SETTINGS)
    torch.manual_seed(1)
    for parameter in policy.transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    policy.save(root / "policy")
    return root / "policy"


@pytest.fixture
def load(folder: Path) -> Load:
    def loaded(**changes: Any) -> MetaQueryPolicy:
        policy = load_backbone(folder, replace(SETTINGS, **changes))
        assert isinstance(policy, MetaQueryPolicy)
        return policy

    return loaded


def full(policy: BackbonePolicy) -> PolicyWeights:
    return FullWeights(policy, ("reference",))


def lora(policy: MetaQueryPolicy) -> LoraWeights:
    return LoraWeights(policy, LoraSettings(4, 8), ("reference",), seed=1)


def plain_pipeline(policy: MetaQueryPolicy) -> Any:
    """diffusers' own on the policy's parts, without text encoders, as the released scripts make theirs."""
    encoders = dict.fromkeys(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    parts = {name: getattr(policy.pipeline, name) for name in ("transformer", "vae", "scheduler")}
    pipeline_class: Any = StableDiffusion3Pipeline
    pipeline = pipeline_class(**parts, **encoders)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# The published pipelines' sampling


def released_embeddings(policy: MetaQueryPolicy, texts: list[str], image: Any = None) -> tuple[Tensor, Tensor]:
    """A prompt and its negative as the released scripts embed them: one batch, positions left to transformers."""
    reader, lmm, queries = policy.reader, policy.lmm, policy.connector.meta_queries
    batch = reader.tokenize(texts, [() if image is None else (image,)] * 2)
    # Qwen's processor pads on the left, so that the queries follow each prompt.
    rows = [ids[mask.bool()] for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(length - len(row)), row, row.new_zeros(len(queries))]) for row in rows])
    mask = torch.stack([(torch.arange(ids.shape[1]) >= length - len(row)).long() for row in rows])
    with torch.no_grad():
        embeddings = lmm.get_input_embeddings()(ids)
        embeddings[:, -len(queries) :] = queries
        arguments: dict[str, Any] = {"inputs_embeds": embeddings, "attention_mask": mask, "use_cache": False}
        if image is not None:
            features = lmm.model.visual(batch.pixels, grid_thw=batch.grids).pooler_output
            embeddings[ids == reader.image_id] = features
            arguments["image_grid_thw"] = batch.grids
        lmm.model.rope_deltas = None
        states = lmm.model(**arguments).last_hidden_state[:, -len(queries) :]
        embedded: tuple[Tensor, Tensor] = policy.connector(states)
    return embedded


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128)])
def test_sampling_is_the_pipelines(load: Load, size: tuple[int, int], guidance_scale: float) -> None:
    height, width = size
    policy = load(height=height, width=width)
    ours = draw(policy, prompts_for(policy), ODE(4, guidance_scale, shift=None))
    states, pooled = zip(*(released_embeddings(policy, [text, "noise"]) for text in TEXTS), strict=True)
    assert states[0].shape == (2, NUM_QUERIES, 12)
    arguments: dict[str, Any] = {"height": height, "width": width, "latents": first_noise(policy, 2)}
    for index, name in enumerate(("", "negative_")):
        arguments[f"{name}prompt_embeds"] = torch.stack([pair[index] for pair in states])
        arguments[f"{name}pooled_prompt_embeds"] = torch.stack([pair[index] for pair in pooled])
    pipeline = plain_pipeline(policy)
    arguments |= {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    assert torch.allclose(ours, pipeline(**arguments, output_type="latent").images, atol=1e-5)
    images = pipeline(**arguments, output_type="np").images
    decoded = policy.decode(ours).numpy()
    assert decoded.shape == (2, height, width, 3)
    assert decoded.std() > 5
    assert np.abs(decoded - images * 255).max() <= 0.5 + 1e-2


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_editing_is_the_released_loop_written_out(load: Load, size: tuple[int, int], guidance_scale: float) -> None:
    """One prompt at a time, as released: the image to the language model, and its latents before the noisy ones."""
    policy = load(height=size[0], width=size[1])
    prompts = prompts_for(policy, 1)
    ours = draw(policy, prompts, ODE(3, guidance_scale, shift=None))
    transformer, vae, scheduler = policy.pipeline.transformer, policy.pipeline.vae, policy.pipeline.scheduler
    for prompt, noise, drawn in zip(prompts, first_noise(policy, 2), ours, strict=True):
        (image,) = prompt.source_images
        states, pooled = released_embeddings(policy, [prompt.text, "bad noise"], image)
        reference = encoded_by_hand(vae, image, vae.config.shift_factor, vae.config.scaling_factor)
        theirs = noise[None]
        scheduler.set_timesteps(3)
        with torch.no_grad():
            for time in scheduler.timesteps:
                both = [torch.cat([latents] * 2) for latents in (reference, theirs)]
                positive, negative = kontext_by_hand(transformer, both, time.expand(2), states, pooled)
                velocity = negative + guidance_scale * (positive - negative)
                theirs = scheduler.step(velocity[None], time, theirs, return_dict=False)[0]
        assert torch.allclose(drawn[None], theirs, atol=1e-5)
    without = draw(policy, prompts_for(policy), ODE(3, guidance_scale, shift=None))
    assert not torch.allclose(ours, without, atol=1e-2)


@pytest.mark.parametrize(("size", "num_tokens"), [((64, 64), 16), ((192, 128), 96)])
@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_a_dynamic_shift_follows_the_number_of_tokens(
    load: Load, size: tuple[int, int], num_tokens: int, time_shift_type: str, tmp_path: Path
) -> None:
    policy = load(height=size[0], width=size[1])
    assert policy.own_shift == 3
    dynamic: dict[str, Any] = {"shift": 1.0, "use_dynamic_shifting": True, "time_shift_type": time_shift_type}
    dynamic |= {"base_shift": 0.5, "max_shift": 1.15}
    policy.pipeline.scheduler = type(policy.pipeline.scheduler).from_config(policy.pipeline.scheduler.config, **dynamic)
    mu = 0.5 + (num_tokens - 256) * 0.65 / 3840  # A line through (256, 0.5) and (4096, 1.15).
    assert policy.own_shift == pytest.approx(np.exp(mu) if time_shift_type == "exponential" else mu)
    pipeline, condition = plain_pipeline(policy), policy.encode(prompts_for(policy)[:1])
    embeddings = {
        "prompt_embeds": condition.tensors["prompt_embeds"],
        "pooled_prompt_embeds": condition.tensors["pooled"],
    }
    arguments = {"height": size[0], "width": size[1], "latents": first_noise(policy, 1), **embeddings}
    theirs = pipeline(num_inference_steps=3, guidance_scale=1.0, output_type="latent", **arguments).images
    assert torch.equal(policy.own_sigmas(3), pipeline.scheduler.sigmas)
    assert torch.allclose(draw(policy, prompts_for(policy)[:1], ODE(3, shift=None)), theirs, atol=1e-5)
    policy.save(tmp_path)
    assert torch.equal(load_backbone(tmp_path).own_sigmas(5), policy.own_sigmas(5))
    assert not torch.allclose(policy.own_sigmas(5), load().own_sigmas(5), atol=1e-2)


# Learning


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("num_sources", [0, 1])
def test_the_ratio_is_one_at_the_rollouts_weights(
    load: Load, dtype: str, guidance_scale: float, num_sources: int
) -> None:
    sampler = FlowSDE(3, guidance_scale, shift=None)
    for make in (lora, full):
        policy = load(dtype=dtype, float32_weights=make is full)
        check_ratio_is_one(policy, make(policy), prompts_for(policy, num_sources), sampler)


@pytest.mark.parametrize("make", [full, lora])
def test_an_update_changes_only_what_is_trained(load: Load, make: Any) -> None:
    """Neither the language model, nor the connector with its queries, nor the VAE."""
    policy = load()
    weights = make(policy)
    before = all_tensors(policy)
    assert {name.split(".")[0] for name in before} == {"transformer", "vae", "text_encoder/0", "text_encoder/1"}
    assert "text_encoder/1.meta_queries" in before
    for num_sources in (0, 1):
        update(policy, weights, rollout_of(policy, prompts_for(policy, num_sources), SDE), SDE)
    found = changed(before, all_tensors(policy))
    if make is full:
        trained = {f"transformer.{name}" for name, _ in policy.transformer.named_parameters()}
        assert found <= trained
        assert len(found) > 0.9 * len(trained)
    else:
        # The last block drops its text tokens: what their queries are makes no difference.
        adapters = {name for name in before if ".current." in name}
        assert found == {name for name in adapters if "blocks.1.attn.add_q_proj" not in name}
        assert (len(adapters), len(found)) == (2 * (8 + 7), 2 * (8 + 6))


def test_a_policy_that_has_learnt_goes_on_from_its_folder(load: Load, tmp_path: Path) -> None:
    """It draws as the one that was saved, and the next update of the two is the same to the bit."""
    policy, start = load(), all_tensors(load())
    update(policy, full(policy), rollout_of(policy, prompts_for(policy, 1), SDE), SDE)
    saved = all_tensors(policy)
    assert len(changed(start, saved)) > 10
    loaded = check_saving(policy, tmp_path / "saved", num_sources=1)
    assert changed(saved, all_tensors(loaded)) == set()
    for each in (policy, loaded):
        update(each, full(each), rollout_of(each, prompts_for(each, 1), SDE), SDE)
    assert changed(all_tensors(policy), all_tensors(loaded)) == set()
    assert len(changed(saved, all_tensors(loaded))) > 10


def test_adapters_load_into_a_plain_sd3_pipeline(load: Load, tmp_path: Path) -> None:
    policy = load()
    weights = lora(policy)
    update(policy, weights, rollout_of(policy, prompts_for(policy), SDE), SDE)
    ours = draw(policy, prompts_for(policy), ODE(2, 3.0, shift=None))
    condition = policy.encode(prompts_for(policy))
    assert condition.negative is not None
    weights.save_lora(tmp_path)
    pipeline = plain_pipeline(load())
    arguments: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}
    for name, tensors in (("", condition.tensors), ("negative_", condition.negative.tensors)):
        arguments |= {
            f"{name}prompt_embeds": tensors["prompt_embeds"],
            f"{name}pooled_prompt_embeds": tensors["pooled"],
        }

    def drawn() -> Tensor:
        latents: Tensor = pipeline(latents=first_noise(policy, 2), output_type="latent", **arguments).images
        return latents

    assert not torch.allclose(drawn(), ours, atol=1e-2)
    pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(drawn(), ours, atol=1e-5)
