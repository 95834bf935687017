"""Advantages, ratios, surrogates and divergences, as pure functions.

All arithmetic is fp32 whatever the dtype of the inputs. Everything that is a loss is to be minimised and comes back as
one value a sample, [B], so that the algorithm's file owns the means and the sums of its paper.

Shapes: B samples of a minibatch, N samples of a whole rollout, ... the latent dimensions.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from agents.flow import x_0_from_velocity

AdvantageStd = Literal["group", "global", "none"]
KLDivisor = Literal["variance", "diffusion"]
"""What a KL of two steps is divided by: ``2 std^2`` or ``2 g^2``, see ``gaussian_kl``."""

_TINY = torch.finfo(torch.float32).tiny  # Keeps the 0 / 0 of a flat group, with eps = 0, at 0
_MIN_NFT_WEIGHT = 1e-5  # DiffusionNFT's floor for its self-normalising weight; latents have unit scale


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ``ValueError`` that names the nearest choice, unless ``value`` is one of ``choices``."""
    if value in choices:
        return
    nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)[0]
    raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}; did you mean {nearest!r}?")


def mean_dims(x: Tensor) -> Tensor:
    """Mean over every dimension but the batch's, in fp32. [B, ...] -> [B]."""
    x = x.float()
    return x if x.ndim == 1 else x.mean(dim=tuple(range(1, x.ndim)))


def group_advantages(
    rewards: Tensor,
    groups: Tensor | int,
    std: AdvantageStd = "group",
    eps: float = 1e-4,
    clip: float | None = 5.0,
) -> Tensor:
    """Group-relative advantages, ``A_i = clip((r_i - mean_group) / (std + eps), -clip, clip)``.

    Flow-GRPO (arXiv:2505.05470); ``std="none"`` is Dr. GRPO's baseline (arXiv:2503.20783). The standard
    deviation is the population's, as in Flow-GRPO's code (DanceGRPO's uses the sample's).

    A NaN reward means "not available": its advantage is 0 and it enters no mean and no deviation, so that it changes
    nothing for the others. A group whose rewards are all equal teaches nothing and gets exactly 0.

    Args:
        rewards: [N], NaN where not available.
        groups: the group's id of every sample, [N]; or the group's size, if groups lie one after the other.
        std: divide by the deviation of the ``group``, of all rewards (``global``), or not at all (``none``).
        eps: added to the deviation, in units of the reward.
        clip: bound of the advantage's size; None for no bound.

    Returns:
        [N], fp32.

    Raises:
        ValueError: for an infinite reward, groups that do not fit the rewards, or an unknown ``std``.
    """
    check_choice("std", std, ("group", "global", "none"))
    is_valid, ids, centred, count = _centre(rewards, groups)
    if std == "group":
        variance = torch.zeros_like(count).index_add(0, ids, centred.square()) / count.clamp(min=1)
        centred = centred / (variance.sqrt()[ids] + eps).clamp(min=_TINY)
    elif std == "global" and is_valid.any():
        centred = centred / (rewards.float()[is_valid].std(correction=0) + eps).clamp(min=_TINY)
    return centred if clip is None else centred.clamp(-clip, clip)


def normalize_then_sum(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor | int, std_floor: float = 0.05
) -> Tensor:
    """Several rewards as one in which each counts by its weight, not by its spread.

    ``sum_k w_k (r_k - mean_group r_k) / max(std_group r_k, std_floor)``: GDPO (arXiv:2601.05242), whose whitening over
    the batch is ``group_advantages`` with ``std="global"``.
    Differs: the floor. A reward that hardly differs within a group says nothing there, and a division by its deviation
    would make its noise as loud as the others' answers; GDPO adds a tiny constant.

    Args:
        rewards: by name, [N] each, NaN where not available.
        weights: of those that count.
        groups: [N] ids, or the group's size.
        std_floor: least divisor, in units of the rewards.

    Returns:
        [N], fp32; NaN where a reward with a weight other than 0 is not available.
    """
    if not std_floor > 0:
        raise ValueError(f"std_floor: expected a number above 0, got {std_floor}")
    total = torch.zeros(len(next(iter(rewards.values()))))
    for name, weight in weights.items():
        if weight == 0:
            continue
        is_valid, ids, centred, count = _centre(rewards[name], groups)
        variance = torch.zeros_like(count).index_add(0, ids, centred.square()) / count.clamp(min=1)
        normalized = centred / variance.sqrt().clamp(min=std_floor)[ids]
        total = total + weight * torch.where(is_valid, normalized, torch.nan)
    return total


