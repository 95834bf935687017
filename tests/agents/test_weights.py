"""Versions of a policy's weights: full copies and LoRA adapters keep one contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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
