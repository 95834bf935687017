"""What passes between policies, rollouts and algorithms: plain batches of tensors.

B samples, T denoising steps, S stochastic steps, C H W latent, G samples a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.samplers import derive_seed


class PromptLike(Protocol):
    """What a policy needs of a prompt; ``rewards.base.Prompt`` is one."""

    @property
    def text(self) -> str:
        """A prompt or an instruction."""
        ...

    @property
    def source_images(self) -> Sequence[NDArray[Any]]:
        """Images to edit, uint8 [H, W, 3] each."""
        ...


@dataclass(frozen=True)
class Condition:
    """What the velocity is conditioned on, encoded once a prompt.

    Attributes:
        tensors: batch-first tensors by the name that the policy's own file gives them, each [B, ...].
        negative: the same for the unconditional branch of classifier-free guidance, or None where there is none.
    """

    tensors: Mapping[str, Tensor]
    negative: Condition | None = None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply a function to every tensor."""
        negative = self.negative.map(function) if self.negative is not None else None
        return Condition({name: function(tensor) for name, tensor in self.tensors.items()}, negative)

    def select(self, index: Tensor | slice) -> Condition:
        """Pick samples by an index [N] or a slice."""
        return self.map(lambda tensor: tensor[index])

    def repeat_interleave(self, repeats: int) -> Condition:
        """Repeat every prompt ``repeats`` times in a row: one group a prompt."""
        return self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def to(self, device: torch.device | str) -> Condition:
        """Move every tensor to a device."""
        return self.map(lambda tensor: tensor.to(device))


def join_conditions(conditions: Sequence[Condition]) -> Condition:
    """Concatenate conditions of one kind (the same tensor names) along the batch."""
    names = list(conditions[0].tensors)
    tensors = {name: torch.cat([c.tensors[name] for c in conditions]) for name in names}
    negatives = [c.negative for c in conditions if c.negative is not None]
    return Condition(tensors, join_conditions(negatives) if len(negatives) == len(conditions) else None)


@dataclass(frozen=True)
class Trajectory:
    """The denoising chains of one chunk of samples.

    Only what an algorithm can replay is stored: the stochastic steps, and the clean latents.

    Attributes:
        condition: what the samples were conditioned on, [B].
        x_0: final latents, [B, C, H, W].
        sigmas: the whole schedule, [T + 1], falling from 1 to 0.
        steps: indices of the stochastic steps into ``sigmas``, length S.
        latents: latents before each stochastic step, [B, S, C, H, W].
        next_latents: latents after each stochastic step, [B, S, C, H, W].
        log_probs: log-probability of each stochastic step, a mean over latent dimensions, [B, S].
    """

    condition: Condition
    x_0: Tensor
    sigmas: Tensor
    steps: tuple[int, ...]
    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.x_0)


@dataclass(frozen=True)
class Elsewhere:
    """A chunk that another process has drawn: its number of samples is all that is known of it here."""

    num_samples: int

    def __len__(self) -> int:
        return self.num_samples


@dataclass(frozen=True)
class Chunk:
    """One chunk of a rollout as it was drawn, its advantages [B], and a seed a sample for draws made in learning.

    A chunk is replayed whole, in the batch it was drawn in: a matrix product's last bits depend on the batch's
    shape, and only so is the importance ratio exactly 1 at the rollout's weights.
    """

    trajectory: Trajectory
    advantages: Tensor
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.trajectory)


class Seconds(NamedTuple):
    """What scoring took beside drawing: ``waited`` for while drawing stood still, of ``scored`` in all."""

    waited: float = 0.0
    scored: float = 0.0


@dataclass(frozen=True)
class Rollout:
    """All samples of one iteration, in order, groups whole.

    Attributes:
        trajectories: one per chunk; of those of other processes only how long they are.
        rewards: total reward a sample, float32 [N]; NaN where it was not available.
        components: named components, each [N].
        group_ids: group of each sample, [N].
        advantages: [N], zeros until :meth:`with_advantages`.
        seed: the rollout's seed, for draws made in learning (noise, sigmas).
        images: decoded images, uint8 [N, H, W, 3], where they were kept; with several processes those that were drawn
            here, or the first ones of all.
        seconds: what scoring took, and what of it was waited for.
        reasons: why a sample has no reward, by its index.
    """

    trajectories: tuple[Trajectory | Elsewhere, ...]
    rewards: Tensor
    components: Mapping[str, Tensor]
    group_ids: Tensor
    advantages: Tensor
    seed: int = 0
    images: NDArray[Any] | None = None
    seconds: Seconds = field(default_factory=Seconds)
    reasons: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rewards)

    def with_rewards(self, rewards: Tensor) -> Rollout:
        """The same rollout with other rewards [N]."""
        if rewards.shape != self.rewards.shape:
            raise ValueError(f"rewards: expected shape {tuple(self.rewards.shape)}, got {tuple(rewards.shape)}")
        return replace(self, rewards=rewards)

    def with_advantages(self, advantages: Tensor) -> Rollout:
        """The same rollout with advantages [N]."""
        if advantages.shape != self.rewards.shape:
            raise ValueError(f"advantages: expected shape {tuple(self.rewards.shape)}, got {tuple(advantages.shape)}")
        return replace(self, advantages=advantages)

    def chunk_starts(self) -> list[int]:
        """Index of each chunk's first sample."""
        return [0, *accumulate(map(len, self.trajectories))][:-1]

    def chunks(self) -> list[Chunk | Elsewhere]:
        """The chunks in order; a sample's seed follows from its index in the whole rollout, whoever drew it."""
        chunks: list[Chunk | Elsewhere] = []
        for start, trajectory in zip(self.chunk_starts(), self.trajectories, strict=True):
            if isinstance(trajectory, Elsewhere):
                chunks.append(trajectory)
                continue
            stop = start + len(trajectory)
            seeds = tuple(derive_seed(self.seed, "learning", index) for index in range(start, stop))
            chunks.append(Chunk(trajectory, self.advantages[start:stop], seeds))
        return chunks


def minibatches(
    rollouts: Sequence[Rollout], num_minibatches: int, generator: torch.Generator
) -> Iterator[list[Chunk | Elsewhere]]:
    """Cut an iteration's rollouts into ``num_minibatches`` runs of samples, one optimiser step each, in random order.

    The rollouts advance side by side, so that each step sees every task in its share as far as whole chunks allow.
    Where runs are whole chunks of each task, which samples meet in a step does not depend on the chunks' size.
    """
    chunks = [
        (first / len(rollout), index, chunk)
        for index, rollout in enumerate(rollouts)
        for first, chunk in zip(rollout.chunk_starts(), rollout.chunks(), strict=True)
    ]
    if num_minibatches > len(chunks):
        raise ValueError(
            f"num_minibatches={num_minibatches} exceeds the rollout's {len(chunks)} chunks; lower it or chunk_size"
        )
    runs: list[list[Chunk | Elsewhere]] = [[] for _ in range(num_minibatches)]
    total, start = sum(map(len, rollouts)), 0
    for _, _, chunk in sorted(chunks, key=lambda entry: entry[:2]):
        runs[start * num_minibatches // total].append(chunk)
        start += len(chunk)
    for run in torch.randperm(num_minibatches, generator=generator).tolist():
        yield runs[run]
