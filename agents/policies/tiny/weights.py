"""Random weights that let a network's output depend on its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights by a seed; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomise(module: nn.Module, seed: int, scale: float = 0.5) -> None:
    """Add noise of ``scale`` over the root of a layer's inputs to every parameter, and leave the training mode.

    Freshly made networks of many classes hardly look at their inputs: gates, norms or the last layer start at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        width = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.data += scale / width**0.5 * torch.randn(parameter.shape, generator=generator)
    module.eval()
