"""What an edit reward is trained on: regression onto judged scores, and Bradley-Terry on pairs. Pure functions.

Shapes: B edits, D dimensions, P pairs.
"""

from __future__ import annotations

from torch import Tensor, nn


def regression_loss(rewards: Tensor, scores: Tensor) -> Tensor:
    """``mean (r - s)^2`` over edits and dimensions.

    "A supervised regression loss" onto a judge's scores, UniPic 2.0 (arXiv:2509.04548); the paper does not say which.

    Args:
        rewards: what the model says, [B, D].
        scores: what the judge said, [B, D].

    Returns:
        [].

    Raises:
        ValueError: the shapes differ.
    """
    if rewards.shape != scores.shape or rewards.ndim != 2:
        raise ValueError(
            f"regression_loss: expected two [B, D] of one shape, got {list(rewards.shape)} and {list(scores.shape)}"
        )
    return (rewards - scores).square().mean()


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, weights: Tensor, temperature: float = 1.0, norm: Tensor | None = None
) -> Tensor:
    """``-sum_i w_i ln sigmoid((r_chosen - r_rejected)_i / temperature) / sum_i w_i``; 0 where all weights are.

    Bradley and Terry (1952), as in Ouyang et al. (arXiv:2203.02155), Eq. 1. Differs: a temperature, because the
    rewards here are also fitted to scores in [0, 1], where a difference of 1 alone is a probability of 0.73.

    Args:
        chosen: rewards of the better edits, [P].
        rejected: of the worse ones, [P].
        weights: of the pairs, [P], at least 0; a tie has 0.
        temperature: the difference that counts as 1.
        norm: what the sum is divided by in place of ``sum_i w_i``, []. Where a batch is dealt to several processes it
            is the mean of theirs: the mean of their losses is then the loss of the whole batch.

    Returns:
        [].

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    if chosen.ndim != 1 or chosen.shape != rejected.shape or chosen.shape != weights.shape:
        raise ValueError(
            f"bradley_terry_loss: expected three [P], got {list(chosen.shape)}, {list(rejected.shape)}, "
            f"{list(weights.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    losses = -nn.functional.logsigmoid((chosen - rejected) / temperature)
    # Without a pair that counts the sum is 0 already.
    return (weights * losses).sum() / (weights.sum() if norm is None else norm).clamp(min=1e-8)
