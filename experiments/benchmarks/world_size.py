"""How little the number of processes changes a run, and that a killed one goes on.

Type ``python -m experiments.benchmarks.world_size``: small runs on the CPU by gloo, some minutes on two cores.
Each is compared with the same run in one process, or with the one that was never stopped, by the weights of their last
checkpoints. The figures go to ``world_size.csv``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.tables import RESULTS, text_table, write_csv
from experiments.benchmarks.world_size_runs import ITERATIONS, Difference, Job, begun, difference, do_jobs, kill_one
from experiments.flags import Usage, parse

TABLE = "world_size.csv"
_STOP = ITERATIONS - 1
_ALGORITHMS, _WEIGHTS = ("flow_grpo", "diffusion_nft"), ("full", "lora")


@dataclass(frozen=True)
class Options:
    """Compare runs in one, two and four processes, and runs that were killed with ones that were not.

    Attributes:
        results: folder of the CSV file.
    """

    results: Path = RESULTS


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        case: what was compared with what.
        algorithm: as in :class:`Job`.
        weights: as in :class:`Job`.
        iterations: of each run.
        max_abs: see :class:`Difference`.
        relative: see :class:`Difference`.
        moved: see :class:`Difference`.
        moments: see :class:`Difference`.
        machine: what it ran on.
    """

    case: str
    algorithm: str
    weights: str
    iterations: int
    max_abs: float
    relative: float
    moved: float
    moments: float
    machine: str


def benchmark(arguments: Sequence[str]) -> int:
    """Run, compare, write the CSV file, print the table."""
    options = parse(Options(), Usage("python -m experiments.benchmarks.world_size"), arguments)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder))
    rows = [
        Row(case, job.algorithm, job.weights, ITERATIONS, d.max_abs, d.relative, d.moved, d.moments, machine)
        for case, job, d in found
    ]
    write_csv(options.results / TABLE, rows)
    print(f"Machine: {machine}\n\nDifferences after {ITERATIONS} iterations")
    header = ["", "algorithm", "weights", "max |a - b|", "|a - b| / |a|", "|a - a_0| / |a|", "moments"]
    figures = [[f"{value:.1e}" for value in (r.max_abs, r.relative, r.moved, r.moments)] for r in rows]
    print(text_table(header, [[r.case, r.algorithm, r.weights, *f] for r, f in zip(rows, figures, strict=True)]))
    return 0


def compare(folder: Path) -> list[tuple[str, Job, Difference]]:
    """Every comparison: its name, the job, and what came of it."""
    kinds = [Job(folder, algorithm, weights) for algorithm in _ALGORITHMS for weights in _WEIGHTS]
    alone = [_placed(job, folder / "1") for job in kinds]
    do_jobs(alone, 1)
    found = []
    for case, count, sharding in (("2 processes", 2, "none"), ("4 processes", 4, "none"), ("2, fsdp2", 2, "fsdp2")):
        shared = [_placed(replace(job, sharding=sharding), folder / f"{count}-{sharding}") for job in kinds]
        do_jobs(shared, count)
        found += [(case, job, difference(a.folder, job.folder)) for a, job in zip(alone, shared, strict=True)]
    return [*found, *_resumed(folder, kinds)]


def _resumed(folder: Path, kinds: Sequence[Job]) -> list[tuple[str, Job, Difference]]:
    """Runs that were killed: after ``_STOP`` iterations, as many processes or others go on."""
    alone, together = ([_placed(job, folder / name) for job in kinds] for name in ("1", "2-none"))
    fewer = [begun(_placed(job, folder / "to-1"), job.folder, _STOP) for job in together]
    more = [begun(_placed(job, folder / "to-2"), job.folder, _STOP) for job in alone]
    killed = [replace(_placed(job, folder / "killed"), resume=True) for job in kinds]
    for job in killed:
        kill_one(replace(job, resume=False), 2, _STOP)
    do_jobs(fewer, 1)
    do_jobs([*more, *killed], 2)
    cases = (("2, killed and resumed", together, killed), ("2, resumed by 1", together, fewer))
    return [
        (case, job, difference(whole.folder, job.folder))
        for case, wholes, jobs in (*cases, ("1, resumed by 2", alone, more))
        for whole, job in zip(wholes, jobs, strict=True)
    ]


def _placed(job: Job, folder: Path) -> Job:
    return replace(job, folder=folder / f"{job.algorithm}-{job.weights}")


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
