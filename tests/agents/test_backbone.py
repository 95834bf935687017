"""What all policies on published pipelines share: embeddings asked for once, visits of encoders, memory settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.policies.backbone import BackboneSettings
from agents.policies.embeddings import EmbeddingCache, content_hash, stack_rows
from agents.policies.sd3 import SD3Policy
from agents.policies.tiny.sd3 import make_tiny_sd3
from agents.policies.weights import LoraSettings, LoraWeights
from agents.samplers import ODE, FlowSDE
from rewards.base import Prompt
from tests.agents.backbone_checks import all_tensors, draw, picture, prompts_for, rollout_of, update

SETTINGS: dict[str, Any] = {"height": 64, "width": 64, "dtype": "float32", "max_sequence_length": 16}
SDE = FlowSDE(num_inference_steps=3, guidance_scale=2.0, shift=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd3(tmp_path_factory.mktemp("sd3") / "tiny")


@pytest.fixture
def load(folder: Path) -> Callable[..., SD3Policy]:
    return lambda **changes: SD3Policy.load(folder, BackboneSettings(**{**SETTINGS, **changes}))


# Embeddings


def texts_asked_for(policy: SD3Policy) -> list[int]:
    """Batch sizes of the calls of the first encoder, from now on."""
    sizes: list[int] = []
    policy.text_encoders[0].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    return sizes


def test_an_encoder_is_asked_once_for_each_text(load: Callable[..., SD3Policy]) -> None:
    policy = load(edit_negative_prompt="noise")
    asked = texts_asked_for(policy)
    prompts = [Prompt("a"), Prompt("b"), Prompt("a")]
    policy.prepare(prompts)
    assert asked == [1, 1, 1]
    policy.encode(prompts)
    policy.encode(prompts[:1])
    assert len(asked) == 3
    # The same words with a picture have another negative, and an embedding of their own; the pictures share it.
    edits = [Prompt("a", (picture((64, 64), seed),)) for seed in (0, 1)]
    policy.encode(edits)
    assert len(asked) == 5
    policy.encode([*edits, Prompt("c", (picture((64, 64), 2),))])
    assert len(asked) == 6


def test_what_is_prepared_is_kept_until_it_is_asked_for(load: Callable[..., SD3Policy]) -> None:
    """Both tasks' embeddings share the room: the second task's would push out the first one's."""
    policy = load(cached_prompts=3, edit_negative_prompt="noise")
    asked = texts_asked_for(policy)
    prompts = [Prompt("a"), Prompt("b"), Prompt("a", (picture((64, 64)),))]
    policy.prepare(prompts)
    assert len(asked) == 3
    policy.encode(prompts[:2])
    assert len(asked) == 3


def test_an_embedding_does_not_depend_on_what_it_is_asked_for_with(load: Callable[..., SD3Policy]) -> None:
    together = load().encode(prompts_for(load()))
    alone = load().encode(prompts_for(load())[1:])
    for name, tensor in together.tensors.items():
        assert torch.equal(tensor[1], alone.tensors[name][0])


def test_negative_prompts_are_the_tasks(load: Callable[..., SD3Policy]) -> None:
    policy = load(negative_prompt="blurry", edit_negative_prompt="noise")
    for num_sources, text in ((0, "blurry"), (1, "noise")):
        condition = policy.encode(prompts_for(policy, num_sources))
        assert condition.negative is not None
        expected = policy.encode([Prompt(text)]).tensors["prompt_embeds"]
        assert torch.equal(condition.negative.tensors["prompt_embeds"], expected.expand(2, -1, -1))
        assert ("reference_0" in condition.negative.tensors) == (num_sources == 1)
    assert torch.equal(condition.negative.tensors["reference_0"], condition.tensors["reference_0"])


def test_the_cache_forgets_what_was_asked_for_the_longest_ago() -> None:
    cache, computed = EmbeddingCache(2), []

    def rows(*keys: str) -> list[float]:
        def compute(missing: list[int]) -> list[dict[str, torch.Tensor]]:
            computed.extend(keys[i] for i in missing)
            return [{"x": torch.tensor(float(ord(keys[i])))} for i in missing]

        return [float(row["x"]) for row in cache.rows(keys, compute)]

    assert rows("a", "b", "a") == [97, 98, 97]
    assert rows("a", "c") == [97, 99]
    assert rows("b") == [98]
    assert computed == ["a", "b", "c", "b"]
    assert rows("d", "e", "f") == [100, 101, 102]
    assert len(cache) == 2


def test_rows_of_different_lengths_are_padded_with_zeros() -> None:
    stacked = stack_rows([{"x": torch.ones(2, 3)}, {"x": torch.ones(4, 3)}])["x"]
    assert stacked.shape == (2, 4, 3)
    assert (stacked.sum((1, 2)) == torch.tensor([6.0, 12.0])).all()


def test_pictures_are_known_by_shape_and_pixels() -> None:
    flat = np.arange(48, dtype=np.uint8)
    assert content_hash(flat.reshape(4, 4, 3)) == content_hash(flat.reshape(4, 4, 3).copy(order="F"))
    assert len({content_hash(flat.reshape(shape)) for shape in ((4, 4, 3), (2, 8, 3), (8, 2, 3))}) == 3
    assert content_hash(flat.reshape(4, 4, 3)) != content_hash(flat[::-1].reshape(4, 4, 3))


