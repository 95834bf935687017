"""How much of a judge's time is hidden behind drawing in ``pdtr_scenes_judge``: rollouts of its editing stage, timed.

Type ``python -m experiments.benchmarks.judge_overlap --url http://127.0.0.1:8000/v1`` with the embedded world's judge
served there. A chunk is judged while the next one is drawn; what is left is the wait for the last. The hidden share is
``1 - waited / judged``, in seconds of the drawing thread and of the judging one. The figures go to
``judge_overlap.csv``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.tables import RESULTS, write_csv
from experiments.benchmarks.timing import Measurement, cases_table, median_interval
from experiments.flags import Usage, parse
from experiments.served_rewards import DEFAULT_URL

if TYPE_CHECKING:
    from pdtr.config import TrainConfig

TABLE = "judge_overlap.csv"


@dataclass(frozen=True)
class Options:
    """Draw rollouts of the recipe's editing stage, judged by a server, and time both.

    Attributes:
        url: base URL of the server.
        model: the name of the judge there; the first one served when left out.
        chunk_sizes: images that are drawn, and then judged, together; one case each.
        repeats: rollouts of each case, of other prompts each; one more, which warms up, is not counted.
        num_threads: torch threads.
        results: folder of the CSV file.
    """

    url: str = DEFAULT_URL
    model: str = ""
    chunk_sizes: tuple[int, ...] = (8, 24)
    repeats: int = 15
    num_threads: int = 1
    results: Path = RESULTS

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.num_threads < 1:
            raise ValueError(f"repeats, num_threads: expected 1 or more, got {self.repeats}, {self.num_threads}")


def benchmark(arguments: Sequence[str]) -> int:
    """Measure, write the CSV file, print the table."""
    options = parse(Options(), Usage("python -m experiments.benchmarks.judge_overlap"), arguments)
    found = list(measure(options))
    write_csv(options.results / TABLE, found)
    print(f"Machine: {found[0].machine}\n\nMedians of {options.repeats} rollouts with 95 % bootstrap intervals")
    print(cases_table(found))
    return 0


def measure(options: Options) -> Iterator[Measurement]:
    """Hidden share, judging over drawing, and images a second, for each chunk size.

    Raises:
        ValueError: no judge answers at the URL, or the chunk size does not divide a rollout.
    """
    import torch

    from experiments.recipes.judge import pdtr_scenes_judge
    from experiments.scenes_judge_reward import JudgeRewards

    torch.set_num_threads(options.num_threads)
    machine = f"{describe_machine()}, {options.num_threads} torch threads"
    config = replace(pdtr_scenes_judge(), rewards=JudgeRewards(url=options.url, model=options.model))
    num_images = config.num_prompts * config.group_size
    for size in options.chunk_sizes:
        if size < 1 or num_images % size:
            raise ValueError(f"chunk_sizes: expected divisors of a rollout's {num_images} images, got {size}")
    for size in options.chunk_sizes:
        waited, judged, whole = time_rollouts(replace(config, chunk_size=size), options.repeats)
        values = {
            "hidden share of judging": (1 - waited / judged, "share"),
            "judging / drawing": (judged / (whole - waited), "ratio"),
            "rollouts": (num_images / whole, "images/s"),
        }
        for name, (value, unit) in values.items():
            row = median_interval(value)
            yield Measurement(name, f"{size} images a chunk", *row, options.repeats, unit, machine)


def time_rollouts(config: TrainConfig, num_repeats: int) -> NDArray[np.float64]:
    """Seconds waited for the judge, judged, and in all, of each rollout but the first: [3, num_repeats]."""
    import torch

    from agents.policies.scenes import ScenesPolicy
    from agents.rollout import Draw, collect
    from pdtr.launch import BASE
    from pdtr.tasks import scenes_tasks

    policy = ScenesPolicy.load(BASE)
    task = scenes_tasks(1, 1, rewards=config.rewards.make_rewards())["edit"]
    envs, rng, rows = task.make_envs(config.chunk_size), np.random.default_rng(0), []
    for repeat in range(num_repeats + 1):
        prompts = task.pool.draw(rng, config.num_prompts)
        started = time.perf_counter()
        with torch.no_grad():
            draw = Draw(config.group_size, seed=repeat)
            found = collect(policy, envs, prompts, draw, config.algorithm.sampler()).seconds
        rows.append((found.waited, found.scored, time.perf_counter() - started))
    return np.array(rows[1:]).T


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
