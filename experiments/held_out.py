"""``pdtr eval``: held-out strict success of a saved policy, skill by skill, with Wilson intervals."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from experiments.flags import Usage, parse

if TYPE_CHECKING:
    from pdtr.evaluate import Evaluation
    from pdtr.tasks import Task

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class EvalOptions:
    """Measure a policy on held-out prompts: strict success of each skill with 95 % Wilson intervals.

    The prompts and the noise are those of a run's final evaluations, so that the numbers compare.

    Attributes:
        folder: of a run or of a policy; the base that ships with the package when left out.
        task: which of the two tasks.
        num_prompts: held-out prompts a task.
        prompts: a .jsonl file of prompts with metadata to use in their place; it settles the task too.
        guidance_scale: classifier-free guidance, 1 is none; that of the run's evaluation when left out.
        num_inference_steps: denoising steps; those of the run's evaluation when left out.
        shift: of the sigma schedule, above 1 puts more steps at high noise; that of the run's evaluation when left out.
        chunk_size: images drawn at once.
        num_threads: torch threads.
        output: a JSON file for the numbers, prompt by prompt.
    """

    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = None
    task: Literal["t2i", "edit", "both"] = "both"
    num_prompts: int = 600
    prompts: Path | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    shift: float | None = None
    chunk_size: int = 60
    num_threads: int = 2
    output: Path | None = None

    def __post_init__(self) -> None:
        if min(self.num_prompts, self.chunk_size, self.num_threads) < 1:
            raise ValueError(
                "num_prompts, chunk_size and num_threads: expected 1 or more, got "
                f"{self.num_prompts}, {self.chunk_size} and {self.num_threads}"
            )


@dataclass(frozen=True)
class Row:
    """Success on some prompts.

    Attributes:
        skill: theirs; "all" for all of them.
        count: how many could be judged.
        strict: share of successes, NaN where none could be judged.
        low: lower end of the 95 % Wilson interval.
        high: upper end.
    """

    skill: str
    count: int
    strict: float
    low: float
    high: float


def evaluate(arguments: Sequence[str]) -> None:
    """``pdtr eval [FOLDER] [--flags]``: print the table, and write the JSON file where one is asked for.

    Raises:
        ValueError: a bad value, or a folder or file that is not what it should be.
        OSError: a file cannot be read or written.
    """
    options = parse(EvalOptions(), Usage("pdtr eval"), arguments)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    import torch

    from pdtr.evaluate import evaluate as run
    from pdtr.sampling import evaluation_sampler, load_policy, policy_folder

    folder = policy_folder(options.folder)
    sampler = evaluation_sampler(
        options.folder,
        guidance_scale=options.guidance_scale,
        num_inference_steps=options.num_inference_steps,
        shift=options.shift,
    )
    policy = load_policy(folder)
    torch.set_num_threads(options.num_threads)
    results: dict[str, Any] = {}
    for task in _tasks(options):
        print(f"drawing {len(task.final)} images for {task.name} ...", file=sys.stderr, flush=True)
        envs = task.make_envs(min(options.chunk_size, len(task.final)), is_evaluation=True)
        with torch.no_grad():
            found = run(policy, envs, task.final, sampler, success=task.success)
        rows = success_rows(found)
        print(format_rows(task.name, rows, missing=int(np.isnan(found.strict).sum())), flush=True)
        results[task.name] = _as_json(found, rows)
    if options.output is not None:
        content = {"policy": str(folder), "sampler": asdict(sampler), "confidence": _CONFIDENCE, "tasks": results}
        _write(options.output, json.dumps(content, indent=1) + "\n")
        print(f"numbers: {options.output}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        # A write that fails, unlike an opening that does, does not say where.
        error.filename = error.filename or str(path)
        raise


def success_rows(found: Evaluation) -> list[Row]:
    """Each skill's success in order of first appearance, then that of all; what could not be judged is left out."""
    skills = np.array(found.skills)
    masks = {skill: skills == skill for skill in dict.fromkeys(found.skills)}
    masks["all"] = np.ones(len(skills), bool)
    return [_row(skill or "-", found.strict[mask]) for skill, mask in masks.items()]


def format_rows(task: str, rows: Sequence[Row], missing: int) -> str:
    """A table in plain text."""
    width = max(len(row.skill) for row in rows)
    lines = [f"{task}: held-out strict success, {_CONFIDENCE:.0%} Wilson interval"]
    for row in rows:
        share = f"{row.strict:7.1%}  [{row.low:6.1%}, {row.high:6.1%}]" if row.count else f"{'-':>7}  {'':16}"
        lines.append(f"  {row.skill:<{width}}  {share}  n={row.count}")
    return "\n".join([*lines, f"  {missing} could not be judged"] if missing else lines)


def _row(skill: str, strict: NDArray[np.float32]) -> Row:
    from pdtr.statistics import wilson_interval

    judged = strict[~np.isnan(strict)]
    if len(judged) == 0:
        return Row(skill, 0, float("nan"), float("nan"), float("nan"))
    successes = int((judged > 0.5).sum())
    interval = wilson_interval(successes, len(judged), _CONFIDENCE)
    return Row(skill, len(judged), interval.value, interval.low, interval.high)


def _tasks(options: EvalOptions) -> list[Task]:
    from pdtr.config import EvaluationConfig
    from pdtr.tasks import scenes_tasks

    # Final prompts leave the tuning ones out, so as many of those are named as a run has.
    tasks = scenes_tasks(EvaluationConfig().num_prompts, options.num_prompts)
    if options.prompts is None:
        return [task for name, task in tasks.items() if options.task in (name, "both")]
    from envs.prompts import load_prompts

    loaded = load_prompts(options.prompts)
    if loaded.problems:
        raise ValueError(f"{options.prompts}: {len(loaded.problems)} bad rows, the first: {loaded.problems[0]}")
    name = "edit" if loaded.prompts[0].source_images else "t2i"
    if options.task not in (name, "both"):
        raise ValueError(f"prompts: expected prompts for {options.task}, got a file for {name}; leave --task out")
    return [replace(tasks[name], final=loaded.prompts[: options.num_prompts])]


def _as_json(found: Evaluation, rows: Sequence[Row]) -> dict[str, Any]:
    """JSON has no NaN: what could not be judged is null."""

    def plain(values: NDArray[np.float32]) -> list[float | None]:
        return [None if np.isnan(value) else float(value) for value in values]

    by_skill = {row.skill: {k: v for k, v in asdict(row).items() if k != "skill" and v == v} for row in rows}
    details = {"ids": list(found.ids), "skills": list(found.skills)}
    return {"success": by_skill, **details, "strict": plain(found.strict), "reward": plain(found.reward)}
