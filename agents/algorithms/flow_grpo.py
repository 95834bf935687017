"""Flow-GRPO: a clipped policy gradient on the denoising chain of a flow model (arXiv:2505.05470)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agents.algorithms.base import Algorithm, Learning
from agents.functional import AdvantageStd, approx_kl, clip_fraction, clipped_surrogate, group_advantages, ratio
from agents.samplers import FlowSDE, Sampler, Transition, kl, log_prob
from agents.types import Chunk, Rollout


@dataclass(frozen=True)
class FlowGRPO(Algorithm):
    """``L = mean_i mean_k [ max(-A_i rho_ik, -A_i clip(rho_ik, 1 - c, 1 + c)) + kl_coef KL_ik ]``.

    ``rho_ik = exp(log_prob - old_log_prob)`` of sample i's stochastic step k, ``KL_ik`` between the two Gaussians of
    that step under the policy and the reference. With another sampler it is DanceGRPO (arXiv:2505.07818), with a
    window MixGRPO (arXiv:2507.21802).

    Differs: log_prob is a mean over latent dimensions, as in the published code, not the paper's sum.

    Attributes:
        rollout_sampler: how rollouts are drawn; its stochastic steps are the ones that are learnt.
        clip_range: c; 1e-4 in the published code at 512 px. The ratio's spread shrinks with the latents' size, so a
            small world wants more.
        kl_coef: beta; 0.04 for GenEval. 0 saves the reference's forward pass.
        advantage_std: divide by the group's, the batch's (the published default) or no standard deviation.
        advantage_clip: bound of an advantage.
    """

    rollout_sampler: Sampler = field(default_factory=FlowSDE)
    clip_range: float = 1e-4
    kl_coef: float = 0.04
    advantage_std: AdvantageStd = "global"
    advantage_clip: float = 5.0

    def __post_init__(self) -> None:
        if not self.clip_range > 0 or self.kl_coef < 0:
            raise ValueError(
                f"FlowGRPO: expected clip_range > 0 and kl_coef >= 0, got {self.clip_range} and {self.kl_coef}"
            )
        if not self.rollout_sampler.stochastic_steps(torch.Generator()):
            raise ValueError(
                "FlowGRPO: rollout_sampler has no stochastic step to learn from; use FlowSDE, DanceSDE or CPS"
            )

    def sampler(self) -> Sampler:
        """The SDE sampler."""
        return self.rollout_sampler

    def advantages(self, rollout: Rollout) -> Tensor:
        """Group-relative advantages."""
        return group_advantages(rollout.rewards, rollout.group_ids, self.advantage_std, clip=self.advantage_clip)

    def losses(self, learning: Learning, chunk: Chunk) -> Iterator[Tensor]:
        """One term a stochastic step."""
        trajectory = chunk.trajectory
        for index, step in enumerate(trajectory.steps):
            transition = self._transition(learning, chunk, index, step)
            new, old = log_prob(transition, trajectory.next_latents[:, index]), trajectory.log_probs[:, index]
            rho = ratio(new, old)
            loss = clipped_surrogate(rho, chunk.advantages.to(rho.device), self.clip_range).mean()
            learning.report(policy_loss=loss, ratio=rho, clip_fraction=clip_fraction(rho, self.clip_range))
            learning.report(ratio_std=rho.std(correction=0), ratio_error=(rho - 1).abs().max())
            learning.report(approx_kl=approx_kl(new, old))
            if self.kl_coef > 0:
                with torch.no_grad(), learning.weights.use("reference"):
                    reference = self._transition(learning, chunk, index, step)
                divergence = kl(transition, reference).mean()
                learning.report(kl_loss=divergence)
                loss = loss + self.kl_coef * divergence
            yield loss / len(trajectory.steps)

    def _transition(self, learning: Learning, chunk: Chunk, index: int, step: int) -> Transition:
        """Replay one step with the weights in use: the very call that drew it."""
        trajectory, sampler = chunk.trajectory, self.rollout_sampler
        latents, sigmas = trajectory.latents[:, index], trajectory.sigmas
        velocity = learning.policy.velocity(latents, sigmas[step], trajectory.condition, sampler.guidance_scale)
        return sampler.transition(latents, velocity, sigmas, step)