# Where the encoders are


def noted_moves(policy: SD3Policy, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices that the first encoder is sent to, from now on."""
    encoder: Any = policy.text_encoders[0]
    moves: list[str] = []
    move = encoder.to

    def noting(device: Any) -> Any:
        moves.append(str(device))
        return move("cpu")

    monkeypatch.setattr(encoder, "to", noting)
    return moves


@pytest.mark.parametrize("offload", [True, False])
def test_encoders_visit_the_device_once_a_rollout(
    load: Callable[..., SD3Policy], monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    policy = load(offload_encoders=offload)
    moves = noted_moves(policy, monkeypatch)
    policy.to("cpu")
    # Encoders that are offloaded stay where they are.
    assert len(moves) == (0 if offload else 1)
    prompts = prompts_for(policy)
    policy.prepare(prompts)
    # There and back; or there, where they are already.
    assert len(moves) == 2
    policy.encode(prompts)
    assert len(moves) == 2


def test_encoders_go_home_after_an_error(load: Callable[..., SD3Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    moves = noted_moves(policy, monkeypatch)
    monkeypatch.setattr(policy.pipeline, "tokenizer", None)
    with pytest.raises(TypeError):
        policy.encode(prompts_for(policy))
    assert moves == ["cpu", "cpu"]


# Memory and speed: the same results by other means


def losses_and_gradients(policy: SD3Policy) -> tuple[float, list[torch.Tensor]]:
    weights = LoraWeights(policy, LoraSettings(4, 8), ("reference",), seed=1)
    for parameter in weights.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    prompts = prompts_for(policy, 1)
    x, sigma = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3)), torch.tensor(0.5)
    loss = policy.velocity(x, sigma, policy.encode(prompts), 2.0).square().mean()
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in weights.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_nothing(load: Callable[..., SD3Policy], dtype: str) -> None:
    plain, gradients = losses_and_gradients(load(dtype=dtype))
    checkpointed, others = losses_and_gradients(load(dtype=dtype, gradient_checkpointing=True))
    assert plain == checkpointed
    assert len(gradients) == len(others) == 2 * (8 + 7)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


def test_the_ratio_is_one_with_gradient_checkpointing(load: Callable[..., SD3Policy]) -> None:
    policy = load(gradient_checkpointing=True)
    weights = LoraWeights(policy, LoraSettings(4, 8), ("reference",))
    metrics = update(policy, weights, rollout_of(policy, prompts_for(policy), SDE), SDE)
    assert metrics["ratio_error"] == 0


def test_compiled_blocks_give_the_same(load: Callable[..., SD3Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs, forward and backward, without the code generation, which takes a minute."""
    graphs: list[int] = []

    def noted(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(module.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=noted))
    plain, gradients = losses_and_gradients(load())
    compiled, others = losses_and_gradients(load(compile=True))
    # The two blocks differ: in the first text goes on, and there is a second attention.
    assert len(graphs) == 2
    # Block kinds x gradients x versions x tasks are more than dynamo's own limit, at which it gives up silently.
    assert torch._dynamo.config.recompile_limit >= 3 * 2 * 4 * 2
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(gradients, others, strict=True))


def test_slices_of_the_vae_are_decoded_alike(load: Callable[..., SD3Policy]) -> None:
    sliced, whole = load(slice_vae=True), load(slice_vae=False)
    latents = torch.randn(3, *sliced.latent_shape, generator=torch.Generator().manual_seed(0))
    batches: dict[str, list[int]] = {"sliced": [], "whole": []}
    for name, policy in (("sliced", sliced), ("whole", whole)):
        policy.pipeline.vae.decoder.register_forward_hook(
            lambda _, inputs, __, name=name: batches[name].append(len(inputs[0]))
        )
    assert (sliced.decode(latents).int() - whole.decode(latents).int()).abs().max() <= 1
    assert batches == {"sliced": [1, 1, 1], "whole": [3]}


def test_offloading_and_the_cache_change_no_image(load: Callable[..., SD3Policy]) -> None:
    prompts, sampler = prompts_for(load(), 1), ODE(2, 2.0, shift=None)
    plain = draw(load(), prompts, sampler)
    assert torch.equal(draw(load(offload_encoders=False, cached_prompts=0), prompts, sampler), plain)


def test_nothing_but_the_transformer_may_learn(load: Callable[..., SD3Policy]) -> None:
    policy = load()
    assert not any(p.requires_grad for module in policy.text_encoders for p in module.parameters())
    assert not any(p.requires_grad for p in policy.pipeline.vae.parameters())
    assert not any(module.training for module in (policy.transformer, policy.pipeline.vae, *policy.text_encoders))
    assert all(tensor.dtype == torch.float32 for name, tensor in all_tensors(policy).items() if "ids" not in name)


def test_a_policy_may_be_sized_anew(load: Callable[..., SD3Policy]) -> None:
    policy = load()
    policy.resize(96, 128)
    assert (policy.image_size, policy.latent_shape) == ((96, 128), (16, 12, 16))
    assert torch.equal(
        draw(policy, prompts_for(policy), ODE(2, shift=None)),
        draw(load(height=96, width=128), prompts_for(policy), ODE(2, shift=None)),
    )
    with pytest.raises(ValueError, match="width: expected a multiple of 16 pixels"):
        policy.resize(96, 100)
    assert policy.image_size == (96, 128)
