"""The learner: optimiser steps on rollouts, whatever the algorithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from agents.algorithms.base import Algorithm, Learning
from agents.loss_scale import LossScale
from agents.policies.base import FlowPolicy
from agents.policies.sharding import clip_gradients, sum_after_backward
from agents.policies.weights import PolicyWeights
from agents.processes import ALONE, Processes
from agents.samplers import derive_seed
from agents.types import Chunk, Elsewhere, Rollout, minibatches


@dataclass(frozen=True)
class LearnerSettings:
    """How rollouts are turned into optimiser steps.

    Attributes:
        num_minibatches: optimiser steps an epoch.
        num_epochs: passes over the rollout; from the second step on the policy is no longer the one that drew.
        max_grad_norm: gradients are clipped to it.
        ema_decay: of the averaged weights that are evaluated and saved; 0 keeps none.
        ema_every: optimiser steps from one average to the next.
        sum_at_last_chunk: where weights are cut up over processes, gradients are summed in the backward passes of a
            step's last chunk and not in all: fewer messages, for a whole gradient in every process until then (9 GB for
            SD3.5-Medium).
    """

    num_minibatches: int = 2
    num_epochs: int = 1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9
    ema_every: int = 1
    # Sums in another order: the same weights to rounding.
    sum_at_last_chunk: bool = field(default=False, metadata={"may_change": True})

    def __post_init__(self) -> None:
        counts = (self.num_minibatches, self.num_epochs, self.ema_every)
        if min(counts) < 1 or self.max_grad_norm <= 0 or not 0 <= self.ema_decay < 1:
            raise ValueError(
                "LearnerSettings: expected num_minibatches, num_epochs, ema_every >= 1, max_grad_norm > 0 and "
                f"0 <= ema_decay < 1; got {self}"
            )


@dataclass
class Learner:
    """Owns the optimiser steps. ``num_updates`` counts them over the run.

    Attributes:
        policy: with its current weights in use.
        weights: its versions.
        algorithm: what is descended.
        optimizer: over ``weights.parameters()``.
        settings: see :class:`LearnerSettings`.
        processes: each learns from the chunks that it has drawn; gradients are summed once an optimiser step.
    """

    policy: FlowPolicy
    weights: PolicyWeights
    algorithm: Algorithm
    optimizer: torch.optim.Optimizer
    settings: LearnerSettings
    processes: Processes = ALONE
    num_updates: int = field(default=0, init=False)
    loss_scale: LossScale = field(init=False)

    def __post_init__(self) -> None:
        self.loss_scale = LossScale.of(self.policy.dtype)

    def update(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Learn from one iteration's rollouts, advantages included.

        Returns:
            Metrics, each a mean over what the algorithm reported in all processes; ``grad_norm`` before clipping, and
            ``skipped_updates``, the optimiser steps left out because a gradient was not finite.
        """
        metrics: dict[str, list[float]] = {}
        seed = rollouts[0].seed
        for epoch in range(self.settings.num_epochs):
            order = torch.Generator().manual_seed(derive_seed(seed, "minibatches", epoch))
            for chunks in minibatches(rollouts, self.settings.num_minibatches, order):
                self._accumulate(chunks, epoch, metrics)
                self._step(metrics)
        return self.processes.mean(metrics)

    def _accumulate(self, chunks: Sequence[Chunk | Elsewhere], epoch: int, metrics: dict[str, list[float]]) -> None:
        """Add the gradient of the minibatch's mean objective: of the chunks that are here, over all its samples."""
        num_samples = sum(map(len, chunks))
        learning = Learning(self.policy, self.weights, epoch, metrics)
        here = [chunk for chunk in chunks if not isinstance(chunk, Elsewhere)]
        for place, chunk in enumerate(here, start=1):
            is_summed = place == len(here) or not self.settings.sum_at_last_chunk
            sum_after_backward(self.policy.transformer, is_summed)
            for loss in self.algorithm.losses(learning, chunk):
                self.loss_scale.scaled(loss * (len(chunk) / num_samples)).backward()  # type: ignore[no-untyped-call]

    def _step(self, metrics: dict[str, list[float]]) -> None:
        parameters = self.weights.parameters()
        self.processes.sum_gradients(parameters)
        self.loss_scale.unscale(parameters)
        norm = float(clip_gradients(parameters, self.settings.max_grad_norm))
        is_finite = math.isfinite(norm)
        self.loss_scale.update(is_finite)
        metrics.setdefault("skipped_updates", []).append(float(not is_finite))
        if is_finite:
            metrics.setdefault("grad_norm", []).append(norm)
            self.optimizer.step()
            self.num_updates += 1
            self.algorithm.after_update(self.weights, self.num_updates)
            if self.settings.ema_decay > 0 and self.num_updates % self.settings.ema_every == 0:
                self.weights.blend("ema", self.settings.ema_decay)
        self.optimizer.zero_grad(set_to_none=True)
