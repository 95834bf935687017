"""What can be said of a stage of pre-training before anything is loaded: folders, files, sizes of batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from envs.data.mixtures import record_sets
from pdtr.processes import num_processes

if TYPE_CHECKING:
    from experiments.pretrain_stage import StageOptions


def check(options: StageOptions, resume: bool) -> None:
    """What can be said before anything is read.

    Raises:
        ValueError: no model, no files for a task of the cycle or files for another, batches that do not add up to a
            step, or a folder that holds a run, or none where there should be one.
    """
    config = options.stage
    _check_folder(config.output_dir, resume)
    if options.model is None and options.generator is None:
        parts = "" if config.stage == "B" else ", or --generator and --lmm to put one together"
        raise ValueError(f"--model: expected a policy's folder to train{parts}, got none")
    for task in ("t2i", "edit"):
        files, held_out = getattr(options, task), getattr(options, f"held_out_{task}")
        cycle = f"stage {config.stage}'s cycle ({', '.join(config.cycle)})"
        if task in config.cycle and not files:
            raise ValueError(f"--{task}: expected files for {cycle}, got none")
        if task not in config.cycle and (files or held_out):
            raise ValueError(f"--{task}: expected no files, for {cycle} has no such task, got {(files or held_out)[0]}")
        if both := sorted(_named(files, options) & _named(held_out, options)):
            raise ValueError(f"--held-out-{task}: expected files that are not trained on, got {both[0]} in both")
    _check_sizes(options)


def _named(names: tuple[str, ...], options: StageOptions) -> set[str]:
    """The files and globs of a task, those of lists among them, which are read here."""
    return {name for entry in record_sets(names, options.image_root) for name in entry.files}


def _check_folder(folder: Path, resume: bool) -> None:
    from pdtr.checkpoint import latest

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, got a file; choose another --stage.output-dir")
    last = latest(folder)
    if last is not None and not resume:
        raise ValueError(
            f"{folder}: expected a new folder, got one with {last.name}; pass --resume, or another --stage.output-dir"
        )
    if last is None and resume:
        raise ValueError(f"{folder}: expected a run to resume, found no checkpoint; leave --resume out to start it")


def _check_sizes(options: StageOptions) -> None:
    """Whole cycles of all processes have to make up a step. What is published is the last thing to be changed."""
    config, count = options.stage, num_processes()
    total, together = config.global_batch_size, len(config.cycle) * count
    own = options.batches.resolution.batch_sizes
    flag = "--batches.resolution.batch-sizes" if own else "--batches.batch-size"
    sizes = own or (options.batches.batch_size,)
    if all(total % (size * together) == 0 for size in sizes):
        return
    each, rest = divmod(total, together)
    given = " ".join(map(str, sizes))
    if rest == 0:
        fits = (max(size for size in range(1, min(size, each) + 1) if each % size == 0) for size in sizes)
        fix = f"{flag} {' '.join(map(str, fits))} would do"
    else:
        fewer = max(number for number in range(1, count + 1) if total % (len(config.cycle) * number) == 0)
        near = max(1, round(total / together)) * together
        fix = f"no batch size would do with {count} processes: start {fewer}, or give --stage.global-batch-size {near}"
    raise ValueError(
        f"{flag}: expected sizes that times cycle x processes = {len(config.cycle)} x {count} = {together} divide "
        f"--stage.global-batch-size {total}, got {given}; {fix}"
    )
