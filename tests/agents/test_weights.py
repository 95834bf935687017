"""Versions of a policy's weights: full copies and LoRA adapters keep one contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agents.policies.adapters import Adapters
from agents.policies.scenes import ScenesPolicy
from agents.policies.weights import VERSIONS, FullWeights, LoraSettings, LoraWeights, PolicyWeights
from rewards.base import Prompt

Make = Callable[[ScenesPolicy], PolicyWeights]
MAKERS: list[Make] = [FullWeights, lambda policy: LoraWeights(policy, LoraSettings(4, 8), seed=1)]


def _velocity(policy: ScenesPolicy) -> torch.Tensor:
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return policy.velocity(x, torch.tensor(0.6), policy.encode([Prompt("a red circle"), Prompt("two squares")]))


def _train_a_little(weights: PolicyWeights, policy: ScenesPolicy) -> None:
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-2)
    for _ in range(3):
        x = torch.randn(2, *policy.latent_shape)
        condition = policy.encode([Prompt("a red circle"), Prompt("two squares")])
        policy.velocity(x, torch.tensor(0.6), condition).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=MAKERS, ids=["full", "lora"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def test_every_version_begins_as_the_base(tiny_policy: ScenesPolicy, make: Make) -> None:
    base = _velocity(tiny_policy)
    weights = make(tiny_policy)
    for version in VERSIONS:
        with weights.use(version):
            assert torch.allclose(_velocity(tiny_policy), base, atol=1e-6)


def test_training_changes_the_current_version_only(tiny_policy: ScenesPolicy, make: Make) -> None:
    base = _velocity(tiny_policy)
    weights = make(tiny_policy)
    frozen = {name: t.clone() for name, t in weights.state().items() if not name.startswith("current.")}
    _train_a_little(weights, tiny_policy)
    assert not torch.allclose(_velocity(tiny_policy), base, atol=1e-3)
    for version in ("old", "reference", "ema"):
        with weights.use(version):
            assert torch.allclose(_velocity(tiny_policy), base, atol=1e-6)
    after = weights.state()
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_blend_copies_and_averages(tiny_policy: ScenesPolicy, make: Make) -> None:
    weights = make(tiny_policy)
    before = {name: tensor.clone() for name, tensor in weights.state().items()}
    _train_a_little(weights, tiny_policy)
    weights.blend("ema", 0.75)
    weights.blend("old", 0.0)
    for name, tensor in weights.state().items():
        version, key = name.split(".", 1)
        current = weights.state()[f"current.{key}"]
        if version == "ema" and tensor.is_floating_point():
            assert torch.allclose(tensor, 0.75 * before[name] + 0.25 * current, atol=1e-6)
        if version == "old":
            assert torch.equal(tensor, current)


def test_state_restores_to_the_bit(make: Make) -> None:
    def policy() -> ScenesPolicy:
        from agents.policies.scenes import ScenesPolicyConfig

        return ScenesPolicy(ScenesPolicyConfig(("a", "red", "circle"), latent_channels=8, width=32, num_layers=1), 0)

    first, second = policy(), policy()
    weights, other = make(first), make(second)
    _train_a_little(weights, first)
    weights.blend("ema", 0.5)
    other.load_state({name: tensor.clone() for name, tensor in weights.state().items()})
    for version in VERSIONS:
        with weights.use(version), other.use(version):
            assert torch.equal(_velocity(first), _velocity(second))


def test_only_the_current_version_has_gradients(tiny_policy: ScenesPolicy, make: Make) -> None:
    weights = make(tiny_policy)
    assert weights.parameters()
    assert all(p.requires_grad for p in weights.parameters())
    with weights.use("reference"):
        named = tiny_policy.transformer.named_parameters()
        assert not any(parameter.requires_grad for name, parameter in named if "current" not in name)


def test_unknown_version_is_named(tiny_policy: ScenesPolicy, make: Make) -> None:
    weights = make(tiny_policy)
    with pytest.raises(ValueError, match="got 'best'"), weights.use("best"):  # type: ignore[arg-type]
        pass


def test_lora_trains_few_parameters_and_leaves_the_base_alone(tiny_policy: ScenesPolicy) -> None:
    base = {name: p.clone() for name, p in tiny_policy.transformer.named_parameters()}
    weights = LoraWeights(tiny_policy, LoraSettings(2, 4))
    _train_a_little(weights, tiny_policy)
    assert sum(p.numel() for p in weights.parameters()) < 0.1 * sum(p.numel() for p in base.values())
    named = tiny_policy.transformer.named_parameters()
    kept = {name.replace(".base_layer", ""): p for name, p in named if "lora" not in name}
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.items())


def _switches(model: Any) -> tuple[list[Any], dict[str, bool]]:
    """Which adapter is active, in the network and in each layer, and what has gradients."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    active = [model.active_adapter, *model.active_adapters, *(layer.active_adapters for layer in layers)]
    return active, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _counted_walks(network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Walks over all of the network's modules, from now on."""
    walks: list[str] = []
    for name in ("named_modules", "modules", "named_parameters", "parameters"):
        walk = getattr(torch.nn.Module, name)

        def noted(self: torch.nn.Module, *options: Any, walk: Any = walk, name: str = name, **named: Any) -> Any:
            walks.append(name)
            return walk(self, *options, **named)

        monkeypatch.setattr(torch.nn.Module, name, noted)
    return walks


def test_a_switch_does_what_peft_does_without_its_walk(
    tiny_policy: ScenesPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = LoraWeights(tiny_policy, LoraSettings(2, 4))
    model = weights._adapters._model
    for version in ("reference", "ema", "current", "old"):
        model.set_adapter(version, inference_mode=version != "current")
        expected = _switches(model)
        with weights.use("current"), weights.use("ema"), weights.use(version):
            assert _switches(model) == expected
    walks = _counted_walks(tiny_policy.transformer, monkeypatch)
    with weights.use("reference"), weights.use("old"):
        weights.blend("ema", 0.5)
    assert weights.parameters()
    assert weights.state()
    assert walks == []


def test_a_tensor_that_is_replaced_is_found(tiny_policy: ScenesPolicy) -> None:
    """As a move between devices may do it, or a cut over processes."""
    weights = LoraWeights(tiny_policy, LoraSettings(2, 4))
    old = weights.parameters()
    for module in tiny_policy.transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    assert not any(new is before for new in weights.parameters() for before in old)
    with weights.use("old"):
        assert not any(parameter.requires_grad for parameter in tiny_policy.transformer.parameters())
    assert all(parameter.requires_grad for parameter in weights.parameters())


def test_merged_adapters_are_part_of_the_network_itself(tiny_policy: ScenesPolicy) -> None:
    names = [name for name, _ in tiny_policy.transformer.named_parameters()]
    network, storages = tiny_policy.transformer, {p.data_ptr() for p in tiny_policy.transformer.parameters()}
    weights = LoraWeights(tiny_policy, LoraSettings(4, 8))
    base = _velocity(tiny_policy)
    _train_a_little(weights, tiny_policy)
    weights.blend("ema", 0.5)
    with weights.use("ema"):
        expected = _velocity(tiny_policy)
    weights.merge("ema")
    assert tiny_policy.transformer is network
    assert [name for name, _ in network.named_parameters()] == names
    # Not one tensor is copied: of a big network there may be no room for two.
    assert {parameter.data_ptr() for parameter in network.parameters()} == storages
    assert not torch.allclose(expected, base, atol=1e-3)
    assert torch.allclose(_velocity(tiny_policy), expected, atol=1e-5)
    with pytest.raises(ValueError, match="got 'current' of merged ones"), weights.use("current"):
        pass


class _Layers(torch.nn.Module):
    """Three layers that read the same input, as an attention's queries, keys and values."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 32, dtype=dtype) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((layer(x) for layer in self.layers), torch.zeros(()))


def _adapted(dtype: torch.dtype) -> tuple[_Layers, Adapters]:
    from peft import LoraConfig

    network = _Layers(dtype)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=r".*\.\d")
    torch.manual_seed(1)
    return network, Adapters(network, config, ["current"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_half_precision_network_keep_no_copy_of_what_it_reads(dtype: torch.dtype) -> None:
    network, adapters = _adapted(dtype)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_(True)
    saved: dict[int, torch.Tensor] = {}

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        network(x).float().square().mean().backward()
    assert all(tensor.dtype == torch.float32 for tensor in adapters.tensors("current").values())
    assert all(t.grad is not None and t.grad.any() for t in adapters.tensors("current").values())
    # One input for all layers, and nothing that has a row of it in float32 but the loss itself.
    assert [tensor.data_ptr() for tensor in saved.values() if tensor.shape == x.shape] == [x.data_ptr()]
    assert {tensor.shape for tensor in saved.values() if tensor.dtype == torch.float32} <= {(8, 32)}


def test_adapters_of_a_float32_network_are_pefts_to_the_bit() -> None:
    from peft import LoraConfig, get_peft_model

    network = _adapted(torch.float32)[0]
    plain = _Layers(torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=r".*\.\d")
    torch.manual_seed(1)
    model: Any = get_peft_model(plain.requires_grad_(False), config, "current")  # type: ignore[arg-type]
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    found, expected = network(x), model(x)
    assert torch.equal(found, expected)
    found.square().mean().backward()
    expected.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    own = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
    assert len(own) == 6
    assert all(torch.equal(gradient, gradients[f"base_model.model.{name}"]) for name, gradient in own.items())
