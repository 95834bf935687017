"""Every algorithm learns a small task through the real environment, and keeps the algorithm contract."""

from __future__ import annotations

import copy
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

import envs  # noqa: F401
from agents.algorithms.base import Algorithm
from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import Learner, LearnerSettings
from agents.policies.scenes import ScenesPolicy
from agents.policies.weights import FullWeights, LoraSettings, LoraWeights, PolicyWeights
from agents.rollout import Draw, collect
from agents.samplers import CPS, ODE, DanceSDE, FlowSDE
from agents.types import Rollout
from envs.prompts import FixedPool
from rewards.base import Prompt, Values
from rewards.pixel import redness

PROMPTS = [Prompt("a red circle", id="0"), Prompt("two squares", id="1")]
ALGORITHMS: list[Algorithm] = [
    FlowGRPO(FlowSDE(4), clip_range=0.05, kl_coef=0.0),
    FlowGRPO(DanceSDE(4, eta=0.6), clip_range=0.05, kl_coef=0.0),
    FlowGRPO(CPS(4, log_prob="gaussian"), clip_range=0.05, kl_coef=0.001, advantage_std="group"),
    DiffusionNFT(ODE(4), kl_coef=0.0),
]
IDS = ["flow_grpo", "dance_grpo", "cps", "diffusion_nft"]


def _envs(reward: object = redness, num_envs: int = 8) -> list[gymnasium.vector.VectorEnv]:
    kwargs = {"reward": reward, "prompts": FixedPool(PROMPTS), "image_size": (48, 48)}
    mode = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
    name = "pdtr/TextToImage-v0"
    return [gymnasium.make_vec(name, num_envs=num_envs, vectorization_mode=mode, **kwargs) for _ in range(2)]


def _learner(policy: ScenesPolicy, algorithm: Algorithm, weights: PolicyWeights, lr: float = 3e-3) -> Learner:
    optimizer = torch.optim.AdamW(weights.parameters(), lr=lr, weight_decay=0.0)
    return Learner(policy, weights, algorithm, optimizer, LearnerSettings(num_minibatches=2, num_epochs=2))


def _rollout(learner: Learner, seed: int, reward: object = redness) -> Rollout:
    algorithm = learner.algorithm
    with torch.no_grad(), learner.weights.use(algorithm.acting_version):
        rollout = collect(learner.policy, _envs(reward), PROMPTS, Draw(8, seed), algorithm.sampler())
    return rollout.with_advantages(algorithm.advantages(rollout))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_learns_to_paint_red(tiny_policy: ScenesPolicy, algorithm: Algorithm) -> None:
    learner = _learner(tiny_policy, algorithm, FullWeights(tiny_policy))
    means = []
    for iteration in range(30):
        rollout = _rollout(learner, iteration)
        means.append(float(rollout.rewards.mean()))
        metrics = learner.update([rollout])
        assert metrics["skipped_updates"] == 0
    spread = float(np.std(means[:3]))
    assert np.mean(means[-5:]) > np.mean(means[:3]) + max(0.03, 3 * spread), means


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_first_loss_is_at_ratio_one(tiny_policy: ScenesPolicy, algorithm: Algorithm) -> None:
    """On policy, every ratio that the algorithm itself computes is 1 to the bit."""
    learner = _learner(tiny_policy, algorithm, FullWeights(tiny_policy))
    learner.settings = replace(learner.settings, num_minibatches=1, num_epochs=1)
    metrics = learner.update([_rollout(learner, 0)])
    if isinstance(algorithm, FlowGRPO):
        assert metrics["ratio_error"] == 0
        assert metrics["clip_fraction"] == 0
        assert metrics.get("kl_loss", 0.0) == 0
    else:
        assert metrics["old_distance"] == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_chunks_of_any_size_learn_the_same(tiny_policy: ScenesPolicy, algorithm: Algorithm) -> None:
    """Two optimiser steps each: their minibatches hold the same samples, their rounding alone differs."""
    start = copy.deepcopy(tiny_policy.transformer)
    learnt = []
    for chunk_size in (4, 8):
        tiny_policy.transformer = copy.deepcopy(start)
        weights = FullWeights(tiny_policy)
        learner = _learner(tiny_policy, algorithm, weights)
        # Adam would blow rounding up: where a gradient is nearly 0 its step is not.
        learner.optimizer = torch.optim.SGD(weights.parameters(), lr=1e-2)
        with torch.no_grad():
            drawn = collect(tiny_policy, _envs(num_envs=chunk_size), PROMPTS, Draw(8, 0), algorithm.sampler())
        assert learner.update([drawn.with_advantages(algorithm.advantages(drawn))])["skipped_updates"] == 0
        learnt.append([p.detach().clone() for p in weights.parameters()])
    moved = max(float((p - q.detach()).abs().max()) for p, q in zip(learnt[0], start.parameters(), strict=True))
    apart = max(float((p - q).abs().max()) for p, q in zip(*learnt, strict=True))
    assert apart < 1e-2 * moved


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_steps_replayed_together_learn_the_same(tiny_policy: ScenesPolicy, guidance_scale: float) -> None:
    """Three stochastic steps, one, two and all of them a forward pass: the gradients differ by rounding alone."""
    start = copy.deepcopy(tiny_policy.transformer)
    gradients = []
    for count in (1, 2, 3):
        tiny_policy.transformer = copy.deepcopy(start)
        sampler = FlowSDE(4, guidance_scale=guidance_scale)
        algorithm = FlowGRPO(sampler, clip_range=0.05, kl_coef=0.01, steps_per_forward=count)
        weights = FullWeights(tiny_policy)
        learner = _learner(tiny_policy, algorithm, weights)
        learner.optimizer = torch.optim.SGD(weights.parameters(), lr=1.0)
        learner.settings = replace(learner.settings, num_minibatches=1, num_epochs=1, max_grad_norm=1e9)
        metrics = learner.update([_rollout(learner, 0)])
        assert metrics["ratio_error"] < 1e-5
        gradients.append(
            torch.cat(
                [
                    (q.detach() - p.detach()).flatten()
                    for p, q in zip(weights.parameters(), start.parameters(), strict=True)
                ]
            )
        )
    assert gradients[0].abs().max() > 0
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm()) < 1e-3 * float(gradients[0].norm())


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_only_what_is_trainable_changes(tiny_policy: ScenesPolicy, algorithm: Algorithm) -> None:
    words = {name: tensor.clone() for name, tensor in tiny_policy.words.state_dict().items()}
    weights = LoraWeights(tiny_policy, LoraSettings(4, 8))
    base = {n: p.clone() for n, p in tiny_policy.transformer.named_parameters() if "lora_" not in n}
    learner = _learner(tiny_policy, algorithm, weights)
    learner.update([_rollout(learner, 0)])
    named = dict(tiny_policy.transformer.named_parameters())
    assert all(torch.equal(named[name], tensor) for name, tensor in base.items())
    assert all(torch.equal(tiny_policy.words.state_dict()[name], tensor) for name, tensor in words.items())
    assert any(bool(tensor.abs().max() > 0) for name, tensor in named.items() if "lora_B.current" in name)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_a_masked_sample_changes_nothing_for_the_others(tiny_policy: ScenesPolicy, algorithm: Algorithm) -> None:
    def reward(images: np.ndarray, prompts: object) -> Values:
        values = redness(images, [])
        values[0] = np.nan
        return values

    learner = _learner(tiny_policy, algorithm, FullWeights(tiny_policy))
    rollout = _rollout(learner, 0, reward)
    missing = rollout.rewards.isnan()
    assert missing.sum() == 2
    advantages = algorithm.advantages(rollout)
    assert (advantages[missing] == 0).all()
    assert advantages.isfinite().all()
    group = rollout.group_ids == 0
    kept = rollout.rewards[group & ~missing]
    centred = kept - kept.mean()
    assert torch.equal(torch.sign(advantages[group & ~missing]), torch.sign(centred))


