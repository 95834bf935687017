"""Dynamic loss scaling: powers of two, halved and doubled; float16 gradients that are those of float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.learner import Learner, LearnerSettings
from agents.loss_scale import LossScale
from agents.policies.backbone import BackboneSettings
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.weights import FullWeights
from tests.agents.tiny_metaquery import make_metaquery


def test_it_halves_at_once_and_doubles_after_two_thousand() -> None:
    scale = LossScale.of(torch.float16)
    assert scale.value == 65536
    scale.update(False)
    assert (scale.value, scale.num_finite) == (32768, 0)
    for _ in range(1999):
        scale.update(True)
    assert (scale.value, scale.num_finite) == (32768, 1999)
    scale.update(True)
    assert (scale.value, scale.num_finite) == (65536, 0)
    for _ in range(40):
        scale.update(False)
    assert scale.value == 2
    again = LossScale.of(torch.float16)
    again.load_state_dict(scale.state_dict())
    assert again == scale
    other = LossScale.of(torch.bfloat16)
    other.load_state_dict(scale.state_dict())
    assert other == LossScale(1.0, 0)
    again.load_state_dict(other.state_dict())
    assert again == scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    scale = LossScale.of(dtype)
    parameter = torch.nn.Parameter(torch.ones(2))
    scale.scaled(parameter.sum()).backward()
    scale.unscale([parameter])
    scale.update(False)
    assert scale == LossScale(1.0, 0)
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.ones(2))


def test_a_small_gradient_of_float16_is_lost_without_it_and_right_with_it() -> None:
    network = torch.nn.Linear(8, 8)

    def gradient(dtype: torch.dtype, scale: LossScale) -> torch.Tensor:
        network.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = network(torch.linspace(-1, 1, 8)[None])
        scale.scaled(out.float().square().mean() * 1e-7).backward()
        scale.unscale(network.parameters())
        assert network.weight.grad is not None
        return network.weight.grad.clone()

    right = gradient(torch.float32, LossScale())
    assert (gradient(torch.float16, LossScale()) == 0).float().mean() > 0.5
    torch.testing.assert_close(gradient(torch.float16, LossScale.of(torch.float16)), right, rtol=2e-2, atol=1e-11)


def test_the_learner_scales_for_a_policy_in_float16(tmp_path: Path) -> None:
    settings = BackboneSettings(height=64, width=64, dtype="float16", float32_weights=True)
    policy = MetaQueryPolicy.load(make_metaquery(tmp_path, settings), settings)
    weights = FullWeights(policy, ("reference", "old"))
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-3)
    learner = Learner(policy, weights, DiffusionNFT(), optimizer, LearnerSettings(ema_decay=0))
    assert learner.loss_scale == LossScale.of(torch.float16)
    parameters = weights.parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3 * learner.loss_scale.value)
    metrics: dict[str, list[float]] = {}
    learner._step(metrics)
    count = sum(parameter.numel() for parameter in parameters)
    assert metrics["grad_norm"] == [pytest.approx(1e-3 * count**0.5)]
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    parameters[0].grad = torch.full_like(parameters[0], torch.inf)
    learner._step(metrics)
    assert (metrics["skipped_updates"], learner.loss_scale.value) == ([0.0, 1.0], 32768)
