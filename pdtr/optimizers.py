"""Muon for the matrices of a network's blocks, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_BLOCKS = ("blocks.", "layers.")


def muon_and_adamw(
    named: Iterable[tuple[str, nn.Parameter]], muon_learning_rate: float, **adamw: Any
) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon/) for two-dimensional weights in blocks, and AdamW.

    Muon's updates are scaled to AdamW's root mean square and decay no weights.

    Args:
        named: parameters by name; ``blocks.`` or ``layers.`` in a name says that it belongs to a block.
        muon_learning_rate: Muon's.
        adamw: settings of ``torch.optim.AdamW``.
    """
    import torch

    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        is_matrix = parameter.ndim == 2 and any(part in name for part in _BLOCKS)
        (matrices if is_matrix else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=muon_learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_steps=4
    )
    return [muon, torch.optim.AdamW(others, **adamw)]
