"""Rewards that are not available: what they mask, and when a run gives up on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from agents.functional import check_choice

if TYPE_CHECKING:
    from agents.types import Rollout

OnMissing = Literal["drop_sample", "drop_group", "raise"]


@dataclass(frozen=True)
class MissingSettings:
    """What follows from a reward that is not available (NaN).

    Attributes:
        on_missing: "drop_sample": the sample teaches nothing and the others of its group are compared without it;
            "drop_group": the whole group teaches nothing; "raise": the run stops at once.
        max_share: the run stops once the missing rewards of the last ``window`` iterations are more than this share of
            a whole window's: half a judge's answers are another reward than the one that was asked for.
        window: iterations that are counted together.
    """

    on_missing: OnMissing = "drop_sample"
    max_share: float = 0.5
    window: int = 10

    def __post_init__(self) -> None:
        check_choice("on_missing", self.on_missing, get_args(OnMissing))
        if not 0 <= self.max_share <= 1 or self.window < 1:
            raise ValueError(f"missing: expected max_share in [0, 1] and a window of 1 or more, got {self}")


class TooManyMissing(ValueError):
    """The run stops: so many rewards were not available that what it learns is not what was asked for."""


def masked(rollout: Rollout, on_missing: OnMissing) -> Rollout:
    """The rollout with the rewards that may be learnt from; the others are NaN.

    Raises:
        TooManyMissing: ``on_missing`` is "raise" and a reward is not available.
    """
    import torch

    missing = rollout.rewards.isnan()
    if on_missing == "drop_sample" or not bool(missing.any()):
        return rollout
    if on_missing == "raise":
        raise TooManyMissing(
            f"{int(missing.sum())} of {len(missing)} rewards are not available ({commonest_reason([rollout])}) and "
            "on_missing is 'raise'; mend the reward, or choose 'drop_sample'"
        )
    dropped = torch.isin(rollout.group_ids, rollout.group_ids[missing])
    return rollout.with_rewards(torch.where(dropped, torch.nan, rollout.rewards))


def commonest_reason(rollouts: Sequence[Rollout]) -> str:
    """The reason that most missing rewards have; empty where none is missing for a reason of its own."""
    reasons = Counter(reason for rollout in rollouts for reason in rollout.reasons.values())
    return reasons.most_common(1)[0][0] if reasons else ""


@dataclass
class MissingWatch:
    """The shares of missing rewards in the last iterations; a part of a run's state.

    Args:
        settings: see :class:`MissingSettings`.
    """

    settings: MissingSettings
    shares: list[float] = field(default_factory=list, init=False)

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Count one iteration.

        Raises:
            TooManyMissing: the missing rewards of the window are too many, be it that the window is not over yet.
        """
        count = sum(len(rollout) for rollout in rollouts)
        missing = sum(int(rollout.rewards.isnan().sum()) for rollout in rollouts)
        self.shares = [*self.shares, missing / count][-self.settings.window :]
        if sum(self.shares) > self.settings.max_share * self.settings.window:
            raise TooManyMissing(
                f"of the rewards of the last {len(self.shares)} iterations "
                f"{sum(self.shares) / len(self.shares):.0%} are not available, most of the last ones because: "
                f"{commonest_reason(rollouts) or 'no reason was given'}; mend the reward and --resume, or raise "
                "--missing.max-share"
            )

    def state_dict(self) -> dict[str, Any]:
        """The shares, as JSON."""
        return {"shares": list(self.shares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.shares = [float(share) for share in state["shares"]]