def leave_one_out_advantages(rewards: Tensor, groups: Tensor | int) -> Tensor:
    """Leave-one-out advantages, ``A_i = r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean_group)``.

    RLOO (arXiv:2402.14740): unbiased, since the baseline does not see the sample. G counts the rewards that are
    available; NaN and flat groups are treated as in ``group_advantages``, and a sample alone in its group gets 0.

    Args:
        rewards: [N], NaN where not available.
        groups: [N] ids, or the group's size.

    Returns:
        [N], fp32.

    Raises:
        ValueError: for an infinite reward or groups that do not fit the rewards.
    """
    _, ids, centred, count = _centre(rewards, groups)
    return centred * (count / (count - 1).clamp(min=1))[ids]


def _centre(rewards: Tensor, groups: Tensor | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Validity [N], dense group index [N], reward minus its group's mean [N] (0 if masked or flat), group counts."""
    if rewards.ndim != 1 or torch.isinf(rewards).any():
        raise ValueError(
            f"rewards: expected finite numbers of shape [N], NaN where not available, got shape {list(rewards.shape)}"
            f" with {int(torch.isinf(rewards).sum())} infinite; return NaN for a sample that could not be scored"
        )
    ids = _dense_ids(groups, rewards)
    is_valid = ~torch.isnan(rewards)
    values = torch.where(is_valid, rewards.float(), 0.0)
    num_groups = int(ids.max()) + 1 if len(ids) else 0
    zeros = torch.zeros(num_groups, device=rewards.device)
    count = zeros.index_add(0, ids, is_valid.float())
    mean = zeros.index_add(0, ids, values) / count.clamp(min=1)
    # Rounding leaves a mean of equal numbers a little off them, and eps would not hide it: compare the extremes.
    low = zeros.scatter_reduce(0, ids, torch.where(is_valid, values, torch.inf), "amin", include_self=False)
    high = zeros.scatter_reduce(0, ids, torch.where(is_valid, values, -torch.inf), "amax", include_self=False)
    is_used = is_valid & (high > low)[ids]
    return is_valid, ids, torch.where(is_used, values - mean[ids], 0.0), count


def _dense_ids(groups: Tensor | int, rewards: Tensor) -> Tensor:
    """Group index 0, 1, ... of every sample. [N]."""
    num_samples = len(rewards)
    if isinstance(groups, int):
        if groups < 1 or num_samples % groups:
            raise ValueError(
                f"groups: expected a group size that divides the {num_samples} rewards, got {groups};"
                " pass the group's id of every sample where groups differ in size"
            )
        return torch.arange(num_samples, device=rewards.device) // groups
    if groups.shape != rewards.shape:
        raise ValueError(f"groups: expected one id a reward, shape [{num_samples}], got shape {list(groups.shape)}")
    ids: Tensor = torch.unique(groups.to(rewards.device), return_inverse=True)[1]
    return ids


def ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Importance ratio, ``rho = exp(log_prob - old_log_prob)``; the old one is a constant. [B] -> [B].

    With log-probabilities that are means over d latent dimensions this is the true ratio to the power 1/d.
    """
    return (log_prob.float() - old_log_prob.detach().float()).exp()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_range: float | tuple[float, float]) -> Tensor:
    """PPO's loss, ``max(-A rho, -A clip(rho, 1 - low, 1 + high))``.

    PPO (arXiv:1707.06347), Eq. 7, with the sign of a loss; Flow-GRPO (arXiv:2505.05470).

    Args:
        ratio: [B].
        advantage: [B], a constant.
        clip_range: one number for both sides, or (low, high). Flow models use 1e-5 to 1e-3: see ``ratio``.

    Returns:
        [B].
    """
    low, high = _clip_bounds(clip_range)
    advantage = advantage.detach().float()
    ratio = ratio.float()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))


def clip_fraction(ratio: Tensor, clip_range: float | tuple[float, float]) -> Tensor:
    """Share of the samples whose ratio lies outside the clip range; a metric, no gradient. [B] -> []."""
    low, high = _clip_bounds(clip_range)
    ratio = ratio.detach().float()
    return ((ratio < low) | (ratio > high)).float().mean()


def _clip_bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    return 1 - low, 1 + high


def approx_kl(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """KL(old || new) from samples of old, ``mean(rho - 1 - log rho)``; a metric, no gradient. [B] -> [].

    The estimator of http://joschu.net/blog/kl-approx.html: unbiased for true log-probabilities, never negative. Here
    they are means over latent dimensions, so that it is a distance to watch and not a number of nats.
    """
    log_ratio = (log_prob - old_log_prob).detach().float()
    # expm1: in fp32 exp(x) - 1 - x is rounding noise for the 1e-4 that these ratios are about.
    return (log_ratio.expm1() - log_ratio).mean()


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL between Gaussians of one standard deviation, ``mean_dims (mean - reference_mean)^2 / (2 std^2)``.

    Flow-GRPO (arXiv:2505.05470). Nats per latent dimension. An SDE's step has ``std = g sqrt(-dt)``: Flow-GRPO's code
    has g in std's place, which is ``-dt`` times the KL, and its published weights are made for that.

    Args:
        mean: [B, ...].
        reference_mean: [B, ...], a constant.
        std: positive, broadcastable to ``mean``; or g.

    Returns:
        [B].
    """
    difference = mean.float() - reference_mean.detach().float()
    return mean_dims(difference.square() / (2 * std.float().square()))


def velocity_mse(velocity: Tensor, target: Tensor) -> Tensor:
    """``mean_dims (velocity - target)^2``; the target (data's, or a reference policy's) is a constant. -> [B]."""
    return mean_dims((velocity.float() - target.detach().float()).square())


def nft_reward_weight(advantage: Tensor, max_advantage: float = 5.0) -> Tensor:
    """How good a sample is, ``r = clip(A / A_max, -1, 1) / 2 + 1/2``, in [0, 1]. [B] -> [B].

    DiffusionNFT (arXiv:2509.16117). An advantage of 0, a masked sample's too, gives 1/2: no gradient on policy.
    """
    return (advantage.detach().float() / max_advantage).clamp(-1, 1) / 2 + 0.5


def nft_implicit_losses(
    velocity: Tensor, old_velocity: Tensor, x_t: Tensor, x_0: Tensor, sigma: Tensor | float, beta: float
) -> tuple[Tensor, Tensor]:
    """DiffusionNFT's regressions of an implicit positive and an implicit negative policy.

    ``v+ = beta v + (1 - beta) v_old``, ``v- = (1 + beta) v_old - beta v``, and for u each of them
    ``|x_t - sigma u - x_0|^2 / w``, where ``|.|^2`` is a mean over the latent dimensions and
    ``w = max(mean |x_t - sigma u - x_0|, 1e-5)`` a constant. DiffusionNFT (arXiv:2509.16117).

    Args:
        velocity: of the policy that learns, [B, ...].
        old_velocity: of the policy that drew x_0, [B, ...], a constant.
        x_t: noised latents, [B, ...].
        x_0: the rollout's clean latents, [B, ...].
        sigma: [] or [B].
        beta: strength of the implicit policies, positive.

    Returns:
        The positive's and the negative's, each [B], for ``nft_loss``.
    """
    velocity, old_velocity = velocity.float(), old_velocity.detach().float()
    positive = beta * velocity + (1 - beta) * old_velocity
    negative = (1 + beta) * old_velocity - beta * velocity

    def regression(implicit: Tensor) -> Tensor:
        error = x_0_from_velocity(x_t, implicit, sigma) - x_0.float()
        return mean_dims(error.square()) / mean_dims(error.detach().abs()).clamp(min=_MIN_NFT_WEIGHT)

    return regression(positive), regression(negative)


def nft_loss(r: Tensor, positive: Tensor, negative: Tensor, beta: float) -> Tensor:
    """DiffusionNFT's contrast, ``[r positive + (1 - r) negative] / beta``.

    At ``v = v_old`` its gradient is ``(2 r - 1)`` times that of the regression of v, whatever beta: towards a good
    sample, away from a bad one. DiffusionNFT (arXiv:2509.16117).
    Differs: the published code multiplies by A_max, which is left to the algorithm.

    Args:
        r: ``nft_reward_weight``, [B].
        positive: from ``nft_implicit_losses``, [B].
        negative: from ``nft_implicit_losses``, [B].
        beta: the same as there.

    Returns:
        [B].
    """
    r = r.float()
    return (r * positive + (1 - r) * negative) / beta
