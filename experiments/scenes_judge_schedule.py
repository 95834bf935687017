"""The optimisers of the digit judge's training, and how their rates rise and fall."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pdtr.optimizers import muon_and_adamw, step_all

_WARMUP_SHARE = 0.03


@dataclass(frozen=True)
class Rates:
    """How fast is learnt.

    Attributes:
        learning_rate: peak, of Muon for the matrices of the blocks.
        other_learning_rate: peak, of AdamW for the rest.
        batch_size: edits of a step.
        seed: of the data's order.
        decay_share: the last share of the steps, over which the rates fall.
        rendered_share: of a step's edits that are rendered.
    """

    learning_rate: float = 4e-3
    other_learning_rate: float = 1e-3
    batch_size: int = 48
    seed: int = 0
    decay_share: float = 0.5
    rendered_share: float = 0.75

    @property
    def num_rendered(self) -> int:
        """Rendered edits of a step: one at least, and one fewer than all at most."""
        return min(max(1, round(self.rendered_share * self.batch_size)), self.batch_size - 1)


class Schedule:
    """Muon for the matrices of the blocks, AdamW for the rest; a warm-up, and a linear decay at the end.

    Args:
        modules: whose parameters are trained.
        rates: peaks.
        num_steps: after which the rates are near 0.
    """

    def __init__(self, modules: Sequence[nn.Module], rates: Rates, num_steps: int) -> None:
        named = [entry for module in modules for entry in module.named_parameters() if entry[1].requires_grad]
        self._parameters = [p for _, p in named]
        adamw = {"lr": rates.other_learning_rate, "betas": (0.9, 0.98), "weight_decay": 0.0}
        self._optimizers = muon_and_adamw(named, rates.learning_rate, **adamw)
        self._peaks = [float(optimizer.param_groups[0]["lr"]) for optimizer in self._optimizers]
        self._num_steps = num_steps
        self._decay_share = rates.decay_share
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._started

    def step(self, step: int, loss: Tensor) -> None:
        """Follow the gradient of a loss.

        Raises:
            ValueError: the loss is no number.
        """
        if not math.isfinite(float(loss.detach())):
            raise ValueError("learning_rate: expected one that the model can bear, got a loss that is no number")
        loss.backward()  # type: ignore[no-untyped-call]
        share = step / self._num_steps
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        scale = min(1.0, share / _WARMUP_SHARE + 0.02, (1 - share) / self._decay_share + 0.01)
        step_all(self._optimizers, self._peaks, scale)
