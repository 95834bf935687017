"""SD3 and UniPic2's Kontext on whole tiny pipelines of the published classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from agents.policies.backbone import BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.sd3 import SD3Policy, sd35_medium_config
from agents.policies.tiny.sd3 import make_tiny_sd3
from agents.policies.weights import FullWeights, LoraSettings, LoraWeights, PolicyWeights
from agents.samplers import ODE, FlowSDE
from rewards.base import Prompt
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
    picture,
    prompts_for,
    rollout_of,
    update,
)

TINY: dict[str, Any] = {"height": 64, "width": 64, "dtype": "float32", "max_sequence_length": 16}
SDE = FlowSDE(num_inference_steps=3, shift=None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd3(tmp_path_factory.mktemp("sd3") / "tiny")


@pytest.fixture
def load(folder: Path) -> Callable[..., SD3Policy]:
    def loaded(**changes: Any) -> SD3Policy:
        return SD3Policy.load(folder, BackboneSettings(**{**TINY, **changes}))

    return loaded


def full(policy: SD3Policy) -> PolicyWeights:
    return FullWeights(policy, ("reference",))


def lora(policy: SD3Policy) -> PolicyWeights:
    return LoraWeights(policy, LoraSettings(4, 8), ("reference",), seed=1)


# The published pipelines' sampling


@pytest.mark.parametrize(
    ("size", "guidance_scale", "max_sequence_length"),
    [((64, 64), 1.0, 16), ((96, 64), 4.5, 16), ((64, 128), 4.5, 0)],
)
def test_sampling_is_the_pipelines(
    folder: Path,
    load: Callable[..., SD3Policy],
    size: tuple[int, int],
    guidance_scale: float,
    max_sequence_length: int,
) -> None:
    height, width = size
    policy = load(height=height, width=width, max_sequence_length=max_sequence_length, negative_prompt="noise")
    ours = draw(policy, prompts_for(policy), ODE(4, guidance_scale, shift=None))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"max_sequence_length": max_sequence_length} if max_sequence_length else {}
    arguments |= {"num_inference_steps": 4, "guidance_scale": guidance_scale, "height": height, "width": width}
    arguments |= {"prompt": list(TEXTS), "negative_prompt": ["noise"] * 2, "latents": first_noise(policy, 2)}
    theirs = pipeline(**arguments, output_type="latent").images
    assert torch.allclose(ours, theirs, atol=1e-5)
    images = pipeline(**arguments, output_type="np").images
    decoded = policy.decode(ours).numpy()
    assert decoded.shape == (2, height, width, 3)
    assert decoded.std() > 5
    assert np.abs(decoded - images * 255).max() <= 0.5 + 1e-2


@pytest.mark.parametrize("num_sources", [1, 2])
def test_editing_is_the_released_loop_written_out(load: Callable[..., SD3Policy], num_sources: int) -> None:
    """References drawn by the VAE's own sampler, blocks called by hand, steps by the scheduler."""
    policy = load(height=64, width=96, edit_negative_prompt="noise")
    prompts = prompts_for(policy, num_sources)
    ours = draw(policy, prompts, ODE(3, 3.5, shift=None))
    pipeline, transformer, vae = policy.pipeline, policy.pipeline.transformer, policy.pipeline.vae
    with torch.no_grad():
        theirs = first_noise(policy, 2)
        references = [
            torch.cat([encoded_by_hand(vae, prompt.source_images[i], 0.0609, 1.5305) for prompt in prompts])
            for i in range(num_sources)
        ]
        states, negative_states, pooled, negative_pooled = pipeline.encode_prompt(
            list(TEXTS), None, None, negative_prompt=["noise"] * 2, max_sequence_length=16, device="cpu"
        )
        pipeline.scheduler.set_timesteps(3)
        for time in pipeline.scheduler.timesteps:
            halves = []
            for text, vector in ((negative_states, negative_pooled), (states, pooled)):
                halves.append(kontext_by_hand(transformer, [*references, theirs], time.expand(2), text, vector))
            velocity = halves[0] + 3.5 * (halves[1] - halves[0])
            theirs = pipeline.scheduler.step(velocity, time, theirs, return_dict=False)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)
    without = draw(policy, [Prompt(prompt.text) for prompt in prompts], ODE(3, 3.5, shift=None))
    assert not torch.allclose(ours, without, atol=1e-2)


def test_a_source_has_one_encoding_whatever_it_is_encoded_with(load: Callable[..., SD3Policy]) -> None:
    policy, other = load(), load(cached_prompts=0)
    prompts = prompts_for(policy, 1)
    both = policy.encode(prompts).tensors["reference_0"]
    alone = [other.encode([prompt]).tensors["reference_0"][0] for prompt in reversed(prompts)]
    assert torch.equal(both, torch.stack(alone[::-1]))
    assert not torch.allclose(both[0], both[1])
    distribution = policy.pipeline.vae.encode(
        torch.from_numpy(prompts[0].source_images[0]).permute(2, 0, 1)[None].float() / 127.5 - 1
    ).latent_dist
    assert not torch.allclose((both[:1] / 1.5305) + 0.0609, distribution.mode(), atol=1e-3)


