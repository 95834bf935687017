"""The processes that share a run, and what they tell each other: rewards, metrics and gradients.

Plain data parallelism is one sum of the gradients an optimiser step: what ``DistributedDataParallel`` computes, without
its wrapper around a network whose parts policies call one by one, and without its synchronisation at every backward
pass. Messages are safetensors' bytes: nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agents.policies.sharding import is_cut

# Elements of a gradient bucket: 100 MB in fp32, so that one more copy of the gradients is never needed.
BUCKET_SIZE = 25_000_000


@dataclass(frozen=True)
class Processes:
    """The processes of a run as one of them sees them; by default it is alone, and every method is then the identity.

    The methods are collective: all processes call them, in the same order.

    Attributes:
        rank: of this one, from 0.
        count: of all.
        is_sharded: weights are cut up over the processes, so that all of them take part in every forward pass.
    """

    rank: int = 0
    count: int = 1
    is_sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def gather(self, tensors: Mapping[str, Tensor], only_first: bool = False) -> list[dict[str, Tensor]]:
        """Everybody's tensors by rank, on the CPU; they may differ in names and shapes.

        Args:
            tensors: this process's.
            only_first: the first process alone gets them, the others an empty list.
        """
        if self.count == 1:
            return [dict(tensors)]
        from safetensors.torch import load, save
        from torch import distributed

        message = as_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        distributed.all_gather(sizes, torch.tensor([len(message)]))
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(message)] = message
        parts = [torch.empty_like(padded) for _ in lengths] if self.is_first or not only_first else []
        if only_first:
            distributed.gather(padded, parts or None, dst=0)
        else:
            distributed.all_gather(parts, padded)
        return [load(part[:length].numpy().tobytes()) for part, length in zip(parts, lengths, strict=bool(parts))]

    def agree(self, choose: Callable[[], Any]) -> Any:
        """What the first process finds, JSON, told to all; the others do not look for themselves."""
        found = choose() if self.is_first else None
        if self.count == 1:
            return found
        (told, *_) = self.gather({"json": as_bytes(json.dumps(found).encode())})
        return json.loads(told["json"].numpy().tobytes())

    def wait(self) -> None:
        """Wait until every process is here."""
        self.agree(lambda: None)

    def mean(self, metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The mean of each metric's values over all processes."""
        if self.count == 1:
            return {name: sum(values) / len(values) for name, values in metrics.items()}
        own = {name: torch.tensor([sum(values), len(values)], dtype=torch.float64) for name, values in metrics.items()}
        totals: dict[str, Tensor] = {}
        for part in self.gather(own):
            totals |= {name: totals.get(name, 0) + pair for name, pair in part.items()}
        return {name: float(total / number) for name, (total, number) in totals.items()}

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over processes, in fp32 and in buckets, once an optimiser step.

        A parameter that has a gradient somewhere gets one everywhere; one that nobody used keeps none. Gradients of
        sharded parameters were summed in the backward pass, see ``agents.policies.sharding``.
        """
        if self.count == 1:
            return
        from torch import distributed

        whole = [parameter for parameter in parameters if not is_cut(parameter)]
        users = torch.tensor([float(parameter.grad is not None) for parameter in whole])
        distributed.all_reduce(users)
        for bucket in _buckets([parameter for parameter, used in zip(whole, users.tolist(), strict=True) if used]):
            flat = torch.cat([_gradient(parameter) for parameter in bucket])
            distributed.all_reduce(flat)
            for parameter, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view(parameter.shape).to(parameter.dtype)


ALONE = Processes()


def as_bytes(data: bytes) -> Tensor:
    """Bytes as a tensor, uint8 [N]."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return torch.zeros(parameter.numel(), device=parameter.device) if gradient is None else gradient.float().flatten()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters with at most ``BUCKET_SIZE`` elements together, or of a single one."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_SIZE:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
