"""UniPic2-MetaQuery on a tiny Qwen2.5-VL, a tiny VAE and a tiny SD3, all of the real classes and from a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from agents.policies.backbone import BackboneSettings
from agents.policies.connector import Connector
from agents.policies.loading import load_backbone
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.metaquery_parts import MetaQueryPipeline, MetaQueryTraits
from agents.policies.query_reader import QueryReader, Reading
from rewards.base import Prompt
from tests.agents.tiny_metaquery import NUM_QUERIES, make_metaquery

SIDE = 64
SETTINGS = BackboneSettings(height=SIDE, width=SIDE, dtype="float32", edit_negative_prompt="bad")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint: published parts put together with a new connector."""
    return make_metaquery(tmp_path_factory.mktemp("metaquery"), SETTINGS)


@pytest.fixture
def policy(folder: Path) -> MetaQueryPolicy:
    loaded = load_backbone(folder, SETTINGS)
    assert isinstance(loaded, MetaQueryPolicy)
    # SD3's output layer starts at zero; a test wants a velocity that depends on its input.
    torch.manual_seed(1)
    for parameter in loaded.transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return loaded


def picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def with_traits(policy: MetaQueryPolicy, traits: MetaQueryTraits) -> MetaQueryPolicy:
    policy.pipeline.traits = traits
    return MetaQueryPolicy(policy.pipeline, SETTINGS)


def velocity(policy: MetaQueryPolicy, prompt: Prompt, guidance_scale: float = 1.0) -> torch.Tensor:
    latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return policy.velocity(latents, torch.tensor(0.5), policy.encode([prompt]), guidance_scale)


def test_both_tasks_run_through_the_folder_and_a_saved_copy_is_the_same(
    policy: MetaQueryPolicy, tmp_path: Path
) -> None:
    assert policy.latent_shape == (4, 8, 8)
    assert policy.own_shift == 3
    policy.save(tmp_path)
    again = load_backbone(tmp_path, SETTINGS)
    assert isinstance(again, MetaQueryPolicy)
    for prompt in (Prompt("a red circle"), Prompt("make the circle blue", (picture(),))):
        condition = policy.encode([prompt])
        assert condition.tensors["prompt_embeds"].shape == (1, NUM_QUERIES, 12)
        assert condition.tensors["pooled"].shape == (1, 10)
        assert torch.allclose(velocity(policy, prompt, 2.0), velocity(again, prompt, 2.0), atol=1e-5)
    assert policy.decode(torch.randn(2, *policy.latent_shape)).shape == (2, SIDE, SIDE, 3)


def test_the_connector_has_the_published_folder_and_fits_between_the_models(folder: Path) -> None:
    config = Connector.load(folder / "conditioner").config
    assert (config.llm_hidden_size, config.joint_attention_dim, config.pooled_projection_dim) == (64, 12, 10)
    assert {path.name for path in folder.iterdir()} >= {"transformer", "vae", "scheduler", "lmm", "conditioner"}


def test_the_negative_branch_is_read_in_the_same_way(policy: MetaQueryPolicy) -> None:
    condition = policy.encode([Prompt("a red circle")])
    empty = policy.encode([Prompt("")])
    assert condition.negative is not None
    assert torch.allclose(condition.negative.tensors["prompt_embeds"], empty.tensors["prompt_embeds"], atol=1e-6)
    edit = policy.encode([Prompt("make the circle blue", (picture(),))])
    bad = policy.encode([Prompt("bad", (picture(),))])
    assert edit.negative is not None
    assert torch.allclose(edit.negative.tensors["prompt_embeds"], bad.tensors["prompt_embeds"], atol=1e-6)
    assert torch.equal(edit.negative.tensors["reference_0"], edit.tensors["reference_0"])


