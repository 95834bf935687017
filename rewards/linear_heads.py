"""The head of two published rewards, LAION's aesthetic predictor and ImageReward: five linear layers, nothing between.

Features [B, width] -> 1024 -> 128 -> 64 -> 16 -> 1. Both repositories have the activations commented out, so that the
whole is one affine map; the layers are kept as they are for the checkpoints' names (``layers.0`` to ``layers.7``, with
dropout in between).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rewards.checkpoints import load_strictly

if TYPE_CHECKING:
    import torch

PREFIX = "layers."


def linear_head(tensors: Mapping[str, torch.Tensor], what: str) -> torch.nn.Sequential:
    """The head of a checkpoint, in float32 and without dropout; its width is that of the first layer's weights.

    Args:
        tensors: by the published names, "layers.0.weight" and so on.
        what: the checkpoint, for messages.

    Raises:
        ValueError: the checkpoint is not such a head.
    """
    from torch import nn

    first = tensors.get(f"{PREFIX}0.weight")
    width = first.shape[1] if first is not None and first.ndim == 2 else 768
    layers = nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    named = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}
    load_strictly(layers, named, what)
    return layers.eval()
