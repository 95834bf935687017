"""``pdtr_scenes`` and ``flow_grpo_scenes`` over seeds: what each stage did to each task, what it took.

Type ``python -m experiments.benchmarks.pdtr_scenes --seeds 0 1 2 --jobs 2 --runs runs/pdtr_scenes_bench``; flags of
``pdtr train`` follow ``--``. The scores go to ``pdtr_scenes.csv``, the gains to ``pdtr_scenes_gains.csv``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.benchmarks.entry import run_benchmark, split_flags
from experiments.benchmarks.finals import Study, read_study
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.seeds import run_specs, run_unfinished
from experiments.benchmarks.tables import RESULTS, points, quantity, text_table, write_csv
from experiments.flags import Usage, parse
from pdtr.statistics import mean_interval

USAGE = "python -m experiments.benchmarks.pdtr_scenes"
SCORES, GAINS = "pdtr_scenes.csv", "pdtr_scenes_gains.csv"
TASKS = ("edit", "t2i")


@dataclass(frozen=True)
class Options:
    """Train each recipe with each seed and tabulate the held-out success; flags of pdtr train follow two hyphens.

    Attributes:
        seeds: of the runs.
        jobs: runs at a time, one thread each.
        runs: folder of the runs; finished ones in it are not repeated, interrupted ones are resumed.
        recipes: what is trained.
        base: folder of the policy to start from; the one that ships with the package when left out.
        results: folder of the CSV files.
        only_table: train nothing; print the tables from the runs, or from the CSV file where they are gone.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    runs: Path = Path("runs/pdtr_scenes_bench")
    recipes: tuple[str, ...] = ("pdtr_scenes", "flow_grpo_scenes")
    base: Path | None = None
    results: Path = RESULTS
    only_table: bool = False


@dataclass(frozen=True)
class Comparison:
    """Two moments of a run that are compared, by their place: 0 is the base, 1 after the first stage, -1 at the end.

    Attributes:
        task: "t2i" or "edit".
        after: place of the later moment.
        before: place of the earlier one.
        goal: the least mean difference that is aimed at, as a share.
        must_clear_zero: whether the interval has to lie above 0 too.
    """

    task: str
    after: int
    before: int
    goal: float
    must_clear_zero: bool


COMPARISONS = (
    Comparison("edit", 1, 0, 0.10, True),
    Comparison("t2i", -1, 0, 0.20, True),
    Comparison("edit", -1, 1, -0.03, False),
)


@dataclass(frozen=True)
class Gain:
    """One comparison of one recipe; a row of the CSV. Shares of 1; NaN where there is no interval.

    Attributes:
        recipe: which.
        task: which.
        after: the later moment's label.
        before: the earlier one's.
        num_seeds: runs that have both.
        gain: mean over seeds of the later score less the earlier.
        low: Student's 95 % interval over seeds.
        high: see ``low``.
        prompts_low: paired bootstrap's 95 % interval over prompts, seeds pooled.
        prompts_high: see ``prompts_low``.
        goal: what was aimed at.
        is_met: "yes" or "no".
    """

    recipe: str
    task: str
    after: str
    before: str
    num_seeds: int
    gain: float
    low: float
    high: float
    prompts_low: float
    prompts_high: float
    goal: float
    is_met: str


def benchmark(arguments: Sequence[str]) -> int:
    """Train what is missing, write the CSV files, print the tables; -> 1 where a run failed."""
    own, flags = split_flags(arguments)
    options = parse(Options(), Usage(USAGE), own)
    base = () if options.base is None else ("--base", str(options.base))
    specs = run_specs(options.recipes, options.seeds, options.runs, (*base, *flags))
    failed = [] if options.only_table else run_unfinished(specs, options.jobs)
    study = read_study(specs, options.results / SCORES)
    found = gains(study)
    # From the CSV alone the intervals over prompts are unknown, and must not replace those that were found.
    if study.records:
        write_csv(options.results / SCORES, study.finals)
        write_csv(options.results / GAINS, found)
    print(format_study(study, found))
    return 1 if failed else 0


def gains(study: Study) -> list[Gain]:
    """Every comparison of every recipe whose runs have both stages."""
    return [
        _gain(study, recipe, comparison)
        for recipe in study.recipes
        for comparison in COMPARISONS
        if len(study.labels(recipe)) > 2
    ]


def _gain(study: Study, recipe: str, comparison: Comparison) -> Gain:
    labels, task = study.labels(recipe), comparison.task
    after, before = labels[comparison.after], labels[comparison.before]
    by_seed = study.over_seeds(recipe, task, after, before)
    seeds, prompts = mean_interval(list(by_seed.values())), study.over_prompts(recipe, task, after, before)
    is_met = seeds.value >= comparison.goal and (seeds.low > 0 or not comparison.must_clear_zero)
    return Gain(
        recipe=recipe,
        task=task,
        after=after,
        before=before,
        num_seeds=len(by_seed),
        gain=seeds.value,
        low=seeds.low,
        high=seeds.high,
        prompts_low=math.nan if prompts is None else prompts.low,
        prompts_high=math.nan if prompts is None else prompts.high,
        goal=comparison.goal,
        is_met="yes" if is_met else "no",
    )


def format_study(study: Study, found: Sequence[Gain]) -> str:
    """The three tables: scores, gains, cost."""
    return "\n\n".join(
        [
            f"Machine: {describe_machine()}",
            "Held-out strict success, %, mean over seeds with Student's 95 % interval (none for the one base)\n"
            + _scores_table(study),
            "Differences, points, with 95 % intervals over seeds (Student) and over prompts (paired bootstrap, seeds "
            "pooled)\n" + _gains_table(found),
            "Cost of a run (one thread, the whole process), mean over seeds with Student's 95 % interval\n"
            + _cost_table(study),
        ]
    )


def _scores_table(study: Study) -> str:
    rows = []
    for recipe in study.recipes:
        for label in study.labels(recipe):
            by_task = [study.scores(recipe, label, task) for task in TASKS]
            counts = {row.count for row in study.finals if (row.recipe, row.label) == (recipe, label)}
            num_prompts = "/".join(map(str, sorted(counts)))
            cells = [points(mean_interval(list(scores.values()))) for scores in by_task]
            rows.append([f"{recipe}, {label}", str(max(map(len, by_task))), num_prompts, *cells])
    return text_table(["", "seeds", "prompts", *TASKS], rows)


def _gains_table(found: Sequence[Gain]) -> str:
    rows = []
    for gain in found:
        seeds = _signed(gain.low, gain.high)
        prompts = _signed(gain.prompts_low, gain.prompts_high)
        name = f"{gain.recipe}, {gain.task}: {gain.after} - {gain.before}"
        goal = f"{100 * gain.goal:+.0f}"
        rows.append([name, str(gain.num_seeds), f"{100 * gain.gain:+.1f}", seeds, prompts, goal, gain.is_met])
    return text_table(["", "seeds", "mean", "over seeds", "over prompts", "goal", "met"], rows)


def _signed(low: float, high: float) -> str:
    return "-" if math.isnan(low) or math.isnan(high) else f"[{100 * low:+.1f}, {100 * high:+.1f}]"


def _cost_table(study: Study) -> str:
    rows = []
    for recipe in study.recipes:
        seconds, memory, count = study.costs(recipe)
        rows.append([recipe, str(count), quantity(seconds, ".0f"), quantity(memory, ".0f")])
    return text_table(["", "runs", "wall seconds", "peak MiB"], rows)


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
