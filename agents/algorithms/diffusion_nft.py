"""DiffusionNFT: learning from good and bad samples by the forward process, without a likelihood (arXiv:2509.16117)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from agents.algorithms.base import Algorithm, Learning
from agents.flow import interpolate, logit_normal_sigmas, uniform_sigmas
from agents.functional import (
    AdvantageStd,
    group_advantages,
    nft_implicit_losses,
    nft_loss,
    nft_reward_weight,
    velocity_mse,
)
from agents.policies.weights import PolicyWeights, Version
from agents.samplers import ODE, Sampler
from agents.types import Chunk, Rollout


@dataclass(frozen=True)
class DiffusionNFT(Algorithm):
    """``L = A_max mean_i [ r_i l+_i + (1 - r_i) l-_i ] / beta + kl_coef mean_i |v - v_ref|^2``.

    ``r = clip(A / A_max, -1, 1) / 2 + 1/2``; l+ and l- regress the implicit positive policy
    ``beta v + (1 - beta) v_old`` and negative policy ``(1 + beta) v_old - beta v`` onto the rollout's x_0 at fresh
    noise and sigma. No trajectory is needed, so any sampler may draw. The old policy follows the current one:
    after update u its decay is ``min(old_rate max(0, u - old_delay), old_max)``.

    Attributes:
        rollout_sampler: how rollouts are drawn.
        beta: strength of the implicit policies; 1 for one reward, 0.1 for several, in the published settings.
        kl_coef: weight of the velocity's distance to the reference; 1e-4 published.
        max_advantage: A_max, the advantage from which on a sample counts as wholly good or bad.
        num_sigmas: fresh (sigma, noise) pairs a sample; each is one term.
        old_rate: how much the old policy's decay grows an update; 0.001 published.
        old_max: the largest decay of the old policy; 0.5 published.
        old_delay: updates during which the old policy stays equal to the current one; 0 published (75 for OCR).
        advantage_std: divide by the group's, the batch's or no standard deviation.
        sigma_law: law of the fresh sigmas, before the rollout sampler's shift.
        is_guided: the loss's velocities have the rollout sampler's guidance too, and both branches learn. The published
            method is free of guidance everywhere.
    """

    rollout_sampler: Sampler = field(default_factory=ODE)
    beta: float = 1.0
    kl_coef: float = 1e-4
    max_advantage: float = 5.0
    num_sigmas: int = 1
    old_rate: float = 0.001
    old_max: float = 0.5
    old_delay: int = 0
    advantage_std: AdvantageStd = "global"
    sigma_law: Literal["uniform", "logit_normal"] = "uniform"
    is_guided: bool = False

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.kl_coef < 0 or self.num_sigmas < 1 or not self.max_advantage > 0:
            raise ValueError(
                f"DiffusionNFT: expected beta, max_advantage > 0, kl_coef >= 0, num_sigmas >= 1; got {self}"
            )
        if self.sigma_law not in ("uniform", "logit_normal"):
            raise ValueError(f"sigma_law: expected 'uniform' or 'logit_normal', got {self.sigma_law!r}")

    @property
    def acting_version(self) -> Version:
        """The old policy draws: its samples are what the implicit policies contrast."""
        return "old"

    @property
    def needs_reference(self) -> bool:
        """For the KL only."""
        return self.kl_coef > 0

    def sampler(self) -> Sampler:
        """Any sampler; the ODE by default."""
        return self.rollout_sampler

    def advantages(self, rollout: Rollout) -> Tensor:
        """Group-relative advantages, bounded by ``max_advantage``."""
        return group_advantages(rollout.rewards, rollout.group_ids, self.advantage_std, clip=self.max_advantage)

    def losses(self, learning: Learning, chunk: Chunk) -> Iterator[Tensor]:
        """One term a fresh (sigma, noise) pair."""
        x_0, condition = chunk.trajectory.x_0, chunk.trajectory.condition
        r = nft_reward_weight(chunk.advantages, self.max_advantage).to(x_0.device)
        guidance_scale = self.rollout_sampler.guidance_scale if self.is_guided else 1.0
        law = uniform_sigmas if self.sigma_law == "uniform" else logit_normal_sigmas
        given = self.rollout_sampler.shift
        shift = learning.policy.own_shift if given is None else given
        for index in range(self.num_sigmas):
            sigma, noise = learning.draw(chunk, index, law, shift)
            x_t = interpolate(x_0, noise, sigma).to(x_0.dtype)
            velocity = learning.policy.velocity(x_t, sigma, condition, guidance_scale)
            with torch.no_grad(), learning.weights.use("old"):
                old_velocity = learning.policy.velocity(x_t, sigma, condition, guidance_scale)
            positive, negative = nft_implicit_losses(velocity, old_velocity, x_t, x_0, sigma, self.beta)
            loss = self.max_advantage * nft_loss(r, positive, negative, self.beta).mean()
            learning.report(policy_loss=loss, old_distance=velocity_mse(velocity, old_velocity))
            if self.kl_coef > 0:
                with torch.no_grad(), learning.weights.use("reference"):
                    reference = learning.policy.velocity(x_t, sigma, condition, guidance_scale)
                divergence = velocity_mse(velocity, reference).mean()
                learning.report(kl_loss=divergence)
                loss = loss + self.kl_coef * divergence
            yield loss / self.num_sigmas

    def after_update(self, weights: PolicyWeights, update: int) -> None:
        """Let the old policy follow."""
        weights.blend("old", min(self.old_rate * max(0, update - self.old_delay), self.old_max))
