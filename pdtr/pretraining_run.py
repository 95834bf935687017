"""One stage of pre-training: batches by the cycle, optimiser steps, held-out losses, checkpoints.

Every draw is seeded by (seed, stage, step, batch) or belongs to the data source, whose position is in the checkpoint: a
run that was stopped goes on to the same bits as one that was not. Several processes share a step's batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.loss_scale import LossScale
from agents.policies.base import FlowPolicy
from agents.policies.sharding import clip_gradients, shard, sum_after_backward
from agents.processes import ALONE, Processes
from agents.samplers import derive_seed
from envs.scenes.pretraining import SupervisedBatch
from pdtr.optimizers import muon_and_adamw, step_all
from pdtr.pretraining_data import BatchSource
from pdtr.pretraining_objective import flow_matching_loss, set_size, trained_modules
from pdtr.pretraining_stages import StageConfig, learning_rate_scale

_EVALUATED_AT_ONCE = 64
# Steps left out in a row after which nothing is to be hoped for: loss scaling finds its factor in fifteen.
_MOST_SKIPPED = 100


@dataclass
class StageRun:
    """One stage of one policy.

    Attributes:
        config: see :class:`StageConfig`.
        policy: with float32 weights where they are trained.
        source: training batches of the cycle's tasks; this process's share of them.
        held_out: a fixed batch a task, for the losses in the log.
        processes: those that share the stage. Each does as many cycles of a step; where weights are cut up over them,
            it is the transformer's, if it is trained, and the rest is everywhere.
        step: optimiser steps done, those left out for a gradient that was not finite among them.
        seconds: spent on them, over all sittings.
        num_skipped: how many were left out.
        largest: batches as large as those of a task get, where resolutions grow; see :meth:`try_largest`.

    Raises:
        ValueError: the policy lacks what the stage trains, or holds it in less than float32; or Muon, which needs whole
            matrices, is to train weights that are cut up.
    """

    config: StageConfig
    policy: FlowPolicy
    source: BatchSource
    held_out: Mapping[str, SupervisedBatch] = field(default_factory=dict)
    processes: Processes = ALONE
    step: int = 0
    seconds: float = 0.0
    num_skipped: int = 0
    largest: Mapping[str, SupervisedBatch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = trained_modules(self.policy, self.config.stage)
        self.image_size = self.policy.image_size
        self.is_cut = self.processes.is_sharded and "transformer" in self.modules
        if self.is_cut and self.config.muon_learning_rate:
            raise ValueError(
                "muon_learning_rate: expected 0 where weights are cut up over processes, as Muon needs whole matrices, "
                f"got {self.config.muon_learning_rate}; train with sharding 'none'"
            )
        self.policy.transformer.requires_grad_(False)
        for module in self.modules.values():
            module.requires_grad_(True)
        if self.is_cut:
            shard(self.policy.transformer)
        self.parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]
        low = next((p.dtype for p in self.parameters if p.dtype != torch.float32), None)
        if low is not None:
            raise ValueError(
                f"policy: expected float32 weights where they are trained, got {low}, in which small updates are lost; "
                "load it with float32_weights"
            )
        self.loss_scale = LossScale.of(self.policy.dtype)
        self.optimizers = self._make_optimizers()
        self._skipped_in_a_row = 0
        self._peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, the last, and Muon before it if it is asked for."""
        config = self.config
        rates: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
        if not config.muon_learning_rate:
            return [torch.optim.AdamW(self.parameters, weight_decay=config.weight_decay, foreach=self.foreach, **rates)]
        named = (item for module in self.modules.values() for item in module.named_parameters())
        return muon_and_adamw(named, config.muon_learning_rate, weight_decay=config.weight_decay, **rates)

    @property
    def foreach(self) -> bool | None:
        """One kernel for many tensors cannot take whole and cut ones together."""
        return False if self.is_cut and len(self.modules) > 1 else None

    def steps(self) -> Iterator[dict[str, float]]:
        """Optimise to the end; yields each step's mean loss by task."""
        while self.step < self.config.num_steps:
            started = time.monotonic()
            losses = self._accumulate()
            self._step()
            self.step += 1
            self.seconds += time.monotonic() - started
            yield losses

    def _step(self) -> None:
        """One optimiser step, left out where the gradient is not finite: the weights would be NaN from then on."""
        self.processes.sum_gradients(self.parameters)
        self.loss_scale.unscale(self.parameters)
        is_finite = bool(clip_gradients(self.parameters, self.config.max_grad_norm).isfinite())
        self.loss_scale.update(is_finite)
        if is_finite:
            self._skipped_in_a_row = 0
            step_all(self.optimizers, self._peaks, learning_rate_scale(self.config, self.step))
            return
        self.num_skipped, self._skipped_in_a_row = self.num_skipped + 1, self._skipped_in_a_row + 1
        for parameter in self.parameters:
            parameter.grad = None
        if self._skipped_in_a_row == _MOST_SKIPPED:
            raise ValueError(
                f"step {self.step}: expected finite gradients, got {_MOST_SKIPPED} in a row that were not; train in "
                "bfloat16 or float32, or at a lower learning_rate from the last checkpoint"
            )

    def _accumulate(self) -> dict[str, float]:
        """Gradients of the mean loss over ``global_batch_size`` examples, drawn in whole cycles."""
        cycle, count, wanted = self.config.cycle, self.processes.count, self.config.global_batch_size
        losses: dict[str, list[float]] = {task: [] for task in cycle}
        seen = turn = 0
        while seen < wanted:
            for place, task in enumerate(cycle):
                batch = self.source.next_batch(task)
                # Its number among all processes' batches, as one process would count them.
                number = (turn * count + self.processes.rank) * len(cycle) + place
                loss = self._loss(self.config, task, batch, ("train", self.step, number))
                seen += len(batch.texts) * count
                is_last = seen >= wanted and place == len(cycle) - 1
                sum_after_backward(self.policy.transformer, is_last or not self.config.sum_gradients_once)
                scaled = self.loss_scale.scaled(loss * (len(batch.texts) / wanted))
                scaled.backward()  # type: ignore[no-untyped-call]
                losses[task].append(loss.item())
            turn += 1
        if seen != wanted:
            among = f" of {count} processes" if count > 1 else ""
            raise ValueError(
                f"global_batch_size: expected whole cycles of {cycle}{among}, got {wanted} where the source's "
                f"batches add up to {seen}; give the one or the other another size"
            )
        return self.processes.mean(losses)

    def _loss(self, config: StageConfig, task: str, batch: SupervisedBatch, seed: tuple[int | str, ...]) -> Tensor:
        number = derive_seed(config.seed, config.stage, *seed)
        # A VAE or an encoder that draws from torch's own generator draws the same after a restart.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            return flow_matching_loss(config, self.policy, task, batch, torch.Generator().manual_seed(number))

    def try_largest(self) -> None:
        """Forward and backward passes of ``largest``, thrown away: whether memory holds what comes late in the stage.

        Weights, optimisers, the data's position and torch's generators stay as they are. All processes call it alike.

        Raises:
            ValueError: it does not.
        """
        device, size = self.policy.device, self.policy.image_size
        # What AdamW holds from its first step on.
        there = {parameter for optimizer in self.optimizers for parameter in optimizer.state}
        moments = [torch.empty_like(p) for p in self.parameters if p not in there for _ in range(2)]
        # Twice, for from the second batch on there are gradients beside the activations.
        batches = [item for _ in range(2) for item in self.largest.items()]
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                for number, (task, batch) in enumerate(batches, start=1):
                    is_last = number == len(batches)
                    sum_after_backward(self.policy.transformer, is_last or not self.config.sum_gradients_once)
                    loss = self.loss_scale.scaled(self._loss(self.config, task, batch, ("largest", number)))
                    loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--batches.batch-size: expected memory for the stage's largest batch, {described(task, batch)}, got "
                f"too little ({str(error).splitlines()[0]}); give a smaller one, or --batches.resolution.batch-sizes"
            ) from error
        finally:
            del moments
            for parameter in self.parameters:
                parameter.grad = None
            set_size(self.policy, size)
            if device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """The loss of each held-out batch, with its own sigmas and noise and no dropout."""
        config = replace(self.config, text_dropout=0.0, edit_text_dropout=0.0)
        found = {}
        for task, batch in self.held_out.items():
            parts = list(_parts(batch))
            losses = [self._loss(config, task, part, ("held out", index)) for index, part in enumerate(parts)]
            sizes = [len(part.texts) for part in parts]
            found[task] = float(np.average([loss.item() for loss in losses], weights=sizes))
        return found


def described(task: str, batch: SupervisedBatch) -> str:
    """A batch's size, to read."""
    count, height, width, _ = batch.targets.shape
    return f"{count} of {task} at {height} x {width}"


def _parts(batch: SupervisedBatch) -> Iterator[SupervisedBatch]:
    for start in range(0, len(batch.texts), _EVALUATED_AT_ONCE):
        part = slice(start, start + _EVALUATED_AT_ONCE)
        sources = None if batch.sources is None else batch.sources[part]
        yield SupervisedBatch(batch.texts[part], batch.targets[part], sources)