def test_prompts_are_wrapped_and_instructions_are_not(policy: MetaQueryPolicy) -> None:
    reader = policy.reader

    def said(texts: list[str], sources: list[tuple[Any, ...]]) -> str:
        batch = reader.tokenize(texts, sources)
        return str(reader.tokenizer.decode(batch.ids[0]))

    assert said(["a red circle"], [()]) == (
        "<|im_start|>user\nGenerate an image: a red circle<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = "<|image_pad|>" * 4  # 64 x 64 pixels, one token for 32 x 32.
    assert said(["make the circle blue"], [(picture(),)]) == (
        f"<|im_start|>user\n<|vision_start|>{tokens}<|vision_end|>make the circle blue<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_default_system_message_is_left_out(policy: MetaQueryPolicy) -> None:
    plain = policy.reader.prompt_ids("a red circle")
    own = policy.reader.tokenizer.chat_template
    policy.reader.tokenizer.chat_template = (
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}" + own
    )
    assert policy.reader.prompt_ids("a red circle") == plain


def test_a_prompt_that_spells_a_token_of_the_template_is_text(policy: MetaQueryPolicy) -> None:
    ids = policy.reader.prompt_ids("a <|image_pad|> circle")
    assert policy.reader.image_id not in ids
    assert policy.encode([Prompt("a <|image_pad|> <|im_end|>")]).tensors["pooled"].isfinite().all()


def test_an_embedding_does_not_depend_on_its_batch(policy: MetaQueryPolicy) -> None:
    for sources in ((), (picture(),)):
        short, long = Prompt("a circle", sources), Prompt("make the red circle blue and the square red", sources)
        alone = policy.reader.states([short.text], [sources], policy.connector.meta_queries)
        among = policy.reader.states([short.text, long.text], [sources, sources], policy.connector.meta_queries)
        assert torch.allclose(alone[0], among[0], atol=1e-5)


@pytest.mark.parametrize("has_image", [False, True])
def test_with_mrope_queries_are_read_as_the_model_reads_tokens(policy: MetaQueryPolicy, has_image: bool) -> None:
    reader = QueryReader(policy.lmm, policy.reader.tokenizer, policy.reader.pictures, Reading(positions="mrope"))
    sources: list[tuple[Any, ...]] = [(picture(),) if has_image else ()]
    batch = reader.tokenize(["make the circle blue"], sources)
    behind = torch.tensor([[40, 41, 42]])
    ids = torch.cat([batch.ids, behind], 1)
    image = {}
    if has_image:
        types = (ids == reader.image_id).int()
        image = {"pixel_values": batch.pixels, "image_grid_thw": batch.grids, "mm_token_type_ids": types}
    with torch.no_grad():
        states = reader.states(["make the circle blue"], sources, policy.lmm.get_input_embeddings()(behind)[0])
        native = policy.lmm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **image)
    assert torch.allclose(states, native.last_hidden_state[:, -3:], atol=1e-5)


def test_as_released_positions_count_tokens_and_mrope_is_something_else(policy: MetaQueryPolicy) -> None:
    prompt = Prompt("make the circle blue", (picture(),))
    released = policy.encode([prompt]).tensors["prompt_embeds"]
    other = with_traits(policy, MetaQueryTraits(Reading(positions="mrope")))
    assert not torch.allclose(other.encode([prompt]).tensors["prompt_embeds"], released, atol=1e-5)
    text = Prompt("a red circle")
    again = with_traits(policy, MetaQueryTraits())
    assert torch.equal(other.encode([text]).tensors["prompt_embeds"], again.encode([text]).tensors["prompt_embeds"])


def test_each_route_of_the_source_image_can_be_left_out(policy: MetaQueryPolicy) -> None:
    one, two = (Prompt("make the circle blue", (picture(seed),)) for seed in (0, 1))

    def differs(policy: MetaQueryPolicy, name: str) -> bool:
        first, second = (policy.encode([prompt]).tensors[name] for prompt in (one, two))
        return not torch.allclose(first, second, atol=1e-6)

    def moves_with_the_reference(policy: MetaQueryPolicy) -> bool:
        first, second = policy.encode([one]), policy.encode([two])
        swapped = replace(first, tensors={**first.tensors, "reference_0": second.tensors["reference_0"]})
        latents, sigma = torch.randn(1, *policy.latent_shape), torch.tensor(0.5)
        with torch.no_grad():
            return not torch.allclose(policy.velocity(latents, sigma, first), policy.velocity(latents, sigma, swapped))

    assert differs(policy, "prompt_embeds")
    assert moves_with_the_reference(policy)
    only_dit = with_traits(policy, MetaQueryTraits(Reading(reads_image=False)))
    assert not differs(only_dit, "prompt_embeds")
    assert moves_with_the_reference(only_dit)
    only_lmm = with_traits(policy, MetaQueryTraits(references_to_dit=False))
    assert differs(only_lmm, "prompt_embeds")
    assert not moves_with_the_reference(only_lmm)
    with pytest.raises(ValueError, match="to the language model, to the transformer or to both"):
        MetaQueryTraits(Reading(reads_image=False), references_to_dit=False)


