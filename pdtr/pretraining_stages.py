"""UniPic 2.0's three stages of pre-training (arXiv:2509.04548, sections 3.1 and 4.1): what each trains, and how.

| stage | trained | from | published |
|---|---|---|---|
| A | queries, projectors, connector; text-to-image only | SD3.5, frozen | 500,000 steps of 1,024, rate 1e-4 |
| B | the transformer, prompted by SD3's own text encoders; both tasks | SD3.5 | 200,000 steps of 128, rate 4e-5 |
| C | connector and transformer; both tasks | A's connector, B's transformer | 200,000 steps of 128, rate 4e-5 |

The language model and the text encoders are frozen throughout. The objective is flow matching,
``|v(x_sigma, sigma, c) - (noise - x_0)|^2``. The loss is in ``pdtr.pretraining_objective``, the steps
are in ``pdtr.pretraining_run``, the loop is in ``pdtr.pretraining_loop``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pdtr.run_settings import MAY_CHANGE

Stage = Literal["A", "B", "C"]
SigmaLaw = Literal["uniform", "logit_normal"]
# The first rate of the warm-up, as a share of the peak: OpenUni's and DeepGen's trainers have it so.
_FIRST_RATE = 1e-5


@dataclass(frozen=True)
class StageConfig:
    """One stage of pre-training. Published: the report states it; inferred: OpenUni's and DeepGen's trainers do it.

    Attributes:
        stage: which modules are trained, see the module's table.
        output_dir: where checkpoints, the log and the final policy go.
        num_steps: optimiser steps; published.
        learning_rate: AdamW's peak; published.
        global_batch_size: examples of an optimiser step, over the whole cycle; published.
        cycle: tasks in the order in which their batches alternate; every optimiser step sees whole cycles, and so every
            task. That they alternate is published, how often is not: DeepGen has an edit to two or three others.
        betas: AdamW's; published.
        eps: AdamW's; published.
        weight_decay: AdamW's, of everything; published.
        muon_learning_rate: peak of Muon's for the matrices of blocks, which a small model learns from faster; 0 leaves
            them to AdamW, as published.
        warmup_share: of the steps, over which the rate rises linearly; inferred. A cosine to 0 follows; published.
        max_grad_norm: gradients are clipped to it; inferred.
        sigma_law: of the training times, before the shift; inferred.
        sigma_shift: SD3's shift of them; inferred, from a schedule that is itself inferred.
        text_dropout: chance of an empty prompt in text-to-image, for guidance; inferred.
        edit_text_dropout: chance of an empty instruction; inferred to be none, for guidance has a sentence of faults
            there.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many are kept.
        evaluate_every: steps between held-out losses.
        num_threads: torch threads; 0 leaves them.
        sum_gradients_once: where weights are cut up over processes, gradients are summed after the last batch of a
            step and not after each: fewer messages, for a whole gradient in every process (9 GB for SD3.5-Medium).
        seed: of sigmas, noise and dropout; the data have their own.
    """

    stage: Stage = "A"
    output_dir: Path = field(default=Path("runs/pretraining"), metadata=MAY_CHANGE)
    num_steps: int = 500_000
    learning_rate: float = 1e-4
    global_batch_size: int = 1024
    cycle: tuple[str, ...] = ("t2i",)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    muon_learning_rate: float = 0.0
    warmup_share: float = 0.01
    max_grad_norm: float = 1.0
    sigma_law: SigmaLaw = "uniform"
    sigma_shift: float = 3.0
    text_dropout: float = 0.1
    edit_text_dropout: float = 0.0
    checkpoint_every: int = field(default=1000, metadata=MAY_CHANGE)
    keep_checkpoints: int = field(default=2, metadata=MAY_CHANGE)
    evaluate_every: int = field(default=1000, metadata=MAY_CHANGE)
    num_threads: int = field(default=0, metadata=MAY_CHANGE)
    sum_gradients_once: bool = field(default=False, metadata=MAY_CHANGE)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stage not in get_args(Stage):
            raise ValueError(f"stage: expected one of {', '.join(get_args(Stage))}, got {self.stage!r}")
        if self.sigma_law not in get_args(SigmaLaw):
            raise ValueError(f"sigma_law: expected one of {', '.join(get_args(SigmaLaw))}, got {self.sigma_law!r}")
        counts = ("num_steps", "global_batch_size", "checkpoint_every", "keep_checkpoints", "evaluate_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("warmup_share", "text_dropout", "edit_text_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share of at least 0 and below 1, got {getattr(self, name)}")
        rates = (self.learning_rate, self.max_grad_norm, self.muon_learning_rate)
        if not (rates[0] > 0 and rates[1] > 0 and rates[2] >= 0):
            raise ValueError(
                "learning_rate, max_grad_norm, muon_learning_rate: expected two numbers above 0 and one of at least 0, "
                f"got {rates}"
            )
        if not self.cycle or set(self.cycle) - {"t2i", "edit"}:
            raise ValueError(f"cycle: expected 't2i' and 'edit' in turn, got {self.cycle}")
        if self.stage == "A" and "edit" in self.cycle:
            raise ValueError("cycle: expected only 't2i' in stage A, whose transformer has never seen a reference")

    def settings(self) -> dict[str, Any]:
        """What comes of a run depends on these, as JSON; the others may be changed when it goes on."""
        kept = {entry.name for entry in fields(self) if not entry.metadata.get("may_change")}
        everything = json.loads(json.dumps(asdict(self), default=str))
        return {name: value for name, value in everything.items() if name in kept}


PUBLISHED: Mapping[Stage, StageConfig] = {
    "A": StageConfig("A", num_steps=500_000, learning_rate=1e-4, global_batch_size=1024, cycle=("t2i",)),
    "B": StageConfig("B", num_steps=200_000, learning_rate=4e-5, global_batch_size=128, cycle=("edit", "t2i")),
    "C": StageConfig("C", num_steps=200_000, learning_rate=4e-5, global_batch_size=128, cycle=("edit", "t2i")),
}
"""Numbers of section 4.1; the cycle of one to one is ours, its ratio is not stated.

How pictures are sampled is the data source's: the report states balanced aspect ratios and growing resolutions, and no
numbers of either. ``pdtr pretrain stage-a|b|c`` balances, and begins with half of the steps at 256, which is ours.
"""


def learning_rate_scale(config: StageConfig, step: int) -> float:
    """The learning rate's share of its peak at a step, counted from 0.

    ``1e-5 + (1 - 1e-5) step / W`` in the W steps of warm-up, then ``(1 + cos(pi (step - W) / (N - W))) / 2``.
    """
    warmup = round(config.warmup_share * config.num_steps)
    if step < warmup:
        return _FIRST_RATE + (1 - _FIRST_RATE) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.num_steps - warmup)))
