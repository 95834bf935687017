"""``pdtr eval``: the embedded world's held-out suites, published benchmarks, and comparisons of two evaluations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.eval_sharing import WAY_ON, check_alone, shared
from experiments.flags import Usage, parse
from pdtr.processes import is_first, num_processes
from rewards.names import hint

if TYPE_CHECKING:
    from experiments.eval_drawing import DrawOptions
    from pdtr.benchmarks.base import Benchmark, Scorer
    from pdtr.benchmarks.scoring import Row

SCENES = "scenes"
_COMPARE = "--compare"
_SHOWN_PROBLEMS = 5


def evaluate(arguments: Sequence[str]) -> None:
    """``pdtr eval [NAME] [--flags]``: evaluate, or compare two evaluations; without a name the embedded world's suites.

    Raises:
        ValueError: an unknown benchmark or flag, a bad value, or data, images or results that are not what they should
            be.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: stopped; its text says how to go on.
    """
    from experiments.eval_options import OPTIONS

    name = arguments[0] if arguments else ""
    is_named = name in (SCENES, *OPTIONS)
    rest = list(arguments[1:] if is_named else arguments)
    if _COMPARE in rest:
        check_alone("compare")
        _compare(rest, name if is_named else "")
    elif is_named and name != SCENES:
        options = parse(OPTIONS[name](), Usage(f"pdtr eval {name}"), rest)
        try:
            run(options)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(WAY_ON) from None
    else:
        if not is_named:
            _check_spelling(name, [SCENES, *OPTIONS])
        from experiments.held_out import evaluate as held_out

        held_out(rest)


def _check_spelling(name: str, names: Sequence[str]) -> None:
    """A first argument that is no folder may have been meant as a benchmark."""
    near = hint(name, names)
    if near and not name.startswith("-") and not Path(name).exists():
        raise ValueError(f"eval: expected a benchmark ({', '.join(names)}) or a policy's folder, got {name!r}{near}")


def run(options: DrawOptions) -> None:
    """Draw what is missing, score what is missing, print the table, and write ``results.json``.

    Of several processes the first one does all but draw, of which each does its share.
    """
    from pdtr.benchmarks.settings import IMAGES

    benchmark = options.benchmark().limited(options.limit, options.samples)
    if is_first():
        _tell_problems(benchmark)
    output = options.output or _default_output(options)
    root = options.images or output / IMAGES
    official = options.official_rows(benchmark)
    if official is not None:
        check_alone("official_results")
        rows, scorer = official
        _finish(benchmark, scorer, rows, output)
    elif options.images is not None:
        check_alone("images")
        if not root.is_dir():
            raise ValueError(f"images: expected a folder, got {root}, which is none")
        with options.scorer() as scorer:
            _score(benchmark, scorer, root, output)
    elif options.draw_only:
        _draw(options, benchmark, output)
        if is_first():
            print(f"images: {root}")
    elif is_first():
        # Made before anything is drawn: a judge that is away should not show itself a day later.
        with options.scorer() as scorer:
            _draw(options, benchmark, output)
            _score(benchmark, scorer, root, output)
    else:
        _draw(options, benchmark, output)


def _default_output(options: DrawOptions) -> Path:
    """Beside the images where some are given: in the folder that they were drawn into, or in one named after theirs."""
    from pdtr.benchmarks.settings import IMAGES, SETTINGS

    if options.images is None:
        return Path("runs") / "eval" / options.NAME
    folder = options.images.absolute()
    if folder.name == IMAGES and (folder.parent / SETTINGS).is_file():
        return folder.parent
    return folder.with_name(f"{folder.name}_scores")


def _draw(options: DrawOptions, benchmark: Benchmark, output: Path) -> None:
    """Draw what is missing; every process its share, and none returns before all have."""
    import torch

    from pdtr.benchmarks.drawing import Artist, Plan
    from pdtr.benchmarks.settings import model_settings
    from pdtr.sampling import evaluation_sampler, load_policy, policy_folder

    with shared() as (processes, device):
        torch.set_num_threads(options.num_threads)
        folder = policy_folder(options.policy)
        names = ("height", "width", "dtype", "negative_prompt", "edit_negative_prompt")
        model = model_settings(folder, **{name: getattr(options, name) for name in names})
        sampler = evaluation_sampler(
            options.policy,
            guidance_scale=options.guidance_scale,
            num_inference_steps=options.num_inference_steps,
            shift=options.shift,
        )
        device = device if device and not options.device else options.used_device()
        artist = Artist(folder, load_policy(folder, model), sampler, model, device, processes)
        plan = Plan(options.seed, options.chunk_size, drawing_progress(""), options.keeps_shape)
        artist.draw(benchmark, output, plan)


def _score(benchmark: Benchmark, scorer: Scorer, root: Path, output: Path) -> None:
    from pdtr.benchmarks.scoring import ROWS, score_images

    _finish(benchmark, scorer, score_images(benchmark, scorer, root, output / ROWS, progress("scored")), output)


def _finish(benchmark: Benchmark, scorer: Scorer, rows: Sequence[Row], output: Path) -> None:
    from pdtr.benchmarks.results import RESULTS, format_results, results_of, save_results
    from pdtr.benchmarks.settings import read_settings

    results = results_of(benchmark, scorer, rows, read_settings(output))
    save_results(output / RESULTS, results)
    print(format_results(results))
    print(f"results: {output / RESULTS}")


def _tell_problems(benchmark: Benchmark) -> None:
    """Say which rows of the data were skipped."""
    for problem in benchmark.problems[:_SHOWN_PROBLEMS]:
        print(f"note: skipped {problem}", file=sys.stderr)
    more = len(benchmark.problems) - _SHOWN_PROBLEMS
    if more > 0:
        print(f"note: skipped {more} more bad rows", file=sys.stderr)


def progress(what: str) -> Callable[[int, int], None]:
    """Says every tenth of the way, on the standard error."""
    said = [0]

    def tell(done: int, total: int) -> None:
        tenth = 10 * done // total if total else 10
        if tenth > said[0]:
            said[0] = tenth
            print(f"note: {what} {done} of {total} images", file=sys.stderr, flush=True)

    return tell


def drawing_progress(task: str) -> Callable[[int, int], None]:
    """As :func:`progress`, of drawing, told by the first process of its share.

    Args:
        task: whose images are drawn; empty where there is one only.
    """
    if not is_first():
        return lambda done, total: None
    others = f"process 1 of {num_processes()} has drawn" if num_processes() > 1 else "drawn"
    return progress(f"{task}: {others}" if task else others)


@dataclass(frozen=True)
class CompareOptions:
    """Compare two evaluations of one benchmark, prompt by prompt: B minus A, its interval, and a p-value.

    Attributes:
        compare: folders with results.json, A and B; those of the embedded world have a folder a task.
        output: a JSON file for the differences; of several tasks, a file each, with the task's name in it.
    """

    compare: tuple[Path, Path]
    output: Path | None = None


def _compare(arguments: Sequence[str], name: str) -> None:
    import tyro

    from pdtr.benchmarks.compare import compare, format_differences, save_differences
    from pdtr.benchmarks.results import load_results

    options = parse(CompareOptions(tyro.MISSING), Usage("pdtr eval"), arguments)
    pairs = _pairs(*options.compare)
    for task, paths in pairs.items():
        first, second = (load_results(path) for path in paths)
        # Those of the embedded world are called scenes-t2i and scenes-edit.
        if name and name != first.benchmark.partition("-")[0]:
            raise ValueError(f"compare: expected results of {name}, got those of {first.benchmark}")
        found = compare(first, second)
        print(format_differences(first, second, found))
        if options.output is not None:
            path = options.output.with_stem(f"{options.output.stem}_{task}") if len(pairs) > 1 else options.output
            save_differences(path, first, second, found)
            print(f"differences: {path}")


def _pairs(first: Path, second: Path) -> dict[str, tuple[Path, Path]]:
    """What to compare with what, by the name of the folder: two results, or those of all tasks that both have."""
    from pdtr.benchmarks.results import RESULTS

    by_task = [
        {path.parent.name: path.parent for path in sorted(side.glob(f"*/{RESULTS}"))} for side in (first, second)
    ]
    shared = [task for task in by_task[0] if task in by_task[1]]
    if not shared or any((side / RESULTS).is_file() for side in (first, second)):
        return {"": (first, second)}
    return {task: (by_task[0][task], by_task[1][task]) for task in shared}
