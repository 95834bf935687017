"""What a rollout costs over the bare forward passes of its model; images and samples a second; peak memory.

Type ``python -m experiments.benchmarks.collect_cost``. Within ``collect`` are the sampler's arithmetic, noise,
log-probabilities, storage, encoding of prompts and the Gymnasium interface; decoding is timed in the same call and
subtracted, and the reward is one that costs nothing. The figures go to ``collect_cost.csv``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import describe_machine, own_peak_mib
from experiments.benchmarks.tables import RESULTS, write_csv
from experiments.benchmarks.timing import Measurement, figures_table, median_interval, shown
from experiments.flags import Usage, parse

if TYPE_CHECKING:
    from agents.policies.base import FlowPolicy
    from pdtr.config import TrainConfig
    from pdtr.tasks import Task

TABLE = "collect_cost.csv"
RECIPES = ("pdtr_scenes", "flow_grpo_scenes")


@dataclass(frozen=True)
class Options:
    """Time rollouts and updates with the settings of the recipes.

    Attributes:
        repeats: of each; 15 or more for the committed figures. One more round, which warms up, is not counted.
        base: folder of the policy; the one that ships with the package when left out.
        num_threads: torch threads.
        results: folder of the CSV file.
    """

    repeats: int = 15
    base: Path | None = None
    num_threads: int = 2
    results: Path = RESULTS


@dataclass(frozen=True)
class Recorder:
    """Makes rows of repeats.

    Attributes:
        machine: on which.
    """

    machine: str

    def row(self, quantity: str, case: str, values: NDArray[np.float64], unit: str) -> Measurement:
        """The median of the repeats with its interval."""
        return Measurement(quantity, case, *median_interval(values), len(values), unit, self.machine)

    def peak_memory(self, case: str) -> Measurement:
        """The peak of this process so far; one reading, which has no interval."""
        peak = own_peak_mib()
        return Measurement("peak memory of the process", case, peak, float("nan"), float("nan"), 1, "MiB", self.machine)


def benchmark(arguments: Sequence[str]) -> int:
    """Measure, write the CSV file, print the table."""
    options = parse(Options(), Usage("python -m experiments.benchmarks.collect_cost"), arguments)
    import torch

    from agents.policies.scenes import ScenesPolicy
    from experiments.recipes import find_recipe
    from pdtr.launch import BASE
    from pdtr.tasks import scenes_tasks

    recorder = Recorder(f"{describe_machine()}, {options.num_threads} torch threads")
    torch.set_num_threads(options.num_threads)
    policy, tasks = ScenesPolicy.load(options.base or BASE), scenes_tasks(1, 1)
    configs = {name: find_recipe(name)() for name in RECIPES}
    found = []
    for row in measure(policy, tasks, configs, options.repeats, recorder):
        found.append(row)
        # It takes a quarter of an hour: one line a figure shows that it goes on.
        print(f"{row.quantity}: {row.case}: {shown(row)} {row.unit}", file=sys.stderr, flush=True)
    write_csv(options.results / TABLE, found)
    print(format_rows(found))
    return 0


def measure(
    policy: FlowPolicy, tasks: dict[str, Task], configs: dict[str, TrainConfig], num_repeats: int, recorder: Recorder
) -> Iterator[Measurement]:
    """Every figure; the rollouts go before the updates, which train the policy."""
    from experiments.benchmarks.collect_timing import time_collect, time_rollout, time_update

    for config in configs.values():
        for name, task in tasks.items():
            case = f"{name}, {type(config.algorithm.sampler()).__name__}"
            times = time_collect(policy, task, config, num_repeats)
            yield recorder.row("collect / bare forward passes", case, times.cost, "ratio")
            yield recorder.row("collect / its own forward passes", case, times.cost_within, "ratio")
            yield recorder.row("encoding / bare forward passes", case, times.encode / times.bare, "ratio")
            yield recorder.row("decoding / bare forward passes", case, times.decode / times.bare, "ratio")
            yield recorder.row("bare forward passes", case, 1000 * times.bare, "ms")
            yield recorder.row("rollouts", case, time_rollout(policy, task, config, num_repeats), "images/s")
    yield recorder.peak_memory("rollouts")
    for config in configs.values():
        for name, task in tasks.items():
            case = f"{name}, {type(config.algorithm).__name__}"
            yield recorder.row("updates", case, time_update(policy, task, config, num_repeats), "samples/s")
    yield recorder.peak_memory("rollouts and updates")


def format_rows(found: Sequence[Measurement]) -> str:
    """The table, the machine above it."""
    rows = sorted(found, key=lambda row: row.quantity)
    title = "Medians with 95 % bootstrap intervals over repeats"
    return f"Machine: {found[0].machine}\n\n{title}\n{figures_table(rows)}"


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
