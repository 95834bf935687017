"""Embeddings kept by prompt: a frozen encoder is asked once for what a group, an epoch or a run asks again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Answer = TypeVar("Answer")
Row = Mapping[str, Tensor]
"""One prompt's tensors by name, without a batch dimension."""


class EmbeddingCache:
    """The rows of the prompts asked for last, on the CPU.

    Args:
        capacity: rows kept; the one not asked for the longest goes first. A call's own rows are always returned.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"capacity: expected 0 or more rows, got {capacity}")
        self.capacity = capacity
        self._rows: OrderedDict[Hashable, Row] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[Row]]) -> list[Row]:
        """One row a key; those not kept are computed in one call, each once.

        Args:
            keys: what the rows depend on, texts and images alike.
            compute: indices into ``keys`` to their rows, in the same order.
        """
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = [index for key, index in sorted(first.items(), key=lambda pair: pair[1]) if key not in self._rows]
        found = {key: self._rows[key] for key in first if key in self._rows}
        if missing:
            for index, row in zip(missing, compute(missing), strict=True):
                found[keys[index]] = {name: tensor.detach().cpu() for name, tensor in row.items()}
        for key, row in found.items():
            self._rows[key] = row
            self._rows.move_to_end(key)
        while len(self._rows) > self.capacity:
            self._rows.popitem(last=False)
        return [found[key] for key in keys]


def content_hash(image: Any) -> str:
    """What an image is known by: a hash of its shape and its pixels, the same in every process."""
    array = np.ascontiguousarray(image)
    return hashlib.blake2b(f"{array.shape}".encode() + array.tobytes(), digest_size=16).hexdigest()


def unstack(tensors: Mapping[str, Tensor]) -> list[Row]:
    """Batch-first tensors [B, ...] to B rows."""
    size = len(next(iter(tensors.values())))
    return [{name: tensor[index] for name, tensor in tensors.items()} for index in range(size)]


def stack_rows(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows to batch-first tensors; where lengths (the first dimension) differ, zeros are added at the end."""
    return {name: _padded([row[name] for row in rows]) for name in rows[0]}


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)


@dataclass(frozen=True)
class Visit:
    """Where encoders stay while nothing is asked of them.

    Attributes:
        modules: the encoders.
        offload: keep them on the CPU, and move them to the device for each call.
    """

    modules: Sequence[torch.nn.Module]
    offload: bool

    def run(self, device: torch.device, function: Callable[[], Answer]) -> Answer:
        """Call a function while the encoders are on a device."""
        for module in self.modules:
            module.to(device)
        try:
            return function()
        finally:
            if self.offload:
                for module in self.modules:
                    module.to("cpu")
