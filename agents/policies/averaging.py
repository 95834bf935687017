"""Averages of weights: EMA, and the slowly following old policy of forward-process algorithms."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def average_into(average: nn.Module, current: nn.Module, decay: float) -> None:
    """``average <- decay average + (1 - decay) current``, in place, parameters and floating buffers alike.

    Raises:
        ValueError: the two modules' tensors differ in name.
    """
    targets, sources = average.state_dict(), current.state_dict()
    if targets.keys() != sources.keys():
        odd = sorted(targets.keys() ^ sources.keys())
        raise ValueError(f"average_into: expected modules with the same tensors; only one of them has {odd[:3]}")
    for name, target in targets.items():
        if target.is_floating_point():
            target.lerp_(sources[name].to(target.dtype), 1 - decay)
