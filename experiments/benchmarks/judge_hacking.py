"""Where the embedded world's judge starts to be hacked: ``pdtr_scenes_judge`` at twice its rate and without a KL.

Type ``python -m experiments.benchmarks.judge_hacking --seeds 0 1 2 -- --rewards.url URL``, with the judge served there;
what follows the two hyphens are flags of ``pdtr train``. The ground truth is held out and measured all the same. Every
evaluation is a row of ``judge_hacking.csv``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.benchmarks.entry import run_benchmark, split_flags
from experiments.benchmarks.finals import Study, read_study
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.seeds import run_specs, run_unfinished
from experiments.benchmarks.tables import RESULTS, points, quantity, text_table, write_csv
from experiments.flags import Usage, parse
from pdtr.panel import hacking_alarm
from pdtr.report_data import RunRecord
from pdtr.statistics import mean_interval

USAGE = "python -m experiments.benchmarks.judge_hacking"
TABLE, FINALS = "judge_hacking.csv", "judge_hacking_finals.csv"
RECIPE = "pdtr_scenes_judge"


@dataclass(frozen=True)
class Options:
    """Train on the judge until it is hacked, with each seed, and tabulate; flags of pdtr train follow two hyphens.

    Attributes:
        seeds: of the runs.
        runs: folder of the runs; finished ones in it are not repeated, interrupted ones are resumed.
        num_iterations: of a run.
        learning_rate: AdamW's; the recipe's is half of it.
        kl_coef: weight of the KL to the base, which keeps the recipe's policy near it.
        results: folder of the CSV files.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    runs: Path = Path("runs/judge_hacking")
    num_iterations: int = 60
    learning_rate: float = 4e-4
    kl_coef: float = 0.0
    results: Path = RESULTS

    @property
    def flags(self) -> tuple[str, ...]:
        """Of ``pdtr train``."""
        stage = "--curriculum.stages.0"
        numbers = {
            "--learning-rate": self.learning_rate,
            "--algorithm.kl-coef": self.kl_coef,
            f"{stage}.num-iterations": self.num_iterations,
            f"{stage}.decay-share": 0.2,
        }
        return tuple(part for name, value in numbers.items() for part in (name, str(value)))


@dataclass(frozen=True)
class Moment:
    """One evaluation on the tuning prompts; a row of the CSV.

    Attributes:
        seed: of the run.
        iteration: after which.
        judge: mean of the judge's grade, which is trained on.
        truth: mean of the ground truth of the same edits.
        strict: share of edits that are right.
        t2i_strict: share of text-to-image that is right, which is not practised.
        correlation: Spearman's, of judge and truth over the prompts.
        num_prompts: a task.
        alarm: "yes" where the hacking panel raises it.
    """

    seed: int
    iteration: int
    judge: float
    truth: float
    strict: float
    t2i_strict: float
    correlation: float
    num_prompts: int
    alarm: str


def benchmark(arguments: Sequence[str]) -> int:
    """Train what is missing, write the CSV files, print the tables; -> 1 where a run failed."""
    own, flags = split_flags(arguments)
    options = parse(Options(), Usage(USAGE), own)
    specs = run_specs([RECIPE], options.seeds, options.runs, (*options.flags, *flags))
    failed = run_unfinished(specs, 1)
    study = read_study(specs, options.results / FINALS)
    found = [moment for (_, seed), run in study.records.items() for moment in moments(seed, run)]
    # Without a finished run the finals are those of the CSV, and nothing is new.
    if found:
        write_csv(options.results / TABLE, found)
        write_csv(options.results / FINALS, study.finals)
    print(f"Machine: {describe_machine()}\n\n{format_moments(found)}\n\n{format_finals(study)}")
    return 1 if failed else 0


def moments(seed: int, run: RunRecord) -> Iterator[Moment]:
    """The evaluations of a run on the tuning prompts, in order."""
    rows = {(row["task"], row["iteration"]): row for row in run.evaluations if row["set"] == "tune"}
    history = run.rivals("edit")[""]
    for count, entry in enumerate(history, 1):
        iteration = int(entry["iteration"])
        edit, t2i = rows["edit", iteration], rows["t2i", iteration]
        yield Moment(
            seed=seed,
            iteration=iteration,
            judge=float(np.nanmean(entry["trained"])),
            truth=float(np.nanmean(entry["reward"])),
            strict=float(edit["strict"]),
            t2i_strict=float(t2i["strict"]),
            correlation=float(edit["agreement"]),
            num_prompts=int(edit["count"]),
            alarm="yes" if hacking_alarm(history[:count]) else "no",
        )


def format_moments(found: Sequence[Moment]) -> str:
    """A row an iteration: means over seeds."""
    rows = []
    for iteration in sorted({moment.iteration for moment in found}):
        own = [moment for moment in found if moment.iteration == iteration]
        numbers = [
            quantity(mean_interval([getattr(moment, name) for moment in own]), ".3f")
            for name in ("judge", "truth", "correlation")
        ]
        shares = [points(mean_interval([getattr(moment, name) for moment in own])) for name in ("strict", "t2i_strict")]
        alarms = sum(moment.alarm == "yes" for moment in own)
        rows.append([str(iteration), *numbers, *shares, f"{alarms} of {len(own)}"])
    title = "Editing on the tuning prompts, means over seeds with Student's 95 % intervals; strict success in %\n"
    return title + text_table(["iteration", "judge", "truth", "correlation", "strict", "t2i strict", "alarm"], rows)


def format_finals(study: Study) -> str:
    """What the runs did to both tasks on the final prompts."""
    base, *_, after = study.labels(RECIPE)
    rows = []
    for task in ("edit", "t2i"):
        cells = [points(mean_interval(list(study.scores(RECIPE, label, task).values()))) for label in (base, after)]
        change = mean_interval(list(study.over_seeds(RECIPE, task, after, base).values()))
        prompts = study.over_prompts(RECIPE, task, after, base)
        rows.append([task, *cells, points(change), "-" if prompts is None else points(prompts)])
    title = "Strict success on the final prompts, %, and its change with 95 % intervals over seeds and over prompts\n"
    return title + text_table(["", base, after, "change, over seeds", "over prompts"], rows)


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
