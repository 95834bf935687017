"""What evaluations count as success, and how people are told of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

STRICT = "strict"
REWARD = "reward"
"""What an evaluation counts as success where the reward has no component of that name."""


@dataclass(frozen=True)
class Measure:
    """A component that evaluations count as success: a share of prompts, or a reward on whatever scale it has.

    Attributes:
        success: the component's name, or ``REWARD``.
    """

    success: str = STRICT

    @property
    def name(self) -> str:
        """In words: "strict" is "strict success"."""
        known = {STRICT: "strict success", REWARD: "mean reward"}
        return known.get(self.success, self.success.replace("_", " "))

    @property
    def is_share(self) -> bool:
        """Whether it is told in percent."""
        return self.success != REWARD

    @property
    def factor(self) -> float:
        """From a value to what is told."""
        return 100.0 if self.is_share else 1.0

    @property
    def axis(self) -> str:
        """Its name with its unit."""
        return f"{self.name}, %" if self.is_share else self.name

    def told(self, value: float, sign: str = "") -> str:
        """A value, or with the sign "+" a difference, without its unit; a dash where it is not known."""
        if math.isnan(value):
            return "–"
        digits = 1 if self.is_share else 3
        # Adding 0 keeps what rounds to 0 from being shown as -0.0.
        return f"{round(self.factor * value, digits) + 0.0:{sign}.{digits}f}"
