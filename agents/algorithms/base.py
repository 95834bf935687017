"""The contract of a policy-gradient algorithm: how to draw, what is good, what to descend."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from agents.flow import uniform_sigmas
from agents.policies.base import FlowPolicy
from agents.policies.weights import PolicyWeights, Version
from agents.samplers import Sampler, derive_seed
from agents.types import Chunk, Rollout


class SigmaLaw(Protocol):
    """A law of training sigmas, such as ``agents.flow.uniform_sigmas``."""

    def __call__(self, num_samples: int, generator: torch.Generator, *, shift: float) -> Tensor:
        """Draw sigmas, [num_samples]."""
        ...


@dataclass(frozen=True)
class Learning:
    """What an algorithm may use while it learns from one chunk.

    Attributes:
        policy: the policy, with its current weights in use.
        weights: its old, reference and averaged weights.
        epoch: which pass over the rollout this is.
        metrics: what an algorithm reports; values of one name are averaged over the iteration.
    """

    policy: FlowPolicy
    weights: PolicyWeights
    epoch: int
    metrics: dict[str, list[float]]

    def draw(
        self, chunk: Chunk, index: int = 0, law: SigmaLaw = uniform_sigmas, shift: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """A fresh sigma [B] and fresh noise [B, C, H, W] for each sample of a chunk.

        Each sample has its own generator, seeded by (rollout, sample, epoch, index): what it is learnt with does not
        depend on the chunk that it is in.

        Args:
            chunk: whose samples.
            index: counts the draws that one sample gets in one epoch.
            law: of sigma.
            shift: of sigma, as in ``agents.flow.shift_sigmas``.
        """
        x_0 = chunk.trajectory.x_0
        sigmas, noises = [], []
        generator = torch.Generator()
        for seed in chunk.seeds:
            generator.manual_seed(derive_seed(seed, self.epoch, index))
            sigmas.append(law(1, generator, shift=shift))
            noises.append(torch.randn(x_0.shape[1:], generator=generator))
        return torch.cat(sigmas).to(x_0.device), torch.stack(noises).to(x_0.device)

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

    @property
    def needs_reference(self) -> bool:
        """Whether ``losses`` may use the reference's weights; where not, a run keeps none, a copy of the network less.

        True by default: an algorithm that knows better says so.
        """
        return True

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


def changed(algorithm: Algorithm, changes: Mapping[str, float]) -> Algorithm:
    """The algorithm with other values of some of its numbers.

    Raises:
        ValueError: it has no such number, or the value is not one that it takes.
    """
    numbers = {
        entry.name: getattr(algorithm, entry.name)
        for entry in fields(cast(Any, algorithm))
        if type(getattr(algorithm, entry.name)) in (int, float)
    }
    for name in changes:
        if name not in numbers:
            near = difflib.get_close_matches(name, numbers, 1, cutoff=0.0)
            fix = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{type(algorithm).__name__}: expected changes of its numbers {sorted(numbers)}, got {name!r}{fix}"
            )
    # Counts stay whole numbers: a command line or a JSON file may have made 2.0 of them.
    values = {name: type(numbers[name])(value) for name, value in changes.items()}
    return cast(Algorithm, replace(cast(Any, algorithm), **values))