# Schedules


@pytest.mark.parametrize(("size", "num_tokens"), [((64, 64), 16), ((256, 128), 128)])
def test_a_dynamic_shift_follows_the_number_of_tokens(
    folder: Path, load: Callable[..., SD3Policy], size: tuple[int, int], num_tokens: int
) -> None:
    policy = load(height=size[0], width=size[1])
    assert policy.own_shift == 3
    dynamic = {"shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    policy.pipeline.scheduler = type(policy.pipeline.scheduler).from_config(policy.pipeline.scheduler.config, **dynamic)
    # A line through (256, 0.5) and (4096, 1.15).
    assert np.log(policy.own_shift) == pytest.approx(0.5 + (num_tokens - 256) * 0.65 / 3840)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, scheduler=policy.pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": size[0], "width": size[1], "max_sequence_length": 16, "latents": first_noise(policy, 1)}
    theirs = pipeline("a red circle", num_inference_steps=3, guidance_scale=1.0, output_type="latent", **arguments)
    assert torch.equal(policy.own_sigmas(3), pipeline.scheduler.sigmas)
    assert torch.allclose(draw(policy, prompts_for(policy)[:1], ODE(3, shift=None)), theirs.images, atol=1e-5)


def test_the_static_schedule_by_hand(load: Callable[..., SD3Policy]) -> None:
    sigmas = load().own_sigmas(4)
    # The grid from 1 to the shifted 0.001, 3 / 1.002, in three steps, then shifted: 3 s / (1 + 2 s); 0 at the end.
    low = 0.003 / 1.002
    grid = [1.0, 1 - (1 - low) / 3, 1 - 2 * (1 - low) / 3, low]
    assert sigmas.tolist() == pytest.approx([3 * s / (1 + 2 * s) for s in grid] + [0.0], abs=1e-6)
    assert (sigmas[0], sigmas[-1]) == (1, 0)


# Learning


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("num_sources", [0, 1])
def test_the_ratio_is_one_at_the_rollouts_weights(
    load: Callable[..., SD3Policy], dtype: str, guidance_scale: float, num_sources: int
) -> None:
    sampler = FlowSDE(3, guidance_scale, shift=None)
    for make in (lora, full):
        policy = load(dtype=dtype, float32_weights=make is full)
        check_ratio_is_one(policy, make(policy), prompts_for(policy, num_sources), sampler)


@pytest.mark.parametrize("make", [full, lora])
def test_an_update_changes_only_what_is_trained(load: Callable[..., SD3Policy], make: Any) -> None:
    policy = load()
    weights = make(policy)
    before = all_tensors(policy)
    for num_sources in (0, 1):
        update(policy, weights, rollout_of(policy, prompts_for(policy, num_sources), SDE), SDE)
    found = changed(before, all_tensors(policy))
    if make is full:
        trained = {f"transformer.{name}" for name, _ in policy.transformer.named_parameters()}
        assert "transformer.pos_embed.pos_embed" not in found
        assert found <= trained
        assert len(found) > 0.9 * len(trained)
    else:
        # The first update moves B alone, which starts at zero, the second moves A too. The last block drops its text
        # tokens: it has no layer behind them, and what their queries are makes no difference.
        adapters = {name for name in before if ".current." in name}
        assert found == {name for name in adapters if "blocks.1.attn.add_q_proj" not in name}
        assert (len(adapters), len(found)) == (2 * (8 + 7), 2 * (8 + 6))


def test_full_training_in_bfloat16_is_refused(load: Callable[..., SD3Policy]) -> None:
    with pytest.raises(ValueError, match=r"expected float32 parameters to train in full, got torch\.bfloat16"):
        FullWeights(load(dtype="bfloat16"))


def test_adapters_are_float32_on_any_base(load: Callable[..., SD3Policy]) -> None:
    policy = load(dtype="bfloat16")
    weights = lora(policy)
    assert {parameter.dtype for parameter in weights.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in weights.state().values()} == {torch.float32}
    assert policy.transformer.proj_out.weight.dtype == torch.bfloat16


# Saving


def test_a_policy_that_has_learnt_goes_on_from_its_folder(
    load: Callable[..., SD3Policy], folder: Path, tmp_path: Path
) -> None:
    policy = load()
    update(policy, full(policy), rollout_of(policy, prompts_for(policy, 1), SDE), SDE)
    loaded = check_saving(policy, tmp_path / "saved", num_sources=1)
    untrained = draw(load(), prompts_for(policy), ODE(2, shift=None))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 64, "max_sequence_length": 16, "latents": first_noise(policy, 2)}
    theirs = pipeline(list(TEXTS), num_inference_steps=2, guidance_scale=1.0, output_type="latent", **arguments).images
    ours = draw(loaded, prompts_for(policy), ODE(2, shift=None))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, untrained, atol=1e-2)
    assert pipeline.transformer.state_dict().keys() == load().transformer.state_dict().keys()


