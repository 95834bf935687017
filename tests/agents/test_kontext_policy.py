"""UniPic2's Kontext conditioning on SD3's own weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from agents.policies.scenes import ScenesPolicy
from agents.policies.unipic2 import edit_size, kontext_forward
from rewards.base import Prompt


@pytest.fixture
def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ).eval()


def _inputs(batch: int = 3, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "prompt_embeds": torch.randn(batch, 5, 12, generator=generator),
        "pooled": torch.randn(batch, 10, generator=generator),
    }


@pytest.mark.parametrize("size", [8, 12])
def test_without_a_reference_it_is_sd3s_own_forward(sd3: SD3Transformer2DModel, size: int) -> None:
    inputs = _inputs(size=size)
    with torch.no_grad():
        ours = kontext_forward(sd3, **inputs)
        theirs = sd3(
            hidden_states=inputs["latents"],
            encoder_hidden_states=inputs["prompt_embeds"],
            pooled_projections=inputs["pooled"],
            timestep=inputs["timestep"],
        ).sample
    assert torch.equal(ours, theirs)


def test_a_reference_adds_tokens_that_are_attended_to_and_dropped(sd3: SD3Transformer2DModel) -> None:
    inputs = _inputs()
    reference = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    lengths: list[int] = []
    sd3.transformer_blocks[0].register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        alone = kontext_forward(sd3, **inputs)
        edited = kontext_forward(sd3, **inputs, reference_latents=reference)
        other = kontext_forward(sd3, **inputs, reference_latents=reference + 1)
    assert lengths == [16, 32, 32]
    assert alone.shape == edited.shape == inputs["latents"].shape
    assert not torch.allclose(alone, edited)
    assert not torch.allclose(edited, other)


def test_reference_comes_first_and_shares_the_targets_positions(sd3: SD3Transformer2DModel) -> None:
    inputs = _inputs()
    seen: list[torch.Tensor] = []
    sd3.transformer_blocks[0].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    reference = inputs["latents"] * 2
    with torch.no_grad():
        kontext_forward(sd3, **inputs, reference_latents=reference)
        assert torch.equal(seen[0][:, :16], sd3.pos_embed(reference))
        assert torch.equal(seen[0][:, 16:], sd3.pos_embed(inputs["latents"]))


def test_one_reference_of_several_is_the_released_pass(sd3: SD3Transformer2DModel) -> None:
    inputs = _inputs()
    reference = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        one = kontext_forward(sd3, **inputs, reference_latents=reference)
        assert torch.equal(kontext_forward(sd3, **inputs, reference_latents=[reference]), one)
        assert torch.equal(kontext_forward(sd3, **inputs, reference_latents=[]), kontext_forward(sd3, **inputs))


def test_several_references_stand_before_the_target_in_their_order(sd3: SD3Transformer2DModel) -> None:
    inputs = _inputs()
    seen: list[torch.Tensor] = []
    sd3.transformer_blocks[0].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    references = [torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    with torch.no_grad():
        both = kontext_forward(sd3, **inputs, reference_latents=references)
        tokens = [sd3.pos_embed(image) for image in (*references, inputs["latents"])]
        assert torch.equal(seen[0], torch.cat(tokens, dim=1))
        # Positions are added to the tokens and attention sees a set: the references' order is no information.
        swapped = kontext_forward(sd3, **inputs, reference_latents=references[::-1])
        first = kontext_forward(sd3, **inputs, reference_latents=references[:1])
    assert torch.allclose(both, swapped, atol=1e-5)
    assert not torch.allclose(both, first, atol=1e-3)


@pytest.mark.parametrize("num_references", [0, 2])
def test_checkpointing_changes_no_gradient(sd3: SD3Transformer2DModel, num_references: int) -> None:
    inputs = _inputs()
    references = [inputs["latents"] * (2 + i) for i in range(num_references)]
    runs: list[int] = []
    sd3.transformer_blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients() -> list[torch.Tensor]:
        kontext_forward(sd3, **inputs, reference_latents=references).square().sum().backward()
        found = [parameter.grad for parameter in sd3.parameters() if parameter.grad is not None]
        sd3.zero_grad(set_to_none=True)
        return [gradient.clone() for gradient in found]

    plain = gradients()
    assert len(runs) == 1
    sd3.enable_gradient_checkpointing()
    recomputed = gradients()
    assert len(runs) == 3
    assert len(plain) == len(recomputed) > 0
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize(
    ("source_size", "options", "expected"),
    [
        ((1024, 1024), {}, (512, 512)),
        ((512, 384), {}, (512, 384)),
        ((480, 640), {}, (384, 512)),
        # 1080 * (512 / 1920) = 288 is nine times 32; 1079 gives 287.7.
        ((1080, 1920), {}, (288, 512)),
        ((1079, 1920), {}, (288, 512)),
        # 500 * (512 / 800) = 320; 470 gives 300.8, nearer to 288 (12.8 off) than to 320.
        ((800, 500), {}, (512, 320)),
        ((800, 470), {}, (512, 288)),
        ((100, 75), {"longer_edge": 1024}, (1024, 768)),
        ((30, 1000), {}, (32, 512)),
        ((48, 36), {"longer_edge": 64, "factor": 16}, (64, 48)),
    ],
)
def test_sources_are_sized_as_in_the_released_scripts(
    source_size: tuple[int, int], options: dict[str, int], expected: tuple[int, int]
) -> None:
    assert edit_size(source_size, **options) == expected


def test_reference_of_another_size_is_refused(sd3: SD3Transformer2DModel) -> None:
    with pytest.raises(ValueError, match=r"expected the target's shape \(3, 4, 8, 8\), got \(3, 4, 4, 4\)"):
        kontext_forward(sd3, **_inputs(), reference_latents=torch.zeros(3, 4, 4, 4))


def test_no_parameter_is_added(tiny_policy: ScenesPolicy) -> None:
    plain = SD3Transformer2DModel.from_config(tiny_policy.transformer.config)
    assert plain.state_dict().keys() == tiny_policy.transformer.state_dict().keys()


def test_save_and_load_give_the_same_velocity(tiny_policy: ScenesPolicy, tmp_path: Path) -> None:
    tiny_policy.save(tmp_path / "policy")
    loaded = ScenesPolicy.load(tmp_path / "policy")
    image = np.full((48, 48, 3), 7, np.uint8)
    for prompt in (Prompt("a red circle"), Prompt("make the circle blue", (image,))):
        x, sigma = torch.randn(1, *tiny_policy.latent_shape), torch.tensor(0.3)
        with torch.no_grad():
            before = tiny_policy.velocity(x, sigma, tiny_policy.encode([prompt]), 2.0)
            after = loaded.velocity(x, sigma, loaded.encode([prompt]), 2.0)
        assert torch.equal(before, after)


def test_foreign_folder_is_named(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    with pytest.raises(ValueError, match=r"expected a policy folder with config.json and model.safetensors"):
        ScenesPolicy.load(tmp_path)


def test_prompt_embedding_does_not_depend_on_the_batch(tiny_policy: ScenesPolicy) -> None:
    alone = tiny_policy.encode([Prompt("a red circle")]).tensors["prompt_embeds"]
    among = tiny_policy.encode([Prompt("a red circle"), Prompt("two squares and the blue circle")])
    assert torch.allclose(alone[0], among.tensors["prompt_embeds"][0], atol=1e-6)


def test_guidance_is_the_stated_combination(tiny_policy: ScenesPolicy) -> None:
    condition = tiny_policy.encode([Prompt("a red circle"), Prompt("two squares")])
    assert condition.negative is not None
    x, sigma = torch.randn(2, *tiny_policy.latent_shape), torch.full((2,), 0.4)
    with torch.no_grad():
        guided = tiny_policy.velocity(x, sigma, condition, 3.0)
        positive = tiny_policy.conditional_velocity(x, sigma, condition)
        negative = tiny_policy.conditional_velocity(x, sigma, condition.negative)
    assert torch.allclose(guided, negative + 3 * (positive - negative), atol=1e-5)


def test_mixed_tasks_and_wrong_sizes_are_refused(tiny_policy: ScenesPolicy) -> None:
    image = np.zeros((48, 48, 3), np.uint8)
    with pytest.raises(ValueError, match="encode the two tasks apart"):
        tiny_policy.encode([Prompt("a"), Prompt("a", (image,))])
    with pytest.raises(ValueError, match=r"expected shape \(48, 48, 3\)"):
        tiny_policy.encode([Prompt("a", (image[:40],))])


def test_codec_reconstructs_what_it_was_fitted_on() -> None:
    from agents.policies.scenes_parts import PatchCodec
    from envs.scenes.pretraining import supervised_batch

    images = torch.from_numpy(supervised_batch("t2i", np.random.default_rng(0), 400).targets)
    codec = PatchCodec(8, 192)
    codec.fit(images)
    assert (codec.decode(codec.encode(images)).int() - images.int()).abs().max() <= 1
    small = PatchCodec(8, 48)
    small.fit(images)
    error = (small.decode(small.encode(images)).float() - images.float()).square().mean().sqrt()
    assert error < 12
    assert abs(float(small.encode(images).square().mean()) - 1) < 0.1
