"""What a run trains on: the world's own ground truth, or rewards that a recipe makes when its run starts.

A source is a frozen dataclass: its fields are flags of ``pdtr train``, stand in the run's ``config.json``, and are
checked when it is made. Servers are looked for, and models are loaded, once the run starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rewards.base import Reward


class RewardSource(Protocol):
    """Makes rewards for a run.

    A frozen dataclass: its fields are flags and stand in the run's ``config.json``. A run is resumed with the same
    values of them, but for fields that are marked ``field(..., metadata={"may_change": True})``, such as an address,
    and for those that an attribute ``unused_settings`` names, where the source has one: what is asked by nobody.
    """

    def make_rewards(self) -> Mapping[str, Reward]:
        """The rewards by task; a task without one is trained on its own, such as the embedded world's ground truth.

        A source may make each when it is asked for, so that one whose task names another reward to train on
        (``PromptFileTasks.edit_reward``) need not be there.

        Raises:
            ValueError: they cannot be made, such as where no server answers; what to do about it is said.
        """
        ...


@dataclass(frozen=True)
class GroundTruth:
    """The embedded world's own rewards, for both tasks."""

    def make_rewards(self) -> Mapping[str, Reward]:
        """None in place of the ground truth."""
        return {}
