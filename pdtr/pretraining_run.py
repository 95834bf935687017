"""The loop of pre-training's stages: batches by the cycle, one optimiser step; held-out losses, checkpoints, a log.

Every draw is seeded by (seed, stage, step) or belongs to the data source, whose position is in the checkpoint: a run
that was stopped goes on to the same bits as one that was not. One process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.policies.base import FlowPolicy
from agents.samplers import derive_seed
from envs.scenes.pretraining import SupervisedBatch
from pdtr import checkpoint
from pdtr.optimizers import muon_and_adamw, optimizers_state, restore_optimizers, step_all
from pdtr.pretraining_data import BatchSource
from pdtr.pretraining_objective import flow_matching_loss, set_size, trained_modules
from pdtr.pretraining_stages import StageConfig, learning_rate_scale

LOG = "losses.jsonl"
_EVALUATED_AT_ONCE = 64


@dataclass
class StageRun:
    """One stage of one policy.

    Attributes:
        config: see :class:`StageConfig`.
        policy: with float32 weights where they are trained.
        source: training batches of the cycle's tasks.
        held_out: a fixed batch a task, for the losses in the log.
        step: optimiser steps done.
        seconds: spent on them, over all sittings.

    Raises:
        ValueError: the policy lacks what the stage trains, or holds it in less than float32.
    """

    config: StageConfig
    policy: FlowPolicy
    source: BatchSource
    held_out: Mapping[str, SupervisedBatch] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.modules = trained_modules(self.policy, self.config.stage)
        self.image_size = self.policy.image_size
        self.policy.transformer.requires_grad_(False)
        for module in self.modules.values():
            module.requires_grad_(True)
        self.parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]
        low = next((p.dtype for p in self.parameters if p.dtype != torch.float32), None)
        if low is not None:
            raise ValueError(
                f"policy: expected float32 weights where they are trained, got {low}, in which small updates are lost; "
                "load it with float32_weights"
            )
        self.optimizers = self._make_optimizers()
        self._peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, the last, and Muon before it if it is asked for."""
        config = self.config
        rates: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
        if not config.muon_learning_rate:
            return [torch.optim.AdamW(self.parameters, weight_decay=config.weight_decay, **rates)]
        named = (item for module in self.modules.values() for item in module.named_parameters())
        return muon_and_adamw(named, config.muon_learning_rate, weight_decay=config.weight_decay, **rates)

    def steps(self) -> Iterator[dict[str, float]]:
        """Optimise to the end; yields each step's mean loss by task."""
        while self.step < self.config.num_steps:
            started = time.monotonic()
            losses = self._accumulate()
            nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            step_all(self.optimizers, self._peaks, learning_rate_scale(self.config, self.step))
            self.step += 1
            self.seconds += time.monotonic() - started
            yield losses

    def _accumulate(self) -> dict[str, float]:
        """Gradients of the mean loss over ``global_batch_size`` examples, drawn in whole cycles."""
        wanted, seen = self.config.global_batch_size, 0
        losses: dict[str, list[float]] = {task: [] for task in self.config.cycle}
        draw = 0
        while seen < wanted:
            for task in self.config.cycle:
                batch = self.source.next_batch(task)
                loss = self._loss(self.config, task, batch, ("train", self.step, draw))
                (loss * (len(batch.texts) / wanted)).backward()  # type: ignore[no-untyped-call]
                losses[task].append(loss.item())
                seen, draw = seen + len(batch.texts), draw + 1
        if seen != wanted:
            raise ValueError(
                f"global_batch_size: expected whole cycles of {self.config.cycle}, got {wanted} where the source's "
                f"batches add up to {seen}; give the one or the other another size"
            )
        return {task: float(np.mean(values)) for task, values in losses.items()}

    def _loss(self, config: StageConfig, task: str, batch: SupervisedBatch, seed: tuple[int | str, ...]) -> Tensor:
        number = derive_seed(config.seed, config.stage, *seed)
        # A VAE or an encoder that draws from torch's own generator draws the same after a restart.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            return flow_matching_loss(config, self.policy, task, batch, torch.Generator().manual_seed(number))

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

    def save(self) -> Path:
        """Write everything that the run's continuation depends on."""
        tensors = {f"{name}.{k}": v for name, module in self.modules.items() for k, v in module.state_dict().items()}
        state, content = optimizers_state(self.optimizers)
        content |= {
            "kind": "pretraining",
            "stage": self.config.stage,
            "step": self.step,
            "seconds": self.seconds,
            "data": self.source.state_dict(),
        }
        path = self.config.output_dir / checkpoint.checkpoint_name(self.step)
        checkpoint.save_state(path, tensors | state, content)
        checkpoint.prune(self.config.output_dir, self.config.keep_checkpoints)
        return path

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is another stage's, or of other optimisers.
        """
        tensors, meta = checkpoint.load_state(path)
        if meta.get("stage") != self.config.stage:
            raise ValueError(f"{path}: expected stage {self.config.stage}'s checkpoint, got {meta.get('stage')}'s")
        for name, module in self.modules.items():
            module.load_state_dict(_under(tensors, f"{name}."))
        restore_optimizers(self.optimizers, tensors, meta)
        self.source.load_state_dict(meta["data"])
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])


def pretrain_stage(run: StageRun, resume: bool = False, report: Callable[[str], None] = print) -> Path:
    """Run a stage to its end, checkpoint and log as it goes, and save the policy under ``output_dir / "policy"``.

    Args:
        run: the stage.
        resume: go on from the last checkpoint in ``output_dir``, if there is one.
        report: where lines of progress go.

    Returns:
        The folder of the policy.

    Raises:
        ValueError: the folder holds a run and ``resume`` is not asked for.
    """
    config, folder = run.config, run.config.output_dir
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    last = checkpoint.latest(folder)
    if last is not None and not resume:
        raise ValueError(f"{folder}: expected a new folder, got one with {last.name}; resume it, or choose another")
    if last is not None:
        run.restore(last)
        report(f"resumed at step {run.step} from {last}")
    folder.mkdir(parents=True, exist_ok=True)
    _cut_log(folder / LOG, run.step)
    for losses in run.steps():
        is_last = run.step == config.num_steps
        if run.step % config.evaluate_every == 0 or is_last:
            report(_log(run, losses))
        if run.step % config.checkpoint_every == 0 or is_last:
            run.save()
    # Batches may be of other sizes; the policy is saved at the one that it came with.
    set_size(run.policy, run.image_size)
    run.policy.save(folder / "policy")
    return folder / "policy"


def _log(run: StageRun, losses: Mapping[str, float]) -> str:
    """Add a line to the log; -> the same to read."""
    held_out = run.held_out_losses()
    rate = run.optimizers[-1].param_groups[0]["lr"]
    row: dict[str, Any] = {"step": run.step, "seconds": run.seconds, "learning_rate": rate}
    row |= {"loss": dict(losses), "held_out": held_out}
    with (run.config.output_dir / LOG).open("a") as file:
        file.write(json.dumps(row) + "\n")
    each = run.seconds / run.step
    said = "  ".join(f"{task} {value:.4f}" for task, value in losses.items())
    told = "  ".join(f"{task} {value:.4f}" for task, value in held_out.items())
    left = (run.config.num_steps - run.step) * each / 60
    return (
        f"stage {run.config.stage} step {run.step}  {said}  held-out {told}  {each:.2f} s a step, {left:.0f} min left"
    )


def _cut_log(path: Path, step: int) -> None:
    """Leave out what a run logged after the checkpoint that it goes on from."""
    if path.is_file():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))


def _parts(batch: SupervisedBatch) -> Iterator[SupervisedBatch]:
    for start in range(0, len(batch.texts), _EVALUATED_AT_ONCE):
        part = slice(start, start + _EVALUATED_AT_ONCE)
        sources = None if batch.sources is None else batch.sources[part]
        yield SupervisedBatch(batch.texts[part], batch.targets[part], sources)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
