"""A learnt edit reward against the ground truth over seeds: held-out Spearman, pairs in order, calibration error.

Type ``python -m experiments.benchmarks.edit_reward --seeds 0 1 2``; the data and the base come from
``pdtr edit-reward data`` and ``pdtr scenes-judge``, and are made where they are missing. Seeds differ in the pairs
and in their order, and start from the one base. The figures go to ``edit_reward.csv``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.tables import RESULTS, quantity, text_table, write_csv
from experiments.edit_reward_check import Found, check_checkpoint
from experiments.flags import Usage, parse
from pdtr.statistics import Interval, mean_interval
from rewards.agreement import Estimate

USAGE = "python -m experiments.benchmarks.edit_reward"
TABLE = "edit_reward.csv"
GOAL = 0.8


@dataclass(frozen=True)
class Options:
    """Train an edit reward with each seed and compare it with the ground truth on held-out prompts.

    Attributes:
        seeds: of the trainings.
        data: folder of scored edits; made where it is missing.
        base: folder of the model to start from; made where it is missing.
        runs: folder of the trained checkpoints; those that are there are not trained again.
        num_epochs: passes over the training edits.
        batch_size: pairs of a step.
        learning_rate: peak.
        resamples: of the bootstrap over prompts.
        num_threads: torch threads.
        results: folder of the CSV file.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    data: Path = Path("runs/edit_reward/data")
    base: Path = Path("runs/scenes_judge/judge")
    runs: Path = Path("runs/edit_reward/bench")
    num_epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 5e-4
    resamples: int = 1000
    num_threads: int = 1
    results: Path = RESULTS

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected at least one, each once, got {list(self.seeds)}")


@dataclass(frozen=True)
class Figure:
    """One figure of one seed, with its bootstrap interval over prompts; a row of the CSV.

    Attributes:
        seed: of the training.
        what: the dimension, or "total, KIND" for the edits of one kind.
        quantity: "Spearman", "pairs in order" or "calibration error".
        value: the figure.
        low: of the 95 % interval.
        high: see ``low``.
        n: edits, or pairs.
        train_seconds: wall time of the training, NaN where it was not trained now.
        machine: on which.
    """

    seed: int
    what: str
    quantity: str
    value: float
    low: float
    high: float
    n: int
    train_seconds: float
    machine: str


def benchmark(arguments: Sequence[str]) -> int:
    """Train what is missing, measure, write the CSV file, print the table."""
    options = parse(Options(), Usage(USAGE), arguments)
    import torch

    torch.set_num_threads(options.num_threads)
    _prepare(options)
    machine = describe_machine()
    figures: list[Figure] = []
    for seed in options.seeds:
        checkpoint, seconds = _trained(options, seed)
        found = check_checkpoint(str(checkpoint), options.data, "test", options.resamples)
        figures += [figure for row in found for figure in _figures(row, seed, seconds, machine)]
        write_csv(options.results / TABLE, figures)
    print(format_figures(figures))
    return 0


def _prepare(options: Options) -> None:
    if not options.data.is_dir():
        from experiments.edit_reward_data import EditDataConfig, make_data

        make_data(EditDataConfig(output_dir=options.data))
    if not options.base.is_dir():
        from experiments.scenes_judge import ScenesJudgeConfig, make_judge

        make_judge(ScenesJudgeConfig(options.base, options.data, num_threads=options.num_threads))


def _trained(options: Options, seed: int) -> tuple[Path, float]:
    """The checkpoint of a seed, and how long its training took; calibration is written last."""
    from rewards.edit_reward_calibration import CALIBRATION
    from rewards.edit_reward_training import TrainingConfig, train_edit_reward

    folder = options.runs / f"seed-{seed}"
    if (folder / CALIBRATION).is_file():
        return folder, float("nan")
    started = perf_counter()
    config = TrainingConfig(
        data=options.data,
        base=str(options.base),
        output_dir=folder,
        num_epochs=options.num_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=seed,
    )
    return train_edit_reward(config), perf_counter() - started


def _figures(found: Found, seed: int, seconds: float, machine: str) -> list[Figure]:
    agreement = found.agreement
    parts: list[tuple[str, Estimate, int]] = [
        ("Spearman", agreement.spearman, agreement.count),
        ("pairs in order", agreement.pairwise, agreement.num_pairs),
        ("calibration error", agreement.calibration, agreement.count),
    ]
    return [Figure(seed, found.what, name, *estimate, n, seconds, machine) for name, estimate, n in parts]


def format_figures(figures: Sequence[Figure]) -> str:
    """The mean over seeds of every figure, with Student's interval; of a single seed, the one over prompts."""
    keys = list(dict.fromkeys((figure.what, figure.quantity) for figure in figures))
    rows = []
    for key in keys:
        mine = [figure for figure in figures if (figure.what, figure.quantity) == key]
        over_seeds = mean_interval([figure.value for figure in mine])
        interval = over_seeds if len(mine) > 1 else Interval(mine[0].value, mine[0].low, mine[0].high)
        rows.append([", ".join(key), str(len(mine)), str(mine[0].n), quantity(interval, ".3f")])
    title = "Held-out prompts, mean with 95 % interval over seeds (over prompts where there is one seed)"
    totals = [figure.value for figure in figures if (figure.what, figure.quantity) == ("total", "Spearman")]
    verdict = f"Spearman of the total is {GOAL} or more in {sum(v >= GOAL for v in totals)} of {len(totals)} seeds"
    return f"Machine: {figures[0].machine}\n\n{title}\n{text_table(['', 'seeds', 'n', 'value'], rows)}\n\n{verdict}"


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
