"""Rewards that are not available: what they mask, and when a run gives up on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from agents.functional import check_choice
from pdtr.run_settings import MAY_CHANGE

if TYPE_CHECKING:
    from agents.types import Rollout

OnMissing = Literal["drop_sample", "drop_group", "raise"]


@dataclass(frozen=True)
class MissingSettings:
    """What follows from a reward that is not available (NaN).

    Attributes:
        on_missing: "drop_sample": the sample teaches nothing and the others of its group are compared without it;
            "drop_group": the whole group teaches nothing; "raise": the run stops at once.
        max_share: the run stops once the missing rewards of a task in its last ``window`` iterations are more than this
            share of a whole window's: half a judge's answers are another reward than the one that was asked for.
        window: iterations that are counted together, of each task those that practise it.
    """

    on_missing: OnMissing = "drop_sample"
    max_share: float = field(default=0.5, metadata=MAY_CHANGE)
    window: int = field(default=10, metadata=MAY_CHANGE)

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
    """The shares of missing rewards in each task's last iterations; a part of a run's state.

    Tasks are counted apart: where one judge of two is dead, the other's answers do not make up for it.

    Args:
        settings: see :class:`MissingSettings`.
    """

    settings: MissingSettings
    shares: dict[str, list[float]] = field(default_factory=dict, init=False)

    def observe(self, rollouts: Mapping[str, Rollout]) -> None:
        """Count one iteration.

        Args:
            rollouts: of the tasks that it practises, by name.

        Raises:
            TooManyMissing: the missing rewards of a task's window are too many, be it that the window is not over yet.
        """
        settings = self.settings
        for task, rollout in rollouts.items():
            share = int(rollout.rewards.isnan().sum()) / len(rollout)
            self.shares[task] = shares = [*self.shares.get(task, ()), share][-settings.window :]
            if sum(shares) > settings.max_share * settings.window:
                raise TooManyMissing(
                    f"{task}: of the rewards of its last {len(shares)} iterations {sum(shares) / len(shares):.0%} are "
                    f"not available, most of the last ones because: "
                    f"{commonest_reason([rollout]) or 'no reason was given'}; mend the reward and --resume, or raise "
                    "--missing.max-share"
                )

    def state_dict(self) -> dict[str, Any]:
        """The shares by task, as JSON."""
        return {"shares": {task: list(shares) for task, shares in self.shares.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of a longer window too.

        Checkpoints of earlier versions have the shares of all tasks together, of which nothing follows for one: tasks
        are counted anew then.
        """
        found = state["shares"] if isinstance(state["shares"], Mapping) else {}
        self.shares = {
            task: [float(share) for share in shares][-self.settings.window :] for task, shares in found.items()
        }
