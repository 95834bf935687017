"""How processes share rollouts: who draws which chunk, and how the others learn what it was worth.

A chunk is drawn and learnt by one process, whole, as a single process would: its latents never travel. Rewards do,
once an iteration; advantages and everything that is decided by rewards are then the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.processes import Processes, as_bytes
from agents.rollout import Share
from agents.types import Elsewhere, Rollout, Seconds


def shares(num_chunks: Sequence[int], processes: Processes) -> list[Share]:
    """This process's share of each of an iteration's rollouts.

    Chunks are dealt in the order in which minibatches are cut from them (``agents.types.minibatches``): where every
    minibatch has a multiple of as many chunks as there are processes, each gets as many of each minibatch.

    Args:
        num_chunks: of each rollout, all of one size.
        processes: see :class:`Processes`.
    """
    order = sorted((number / total, index, number) for index, total in enumerate(num_chunks) for number in range(total))
    owner = {(index, number): turn % processes.count for turn, (_, index, number) in enumerate(order)}
    found = []
    for index, total in enumerate(num_chunks):
        owners = [owner[index, number] for number in range(total)]
        own = tuple(number for number, rank in enumerate(owners) if rank == processes.rank)
        most = max(owners.count(rank) for rank in range(processes.count))
        found.append(Share(own, most - len(own) if processes.is_sharded else 0))
    return found


def gather_rollouts(rollouts: Sequence[Rollout], processes: Processes, num_images: int) -> list[Rollout]:
    """The same rollouts with everybody's rewards, components and reasons; latents stay where they are.

    Args:
        rollouts: of one iteration, each with this process's share.
        processes: see :class:`Processes`.
        num_images: with several processes the first one gets so many of each rollout's images, where they were kept,
            and the others get none.
    """
    if processes.count == 1:
        return list(rollouts)
    told = processes.gather(_named(_worth(rollout) for rollout in rollouts))
    # A second message, for images are large and nobody but the first looks at them.
    shown = processes.gather(_named(_shown(rollout, num_images) for rollout in rollouts), True) if num_images else []
    return [
        _joined(rollout, [_of(part, index) for part in told], [_of(part, index) for part in shown])
        for index, rollout in enumerate(rollouts)
    ]


def _named(parts: Any) -> dict[str, Tensor]:
    return {f"{index}.{name}": tensor for index, part in enumerate(parts) for name, tensor in part.items()}


def _of(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_here(rollout: Rollout) -> Tensor:
    """Which samples were drawn by this process, bool [N]."""
    return torch.cat([torch.full((len(t),), not isinstance(t, Elsewhere)) for t in rollout.trajectories])


def _worth(rollout: Rollout) -> dict[str, Tensor]:
    """What the others need to know of the samples that were drawn here."""
    return {
        "is_here": _is_here(rollout),
        "rewards": rollout.rewards,
        "reasons": as_bytes(json.dumps({str(index): why for index, why in rollout.reasons.items()}).encode()),
        "seconds": torch.tensor(rollout.seconds, dtype=torch.float64),
        **{f"component.{name}": values for name, values in rollout.components.items()},
    }


def _shown(rollout: Rollout, num_images: int) -> dict[str, Tensor]:
    """The first images among those that were drawn here, with their indices."""
    if rollout.images is None:
        return {}
    index = torch.nonzero(_is_here(rollout)).flatten()
    count = int((index < num_images).sum())
    return {"index": index[:count].clone(), "images": torch.from_numpy(rollout.images[:count].copy())}


def _joined(rollout: Rollout, told: Sequence[dict[str, Tensor]], shown: Sequence[dict[str, Tensor]]) -> Rollout:
    def values(name: str) -> Tensor:
        found = torch.full_like(rollout.rewards, torch.nan)
        for part in told:
            found = torch.where(part["is_here"], part.get(name, found), found)
        return found

    names = dict.fromkeys(name for part in told for name in part if name.startswith("component."))
    reasons = {int(i): why for part in told for i, why in json.loads(part["reasons"].numpy().tobytes()).items()}
    return replace(
        rollout,
        rewards=values("rewards"),
        components={name.removeprefix("component."): values(name) for name in names},
        images=_in_order(shown),
        # The slowest process is what the others wait for.
        seconds=max(Seconds(*part["seconds"].tolist()) for part in told),
        reasons=dict(sorted(reasons.items())),
    )


def _in_order(shown: Sequence[dict[str, Tensor]]) -> NDArray[Any] | None:
    parts = [part for part in shown if part]
    if not parts:
        return None
    order = torch.cat([part["index"] for part in parts]).argsort()
    images: NDArray[Any] = np.concatenate([part["images"].numpy() for part in parts])[order.numpy()]
    return images