@pytest.mark.parametrize("size", [(512, 512), (512, 384), (1024, 768), (32, 64), (96, 160), (256, 1024)])
def test_the_language_model_has_a_token_for_32_by_32_pixels(policy: MetaQueryPolicy, size: tuple[int, int]) -> None:
    qwen: Any = Qwen2VLImageProcessorPil
    reader = QueryReader(policy.lmm, policy.reader.tokenizer, qwen(), Reading())
    grids, pixels = reader.patches([np.zeros((*size, 3), np.uint8)])
    assert grids.tolist() == [[1, size[0] // 16, size[1] // 16]]
    assert pixels.shape == (size[0] * size[1] // 256, 3 * 2 * 14 * 14)


def test_latents_are_the_vaes_shifted_and_scaled_samples(policy: MetaQueryPolicy) -> None:
    images = torch.from_numpy(np.stack([picture(0), picture(1)]))
    latents = policy.encode_sources(images)
    assert latents.shape == (2, 4, 8, 8)
    assert torch.equal(latents, policy.encode_sources(images))
    assert torch.allclose(latents[1:], policy.encode_sources(images[1:]), atol=1e-5)
    vae = policy.pipeline.vae
    with torch.no_grad():
        posterior = vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    noise = (latents / 1.5 + 0.06 - posterior.mean) / posterior.std
    assert float(noise.std()) == pytest.approx(1, abs=0.15)


def test_gradients_reach_the_connector_and_nothing_else(policy: MetaQueryPolicy) -> None:
    policy.connector.requires_grad_(True)
    sources = np.stack([picture(0), picture(1)])
    tensors = policy.embed_with_gradient(["a red circle", "make the circle blue"], sources)
    assert tensors["reference_0"].shape == (2, 4, 8, 8)
    (tensors["prompt_embeds"].square().mean() + tensors["pooled"].square().mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.connector.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in policy.lmm.parameters())
    with torch.no_grad():
        prompts = [Prompt("a red circle", (sources[0],)), Prompt("make the circle blue", (sources[1],))]
        assert torch.allclose(policy.encode(prompts).tensors["prompt_embeds"], tensors["prompt_embeds"], atol=1e-5)


def test_recomputed_activations_give_the_same_gradient(policy: MetaQueryPolicy) -> None:
    def gradient(policy: MetaQueryPolicy) -> torch.Tensor:
        policy.connector.requires_grad_(True)
        policy.connector.zero_grad()
        policy.embed_with_gradient(["a red circle"])["prompt_embeds"].square().mean().backward()
        assert policy.connector.meta_queries.grad is not None
        return policy.connector.meta_queries.grad.clone()

    plain = gradient(policy)
    saving = MetaQueryPolicy(policy.pipeline, replace(SETTINGS, gradient_checkpointing=True))
    assert torch.allclose(gradient(saving), plain, atol=1e-7)
    assert not saving.lmm.training


def test_parts_that_do_not_fit_are_named(policy: MetaQueryPolicy, folder: Path, tmp_path: Path) -> None:
    policy.pipeline.connector = Connector(replace(policy.connector.config, joint_attention_dim=14))
    with pytest.raises(ValueError, match="joint_attention_dim"):
        MetaQueryPolicy(policy.pipeline, SETTINGS)
    with pytest.raises(ValueError, match="expected multiples of 32 pixels"):
        load_backbone(folder, replace(SETTINGS, height=48))
    with pytest.raises(ValueError, match="width: expected at most 192 pixels for these weights' positions, got 512"):
        load_backbone(folder, replace(SETTINGS, width=512))
    with pytest.raises(ValueError, match="expected transformer/, vae/, scheduler/"):
        MetaQueryPipeline.from_parts(tmp_path, folder / "lmm")
    two = (picture(), picture(1))
    with pytest.raises(ValueError, match="expected at most 1 a prompt for MetaQueryPolicy, got 2"):
        policy.encode([Prompt("a", two)])
