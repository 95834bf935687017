"""The order study: editing then text-to-image, the reverse, both at once, and each alone, over seeds.

Type ``python -m experiments.benchmarks.order_study --seeds 0 1 2 --jobs 2``; flags of ``pdtr train`` follow ``--``. The
arms have as many iterations each and differ in their curriculum only. The scores go to ``order_study.csv``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.benchmarks.entry import run_benchmark, split_flags
from experiments.benchmarks.finals import Study, read_study
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.seeds import run_specs, run_unfinished
from experiments.benchmarks.tables import RESULTS, points, text_table, write_csv
from experiments.flags import Usage, parse
from pdtr.report_data import BASE
from pdtr.statistics import Interval, mean_interval

USAGE = "python -m experiments.benchmarks.order_study"
SCORES = "order_study.csv"
ARMS = ("edit_then_t2i", "t2i_then_edit", "joint", "edit_only", "t2i_only")
FIRST_TASKS = {"edit_then_t2i": "edit", "t2i_then_edit": "t2i"}
"""The arms with two stages, by the task of their first one: what the second stage may make them forget."""


@dataclass(frozen=True)
class Options:
    """Train each arm with each seed and tabulate the held-out success; flags of pdtr train follow two hyphens.

    Attributes:
        seeds: of the runs; three or more for an interval worth its name.
        jobs: runs at a time, one thread each.
        runs: folder of the runs; finished ones in it are not repeated, interrupted ones are resumed.
        base: folder of the policy to start from; the one that ships with the package when left out.
        results: folder of the CSV file.
        only_table: train nothing; print the table from the runs, or from the CSV file where they are gone.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 2
    runs: Path = Path("runs/order_study_bench")
    base: Path | None = None
    results: Path = RESULTS
    only_table: bool = False


@dataclass(frozen=True)
class ArmResult:
    """What an arm came to, each by seed, shares of 1.

    Attributes:
        edit: final success in editing.
        t2i: final success in text-to-image.
        both: mean of the two.
        forgetting: final success in the first task less that right after its stage; empty for arms of one stage.
    """

    edit: Mapping[int, float]
    t2i: Mapping[int, float]
    both: Mapping[int, float]
    forgetting: Mapping[int, float]


def benchmark(arguments: Sequence[str]) -> int:
    """Train what is missing, write the CSV file, print the table; -> 1 where a run failed."""
    own, flags = split_flags(arguments)
    options = parse(Options(), Usage(USAGE), own)
    base = () if options.base is None else ("--base", str(options.base))
    specs = run_specs(ARMS, options.seeds, options.runs, (*base, *flags))
    failed = [] if options.only_table else run_unfinished(specs, options.jobs)
    study = read_study(specs, options.results / SCORES)
    if study.records:
        write_csv(options.results / SCORES, study.finals)
    print(format_study(study))
    return 1 if failed else 0


def arm_result(study: Study, arm: str) -> ArmResult:
    """What one arm came to."""
    labels = study.labels(arm)
    edit, t2i = (study.scores(arm, labels[-1], task) for task in ("edit", "t2i"))
    both = {seed: (edit[seed] + t2i[seed]) / 2 for seed in edit if seed in t2i}
    first = FIRST_TASKS.get(arm)
    # The base and two stages: an arm that was stopped after its first stage has forgotten nothing yet.
    has_two = first is not None and len(labels) > 2
    forgetting = study.over_seeds(arm, str(first), labels[-1], labels[1]) if has_two else {}
    return ArmResult(edit, t2i, both, forgetting)


def format_study(study: Study) -> str:
    """The table: a row an arm, the base above them."""
    arms = [arm for arm in ARMS if arm in study.recipes]
    results = {arm: arm_result(study, arm) for arm in arms}
    rows = [_base_row(study, arms[0]), *(_row(arm, results) for arm in arms)]
    counts = sorted({row.count for row in study.finals})
    header = ["", "seeds", "edit", "t2i", "mean of both", "forgetting", f"mean - {ARMS[0]}"]
    return "\n".join(
        [
            f"Machine: {describe_machine()}",
            "",
            f"Held-out strict success at the end, %, over {'/'.join(map(str, counts))} prompts a task; mean over seeds "
            "with Student's 95 % interval; the last column is paired by seed",
            text_table(header, rows),
        ]
    )


def _row(arm: str, results: Mapping[str, ArmResult]) -> list[str]:
    own, first = results[arm], results.get(ARMS[0])
    scores = [points(_interval(values)) for values in (own.edit, own.t2i, own.both)]
    against = {}
    if first is not None and arm != ARMS[0]:
        against = {seed: own.both[seed] - first.both[seed] for seed in own.both if seed in first.both}
    differences = [points(_interval(values), signed=True) for values in (own.forgetting, against)]
    return [arm, str(len(own.both)), *scores, *differences]


def _base_row(study: Study, arm: str) -> list[str]:
    """Every run starts from one base and is measured with one noise, so that any arm's base is all arms'."""
    edit, t2i = (study.scores(arm, BASE, task) for task in ("edit", "t2i"))
    both = {seed: (edit[seed] + t2i[seed]) / 2 for seed in edit if seed in t2i}
    return [BASE, str(len(both)), *(points(_interval(values)) for values in (edit, t2i, both)), "-", "-"]


def _interval(values: Mapping[int, float]) -> Interval:
    return mean_interval(list(values.values()))


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
