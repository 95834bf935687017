"""The contract of a policy-gradient algorithm: how to draw, what is good, what to descend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.policies.base import FlowPolicy
from agents.policies.weights import PolicyWeights, Version
from agents.samplers import Sampler
from agents.types import Chunk, Rollout


@dataclass(frozen=True)
class Learning:
    """What an algorithm may use while it learns from one chunk.

    Attributes:
        policy: the policy, with its current weights in use.
        weights: its old, reference and averaged weights.
        generator: seeded by (run seed, iteration, update, chunk): every draw made in learning comes from it.
        metrics: what an algorithm reports; values of one name are averaged over the iteration.
    """

    policy: FlowPolicy
    weights: PolicyWeights
    generator: torch.Generator
    metrics: dict[str, list[float]]

    def report(self, **values: Tensor) -> None:
        """Add one value (or a mean of values) to each named metric."""
        for name, value in values.items():
            self.metrics.setdefault(name, []).append(float(value.detach().float().mean()))


class Algorithm(ABC):
    """A policy-gradient algorithm; a frozen dataclass whose fields are its hyper-parameters and its flags.

    ``losses`` is a generator: the algorithm owns the paper's sum over steps, the learner calls ``backward`` on each
    term, and so never holds more than one term's graph. The terms of a chunk sum to its objective.
    """

    @property
    def acting_version(self) -> Version:
        """The weights that draw rollouts: the current ones by default."""
        return "current"

    @abstractmethod
    def sampler(self) -> Sampler:
        """How rollouts are drawn."""

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """Advantages [N] from rewards [N]; a NaN reward gets exactly 0 and changes nothing for the others."""

    @abstractmethod
    def losses(self, learning: Learning, chunk: Chunk) -> Iterator[Tensor]:
        """The terms of the objective on one chunk, each a scalar."""

    def after_update(self, weights: PolicyWeights, update: int) -> None:  # noqa: B027
        """Called after optimiser step ``update`` (counted from 1 over the run); nothing by default."""
