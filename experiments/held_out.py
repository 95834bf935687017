"""``pdtr eval`` and ``pdtr eval scenes``: held-out strict success of a policy of the embedded world, by skill."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from experiments.eval_sharing import WAY_ON, shared
from experiments.flags import Usage, parse
from pdtr.benchmarks.scenes import NUM_PROMPTS

if TYPE_CHECKING:
    from agents.processes import Processes
    from pdtr.benchmarks.aggregate import Number
    from pdtr.benchmarks.base import Benchmark
    from pdtr.benchmarks.drawing import Artist
    from pdtr.benchmarks.results import Results
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
        device: torch's name of the device to draw on; the GPU where there is one, when left out.
        num_threads: torch threads.
        output: folder for images, scores and results, a folder a task in it; --compare takes two of them. Nothing is
            kept when left out.
    """

    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = None
    task: Literal["t2i", "edit", "both"] = "both"
    num_prompts: int = NUM_PROMPTS
    prompts: Path | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    shift: float | None = None
    chunk_size: int = 60
    device: str = ""
    num_threads: int = 2
    output: Path | None = None

    def __post_init__(self) -> None:
        if min(self.num_prompts, self.chunk_size, self.num_threads) < 1:
            raise ValueError(
                "num_prompts, chunk_size and num_threads: expected 1 or more, got "
                f"{self.num_prompts}, {self.chunk_size} and {self.num_threads}"
            )
        if self.output is not None and (self.output.suffix == ".json" or self.output.is_file()):
            raise ValueError(
                f"output: expected a folder, got the file {self.output}; type: --output {self.output.with_suffix('')}"
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
        error: the standard error, NaN where it cannot be said.
        failed: how many could not be judged.
    """

    skill: str
    count: int
    strict: float
    low: float
    high: float
    error: float
    failed: int


def evaluate(arguments: Sequence[str]) -> None:
    """``pdtr eval [FOLDER] [--flags]``: draw what is missing, score what is missing, and print a table a task.

    Raises:
        ValueError: a bad value, or a folder or file that is not what it should be.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: stopped; its text says how to go on, where what is done is kept.
    """
    options = parse(EvalOptions(), Usage("pdtr eval"), arguments)
    try:
        with shared() as (processes, device), _folder(options.output, processes) as output:
            artist = _artist(options, processes, device)
            for task in _tasks(options):
                benchmark = _drawn(task, artist, output / task.name, options)
                if processes.is_first:
                    print(format_success(_scored(task, benchmark, output / task.name)), flush=True)
                if processes.is_first and options.output is not None:
                    print(f"results: {output / task.name / 'results.json'}", flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(WAY_ON * bool(options.output)) from None


@contextmanager
def _folder(output: Path | None, processes: Processes) -> Iterator[Path]:
    """The folder that is asked for, or else one that is gone in the end, the same for all processes."""
    if output is not None:
        yield output
        return
    made = tempfile.TemporaryDirectory(prefix="pdtr_eval_") if processes.is_first else nullcontext("")
    with made as folder:
        yield Path(processes.agree(lambda: folder))


def _artist(options: EvalOptions, processes: Processes, device: str) -> Artist:
    import torch

    from pdtr.benchmarks.drawing import Artist
    from pdtr.benchmarks.settings import model_settings
    from pdtr.sampling import device_or_gpu, evaluation_sampler, load_policy, policy_folder

    torch.set_num_threads(options.num_threads)
    folder = policy_folder(options.folder)
    model = model_settings(folder)
    sampler = evaluation_sampler(
        options.folder,
        guidance_scale=options.guidance_scale,
        num_inference_steps=options.num_inference_steps,
        shift=options.shift,
    )
    policy = load_policy(folder, model)
    return Artist(folder, policy, sampler, model, device_or_gpu(options.device or device), processes)


def _drawn(task: Task, artist: Artist, output: Path, options: EvalOptions) -> Benchmark:
    """The task's benchmark, its images drawn, a share by each process."""
    from experiments.eval import drawing_progress
    from pdtr.benchmarks.drawing import Plan
    from pdtr.benchmarks.scenes import final_noise, scenes_benchmark
    from pdtr.evaluate import EVALUATION_SEED

    if artist.policy.image_size != task.image_size:
        raise ValueError(
            f"{artist.folder}: expected a policy that draws {task.image_size} pixels, as the embedded world has, got "
            f"one of {artist.policy.image_size}; published models have benchmarks of their own, see docs/evaluation.md"
        )
    benchmark = scenes_benchmark(task, is_suite=options.prompts is None)
    plan = Plan(EVALUATION_SEED, options.chunk_size, drawing_progress(task.name), noise=final_noise)
    artist.draw(benchmark, output, plan)
    return benchmark


def _scored(task: Task, benchmark: Benchmark, output: Path) -> Results:
    from pdtr.benchmarks.results import RESULTS, results_of, save_results
    from pdtr.benchmarks.scenes import scenes_scorer
    from pdtr.benchmarks.scoring import ROWS, score_images
    from pdtr.benchmarks.settings import IMAGES, read_settings

    scorer = scenes_scorer(task)
    rows = score_images(benchmark, scorer, output / IMAGES, output / ROWS)
    results = results_of(benchmark, scorer, rows, read_settings(output))
    save_results(output / RESULTS, results)
    return results


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


def success_rows(results: Results) -> list[Row]:
    """Each skill's success in order of first appearance, then that of all; what could not be judged is left out."""
    from pdtr.benchmarks.scenes import SUCCESS

    return [_row(number) for number in results.numbers if number.metric == SUCCESS]


def _row(number: Number) -> Row:
    from pdtr.benchmarks.aggregate import OVERALL
    from pdtr.statistics import wilson_interval

    skill = "all" if number.task == OVERALL else number.task
    # A success is 1 or 0 and a prompt has one image.
    successes = round(number.value * number.prompts) if number.prompts else 0
    strict, low, high = wilson_interval(successes, number.prompts, _CONFIDENCE)
    return Row(skill, number.prompts, strict, low, high, number.error, number.failed)


def format_success(results: Results) -> str:
    """How the images were drawn and each skill's success, as a table in plain text."""
    from pdtr.benchmarks.settings import describe

    rows = success_rows(results)
    width = max(len(row.skill) for row in rows)
    lines = [f"{results.title}: strict success, {_CONFIDENCE:.0%} Wilson interval, standard error"]
    lines.append(f"  drawn: {describe(results.drawing)}")
    lines += [f"  not the suite: {'; '.join(results.deviations)}"] * bool(results.deviations)
    for row in rows:
        share = f"{row.strict:7.1%}  [{row.low:6.1%}, {row.high:6.1%}]" if row.count else f"{'-':>7}  {'':16}"
        error = f"{row.error:.1%}" if row.error == row.error else "-"
        lines.append(f"  {row.skill:<{width}}  {share}  +- {error:<5}  n={row.count}  failed {row.failed}")
    lines.append("  +- is the standard error, s / sqrt(n) over prompts; images that could not be judged are left out")
    return "\n".join([*lines, *(f"  failed: {count} x {reason}" for reason, count in results.failures.items())])
