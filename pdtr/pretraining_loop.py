"""A stage of pre-training from its first or a later step to its end: checkpoints, a log, the policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pdtr import checkpoint
from pdtr.logbook import json_line
from pdtr.pretraining_run import StageRun, described
from pdtr.pretraining_state import restore_stage, save_policy, save_stage

LOG = "losses.jsonl"


def pretrain_stage(
    run: StageRun,
    resume: bool = False,
    report: Callable[[str], None] = print,
    on_step: Callable[[int, Mapping[str, float]], None] = lambda step, losses: None,
) -> Path:
    """Run a stage to its end, checkpoint and log as it goes, and save the policy under ``output_dir / "policy"``.

    Args:
        run: the stage.
        resume: go on from the last checkpoint in ``output_dir``, if there is one.
        report: where lines of progress go, in the first process.
        on_step: told of every step: how many are done, and the losses by task.

    Returns:
        The folder of the policy.

    Raises:
        ValueError: the folder holds a run and ``resume`` is not asked for.
    """
    config, folder, processes = run.config, run.config.output_dir, run.processes
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    last = processes.agree(lambda: str(checkpoint.latest(folder) or ""))
    if last and not resume:
        raise ValueError(
            f"{folder}: expected a new folder, got one with {Path(last).name}; resume it, or choose another"
        )
    if last:
        restore_stage(run, Path(last))
    if processes.is_first:
        if last:
            report(f"resumed at step {run.step} from {last}")
        folder.mkdir(parents=True, exist_ok=True)
        _cut_log(folder / LOG, run.step)
    _try_largest(run, report)
    for losses in run.steps():
        on_step(run.step, losses)
        is_last = run.step == config.num_steps
        if run.step % config.evaluate_every == 0 or is_last:
            # Collective, where weights are cut up.
            held_out = run.held_out_losses()
            if processes.is_first:
                report(_log(run, losses, held_out))
        if run.step % config.checkpoint_every == 0 or is_last:
            save_stage(run)
    save_policy(run, folder / "policy")
    return folder / "policy"


def _try_largest(run: StageRun, report: Callable[[str], None]) -> None:
    """Before the first step of a sitting, whether memory holds what comes when resolutions have grown."""
    if not run.largest or run.step == run.config.num_steps:
        return
    run.try_largest()
    if run.processes.is_first:
        sizes = " and ".join(described(*item) for item in run.largest.items())
        report(f"memory holds the largest batches: {sizes}")


def _log(run: StageRun, losses: Mapping[str, float], held_out: Mapping[str, float]) -> str:
    """Add a line to the log; -> the same to read."""
    rate = run.optimizers[-1].param_groups[0]["lr"]
    row: dict[str, Any] = {"step": run.step, "seconds": run.seconds, "learning_rate": rate}
    row |= {"loss": dict(losses), "held_out": dict(held_out), "skipped_updates": run.num_skipped}
    with (run.config.output_dir / LOG).open("a") as file:
        file.write(json_line(row) + "\n")
    each = run.seconds / run.step
    said = "  ".join(f"{task} {value:.4f}" for task, value in losses.items())
    told = "  ".join(f"{task} {value:.4f}" for task, value in held_out.items())
    left = (run.config.num_steps - run.step) * each / 60
    skipped = f"  skipped {run.num_skipped}" if run.num_skipped else ""
    return (
        f"stage {run.config.stage} step {run.step}  {said}  held-out {told}{skipped}  {each:.2f} s a step, "
        f"{left:.0f} min left"
    )


def _cut_log(path: Path, step: int) -> None:
    """Leave out what a run logged after the checkpoint that it goes on from."""
    if path.is_file():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))
