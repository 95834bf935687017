"""Flow-GRPO: a clipped policy gradient on the denoising chain of a flow model (arXiv:2505.05470)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agents.algorithms.base import Algorithm, Learning
from agents.functional import (
    AdvantageStd,
    KLDivisor,
    approx_kl,
    check_choice,
    clip_fraction,
    clipped_surrogate,
    group_advantages,
    ratio,
)
from agents.samplers import FlowSDE, Sampler, Transition, kl, log_prob
from agents.types import Chunk, Rollout, join_conditions


@dataclass(frozen=True)
class FlowGRPO(Algorithm):
    """``L = mean_i mean_k [ max(-A_i rho_ik, -A_i clip(rho_ik, 1 - c, 1 + c)) + kl_coef KL_ik ]``.

    ``rho_ik = exp(log_prob - old_log_prob)`` of sample i's stochastic step k, ``KL_ik`` between the two Gaussians of
    that step under the policy and the reference. With another sampler it is DanceGRPO (arXiv:2505.07818), with a
    window MixGRPO (arXiv:2507.21802).

    Differs: log_prob is a mean over latent dimensions, as in the published code, not the paper's sum. By default KL_ik
    is the paper's; the published code's, and the kl_coef published with it, leave ``-dt`` out: ``kl_divisor``.

    Attributes:
        rollout_sampler: how rollouts are drawn; its stochastic steps are the ones that are learnt.
        clip_range: c; 1e-4 in the published code at 512 px. The ratio's spread shrinks with the latents' size, so a
            small world wants more.
        kl_coef: beta; published are 0.04 for GenEval and OCR, 0.01 for PickScore, all with ``kl_divisor="diffusion"``.
            0 saves the reference's forward pass.
        kl_divisor: of the means' squared distance. ``variance``: ``2 std^2``, the KL of the step's two Gaussians.
            ``diffusion``: ``2 g^2``, the published code's; the term is then ``-dt`` times the KL, a tenth or so at ten
            steps. CPS has no g, and ``variance`` in that code too.
        advantage_std: divide by the group's, the batch's (the published default) or no standard deviation.
        advantage_clip: bound of an advantage.
        steps_per_forward: stochastic steps that one forward pass replays; more fill a device that one batch leaves
            idle, and take as many times the memory. Above 1 the batch is not the one that drew, so the first ratio is
            1 only to rounding.
    """

    rollout_sampler: Sampler = field(default_factory=FlowSDE)
    clip_range: float = 1e-4
    kl_coef: float = 0.04
    kl_divisor: KLDivisor = "variance"
    advantage_std: AdvantageStd = "global"
    advantage_clip: float = 5.0
    steps_per_forward: int = 1

    def __post_init__(self) -> None:
        if not self.clip_range > 0 or self.kl_coef < 0:
            raise ValueError(
                f"FlowGRPO: expected clip_range > 0 and kl_coef >= 0, got {self.clip_range} and {self.kl_coef}"
            )
        if self.steps_per_forward < 1:
            raise ValueError(f"FlowGRPO: expected steps_per_forward of 1 or more, got {self.steps_per_forward}")
        check_choice("FlowGRPO: kl_divisor", self.kl_divisor, ("variance", "diffusion"))
        sampler, steps = self.rollout_sampler, self.rollout_sampler.stochastic_steps(torch.Generator())
        if not steps:
            raise ValueError(
                "FlowGRPO: rollout_sampler has no stochastic step to learn from; use FlowSDE, DanceSDE or CPS"
            )
        # Which steps have a g is known by one of them: better now than at the first loss.
        x = torch.zeros(1, 1)
        if self.kl_divisor == "diffusion" and sampler.transition(x, x, sampler.sigmas(), steps[0]).diffusion is None:
            raise ValueError(
                'FlowGRPO: kl_divisor: expected "variance" for a sampler whose steps have no g, got "diffusion" with '
                f"{type(sampler).__name__}; give that, or draw by FlowSDE or DanceSDE"
            )

    @property
    def needs_reference(self) -> bool:
        """For the KL only."""
        return self.kl_coef > 0

    def sampler(self) -> Sampler:
        """The SDE sampler."""
        return self.rollout_sampler

    def advantages(self, rollout: Rollout) -> Tensor:
        """Group-relative advantages."""
        return group_advantages(rollout.rewards, rollout.group_ids, self.advantage_std, clip=self.advantage_clip)

    def losses(self, learning: Learning, chunk: Chunk) -> Iterator[Tensor]:
        """One term a forward pass: ``steps_per_forward`` stochastic steps."""
        num_steps = len(chunk.trajectory.steps)
        for start in range(0, num_steps, self.steps_per_forward):
            indices = range(start, min(start + self.steps_per_forward, num_steps))
            transitions = self._transitions(learning, chunk, indices)
            references: Sequence[Transition | None] = [None] * len(indices)
            if self.kl_coef > 0:
                with torch.no_grad(), learning.weights.use("reference"):
                    references = self._transitions(learning, chunk, indices)
            terms = [
                self._loss(learning, chunk, index, transition, reference)
                for index, transition, reference in zip(indices, transitions, references, strict=True)
            ]
            yield torch.stack(terms).sum() / num_steps

    def _loss(
        self, learning: Learning, chunk: Chunk, index: int, transition: Transition, reference: Transition | None
    ) -> Tensor:
        """The mean over samples of one stochastic step's term."""
        trajectory = chunk.trajectory
        new, old = log_prob(transition, trajectory.next_latents[:, index]), trajectory.log_probs[:, index]
        rho = ratio(new, old)
        loss = clipped_surrogate(rho, chunk.advantages.to(rho.device), self.clip_range).mean()
        learning.report(policy_loss=loss, ratio=rho, clip_fraction=clip_fraction(rho, self.clip_range))
        learning.report(ratio_std=rho.std(correction=0), ratio_error=(rho - 1).abs().max())
        learning.report(approx_kl=approx_kl(new, old))
        if reference is not None:
            divergence = kl(transition, reference, self.kl_divisor).mean()
            learning.report(kl_loss=divergence)
            loss = loss + self.kl_coef * divergence
        return loss

    def _transitions(self, learning: Learning, chunk: Chunk, indices: Sequence[int]) -> list[Transition]:
        """Replay steps with the weights in use; one step alone is the very call that drew it."""
        trajectory, sampler = chunk.trajectory, self.rollout_sampler
        sigmas, steps = trajectory.sigmas, [trajectory.steps[index] for index in indices]
        latents = [trajectory.latents[:, index] for index in indices]
        if len(steps) == 1:
            velocity = learning.policy.velocity(
                latents[0], sigmas[steps[0]], trajectory.condition, sampler.guidance_scale
            )
            return [sampler.transition(latents[0], velocity, sigmas, steps[0])]
        sigma = sigmas[steps].repeat_interleave(len(trajectory))
        condition = join_conditions([trajectory.condition] * len(steps))
        velocity = learning.policy.velocity(torch.cat(latents), sigma, condition, sampler.guidance_scale)
        return [
            sampler.transition(x, part, sigmas, step)
            for x, part, step in zip(latents, velocity.chunk(len(steps)), steps, strict=True)
        ]
