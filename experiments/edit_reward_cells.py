"""What a tiny model is asked of each cell of a picture: the loss of its answers, and how many are right."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from envs.scenes.world import COLORS, SHAPES
from experiments.edit_reward_reading import UNKNOWN

CHOICES = (len(COLORS) + 1, len(SHAPES) + 1)
"""Answers to each question: no colour or one, no shape or one."""
MOMENTS = ("before", "after", "as asked")


def cell_loss(answers: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of colours and shapes: answers [B, N, Q * choices], labels [B, 2 Q, N] -> [].

    A question of which no cell's answer is known is left out.
    """
    parts = torch.split(answers, list(CHOICES) * (labels.shape[1] // 2), dim=-1)
    losses = [
        nn.functional.cross_entropy(part.transpose(1, 2), labels[:, column], ignore_index=UNKNOWN)
        for column, part in enumerate(parts)
        if (labels[:, column] != UNKNOWN).any()
    ]
    return torch.stack(losses).mean() if losses else answers.sum() * 0.0


def share_right(answers: Tensor, labels: Tensor, question: int = 0) -> float:
    """Of the cells with an object, the share whose colour and shape are both right."""
    parts = torch.split(answers, list(CHOICES) * (labels.shape[1] // 2), dim=-1)[2 * question : 2 * question + 2]
    wanted = labels[:, 2 * question : 2 * question + 2]
    counts = (wanted > 0).all(1)
    right = torch.stack([part.argmax(-1) for part in parts], 1) == wanted
    return float(right.all(1)[counts].float().mean()) if counts.any() else math.nan