def test_nothing_is_learnt_from_equal_rewards(tiny_policy: ScenesPolicy) -> None:
    learner = _learner(tiny_policy, ALGORITHMS[0], FullWeights(tiny_policy))
    rollout = _rollout(learner, 0, lambda images, prompts: np.ones(len(images), np.float32))
    assert (rollout.advantages == 0).all()
    before = {name: tensor.clone() for name, tensor in learner.weights.state().items()}
    learner.update([rollout])
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.weights.state().items())


def test_a_gradient_that_is_not_finite_is_left_out(tiny_policy: ScenesPolicy) -> None:
    learner = _learner(tiny_policy, ALGORITHMS[0], FullWeights(tiny_policy))
    rollout = _rollout(learner, 0)
    before = {name: tensor.clone() for name, tensor in learner.weights.state().items()}
    metrics = learner.update([rollout.with_advantages(torch.full_like(rollout.rewards, float("nan")))])
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.weights.state().items())


def test_collect_gives_the_same_rewards_for_any_chunk_size(tiny_policy: ScenesPolicy) -> None:
    draw = Draw(8, 0, keep_images=True)
    wholes = [collect(tiny_policy, _envs(num_envs=size), PROMPTS, draw, FlowSDE(4)) for size in (4, 8, 16)]
    for other in wholes[1:]:
        assert torch.allclose(wholes[0].rewards, other.rewards, atol=1e-3)
        assert torch.equal(wholes[0].group_ids, other.group_ids)


def test_collect_names_samples_that_do_not_fill_chunks(tiny_policy: ScenesPolicy) -> None:
    with pytest.raises(ValueError, match=r"got 2 x 3 = 6 with a chunk size of 8"):
        collect(tiny_policy, _envs(), PROMPTS, Draw(3, 0), ODE(2))


@pytest.mark.parametrize(
    "bad", [{"clip_range": 0.0}, {"kl_coef": -1.0}, {"rollout_sampler": ODE()}, {"steps_per_forward": 0}]
)
def test_flow_grpo_refuses_settings_that_cannot_run(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="FlowGRPO"):
        FlowGRPO(**bad)  # type: ignore[arg-type]
