"""``pdtr pretrain``: the embedded world's base policy, or a stage of UniPic 2.0's pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.arguments import how_to_go_on, leading_name
from experiments.flags import Usage, parse_run
from pdtr.processes import finish, is_first, num_processes

if TYPE_CHECKING:
    from rich.progress import Progress


def pretrain(arguments: Sequence[str]) -> None:
    """``pdtr pretrain scenes|stage-a|stage-b|stage-c [--resume] [--flags]``: pre-train, print the policy's folder.

    Raises:
        ValueError: an unknown name or flag, or a bad value.
        KeyboardInterrupt: stopped; its text says how to go on.
    """
    name, flags = leading_name(arguments, "")
    kinds = {"scenes": _pretrain_scenes, **dict.fromkeys(("stage-a", "stage-b", "stage-c"), _pretrain_stage)}
    if not name and not {"-h", "--help"}.isdisjoint(flags):
        print(
            "usage: pdtr pretrain scenes|stage-a|stage-b|stage-c [--resume] [--flags]\n\n"
            "scenes makes the embedded world's base policy; the stages are UniPic 2.0's, for published models.\n"
            "pdtr pretrain NAME --help lists the flags of each."
        )
        return
    if name not in kinds:
        near = get_close_matches(name, kinds, 1, cutoff=0.0)[0] if name else "scenes"
        raise ValueError(
            f"expected what to pre-train, one of {', '.join(kinds)}, got {name or 'none'}; type: pdtr pretrain {near}"
        )
    if name == "scenes" and num_processes() > 1:
        raise ValueError(f"pretrain scenes: expected one process, got {num_processes()}; the stages can be shared")
    try:
        folder = kinds[name](name, flags)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(["pretrain", name, *flags], started=True)) from None
    finish()
    if is_first():
        print(f"policy: {folder}")


def _pretrain_scenes(name: str, flags: Sequence[str]) -> Path:
    from pdtr.pretraining import PretrainConfig
    from pdtr.pretraining import pretrain as run

    config, resume = parse_run(PretrainConfig(), Usage(f"pdtr pretrain {name}"), flags)
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise ValueError(f"{config.output_dir}: expected a folder, got a file; choose another --output-dir")
    with _bar() as bar:
        task = bar.add_task("pre-training", total=config.num_steps, loss=float("nan"))

        def on_step(steps_done: int, loss: float) -> None:
            bar.update(task, completed=steps_done, loss=loss)

        return run(config, resume, bar.console.print, on_step)


def _pretrain_stage(name: str, flags: Sequence[str]) -> Path:
    from experiments.pretrain_checks import check
    from experiments.pretrain_stage import STAGES, published, run_stage

    letter = STAGES[name]
    options, resume = parse_run(published(letter), Usage(f"pdtr pretrain {name}"), flags)
    if options.stage.stage != letter:
        raise ValueError(
            f"--stage.stage: expected {letter}, which {name} is, got {options.stage.stage}; "
            f"type: pdtr pretrain stage-{options.stage.stage.lower()}"
        )
    check(options, resume)
    with _bar(is_shown=is_first()) as bar:
        task = bar.add_task(f"stage {letter}", total=options.stage.num_steps, loss=float("nan"))

        def on_step(steps_done: int, losses: Mapping[str, float]) -> None:
            bar.update(task, completed=steps_done, loss=sum(losses.values()) / len(losses))

        return run_stage(options, resume, bar.console.print, on_step)


def _bar(is_shown: bool = True) -> Progress:
    """A bar with the time left and the loss; lines printed to its console scroll by above it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        disable=not is_shown,
    )
