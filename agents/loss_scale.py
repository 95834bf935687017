"""A factor of the loss under which float16 gradients neither vanish nor overflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# torch.amp.GradScaler's.
_FIRST, _PATIENCE = 2.0**16, 2000


@dataclass
class LossScale:
    """Dynamic loss scaling (arXiv:1710.03740): halved by a gradient that is not finite, doubled after 2000 that were.

    Powers of two, so that dividing gradients by it changes no digit of them. ``torch.amp.GradScaler`` does the same by
    what one process sees; here a gradient is finite where its norm over all processes is, whatever is cut up.

    Attributes:
        value: the factor; 1 for other dtypes than float16, always.
        num_finite: finite gradients in a row, since it last doubled.
    """

    value: float = 1.0
    num_finite: int = 0

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        """For forward passes in this dtype."""
        return cls(_FIRST if dtype == torch.float16 else 1.0)

    @property
    def is_dynamic(self) -> bool:
        """Whether there is anything to scale."""
        return self.value != 1.0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is taken."""
        return loss * self.value

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients of the loss itself, in place; parameters and so gradients are float32."""
        if self.is_dynamic:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.value)

    def update(self, is_finite: bool) -> None:
        """What the step's gradient, over all processes, says of the factor."""
        if not self.is_dynamic:
            return
        self.num_finite = self.num_finite + 1 if is_finite else 0
        if not is_finite:
            # Never 1: that would be for good.
            self.value = max(self.value / 2, 2.0)
        elif self.num_finite == _PATIENCE:
            self.value, self.num_finite = self.value * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"value": self.value, "num_finite": self.num_finite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, unless it is that of a run in another kind of dtype."""
        if (float(state["value"]) != 1.0) != self.is_dynamic:
            return
        self.value, self.num_finite = float(state["value"]), int(state["num_finite"])