def test_float32_weights_are_kept_to_the_bit(load: Callable[..., SD3Policy], tmp_path: Path) -> None:
    policy = load(dtype="bfloat16", float32_weights=True)
    policy.transformer.proj_out.bias.data += 1e-4
    policy.save(tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.settings == policy.settings
    assert (loaded.dtype, loaded.pipeline.vae.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(loaded.transformer.proj_out.bias, policy.transformer.proj_out.bias)
    x = draw(loaded, prompts_for(loaded), ODE(2, 3.0, shift=None))
    assert x.dtype == torch.bfloat16
    assert torch.equal(x, draw(policy, prompts_for(policy), ODE(2, 3.0, shift=None)))


@pytest.mark.parametrize("has_index", [True, False])
def test_unipic2s_own_classes_are_read(
    folder: Path, load: Callable[..., SD3Policy], has_index: bool, tmp_path: Path
) -> None:
    load().save(tmp_path)
    (tmp_path / "pdtr_settings.json").unlink()
    index, config = tmp_path / "model_index.json", tmp_path / "transformer" / "config.json"
    rename(
        index, _class_name="StableDiffusion3KontextPipeline", transformer=["unipicv2", "SD3Transformer2DKontextModel"]
    )
    rename(config, _class_name="SD3Transformer2DKontextModel")
    if not has_index:
        index.unlink()
    policy = load_backbone(tmp_path, BackboneSettings(**TINY))
    prompts, sampler = prompts_for(policy, 1), ODE(2, 3.0, shift=None)
    assert torch.allclose(draw(policy, prompts, sampler), draw(load(), prompts, sampler), atol=1e-6)


def rename(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_third_encoder_may_be_left_out(folder: Path, load: Callable[..., SD3Policy], tmp_path: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    policy = SD3Policy(pipeline, BackboneSettings(**TINY))
    assert len(policy.text_encoders) == 2
    states = policy.encode(prompts_for(policy)).tensors["prompt_embeds"]
    assert states.shape == (2, 77 + 16, 32)
    assert (states[:, 77:] == 0).all()
    check_saving(policy, tmp_path / "saved")


def test_adapters_load_into_the_plain_pipeline(folder: Path, load: Callable[..., SD3Policy], tmp_path: Path) -> None:
    policy = load()
    weights = lora(policy)
    assert isinstance(weights, LoraWeights)
    update(policy, weights, rollout_of(policy, prompts_for(policy), SDE), SDE)
    sampler = ODE(2, 3.0, shift=None)
    ours = draw(policy, prompts_for(policy), sampler)
    weights.save_lora(tmp_path)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    plain = SD3Policy(pipeline, BackboneSettings(**TINY))
    assert torch.allclose(draw(plain, prompts_for(plain), sampler), ours, atol=1e-5)
    pipeline.unload_lora_weights()
    assert not torch.allclose(draw(plain, prompts_for(plain), sampler), ours, atol=1e-2)


# The published size


def test_the_published_configuration_by_count() -> None:
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**sd35_medium_config())
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 2_243_171_520
    assert {name: tuple(buffer.shape) for name, buffer in transformer.named_buffers()} == {
        "pos_embed.pos_embed": (1, 384 * 384, 1536)
    }


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 100}, "height: expected a multiple of 16 pixels for SD3Policy, got 100; 96 would do"),
        ({"max_sequence_length": 600}, "max_sequence_length: expected at most 512 for SD3, got 600"),
        ({"width": 512}, "width: expected at most 256 pixels for these weights' positions, got 512"),
    ],
)
def test_settings_that_cannot_be_run(load: Callable[..., SD3Policy], changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(**changes)


def test_folders_that_are_no_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder in diffusers' layout \(model_index.json\)"):
        load_backbone(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(ValueError, match=r"expected a pipeline of one of StableDiffusion3.*, got DDPMPipeline"):
        load_backbone(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(ValueError, match="expected the folder or hub name of a StableDiffusion3Pipeline, got none"):
        load_backbone(tmp_path)
    (tmp_path / "pdtr_settings.json").write_text('{"height": 64, "colour": "red"}')
    with pytest.raises(ValueError, match=r"pdtr_settings\.json: expected a policy's settings, got others .*colour"):
        load_backbone(tmp_path)


def test_sources_of_other_sizes_and_numbers_are_refused(load: Callable[..., SD3Policy]) -> None:
    policy = load()
    with pytest.raises(ValueError, match=r"source images: expected shape \(64, 64, 3\), got \[\(48, 64, 3\)\]"):
        policy.encode([Prompt("a", (picture((48, 64)),))])
    with pytest.raises(ValueError, match=r"expected as many source images for each, got \[0, 1\] images a prompt"):
        policy.encode([*prompts_for(policy), *prompts_for(policy, 1)])
