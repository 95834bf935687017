"""Several training runs as processes of their own, a few at a time, each with its time and peak memory.

A run that is finished is not repeated, one that was interrupted is resumed: the same command goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.benchmarks.machine import maxrss_mib

LOG, SITTINGS, CONFIG, REPORT = "log.txt", "sittings.jsonl", "config.json", "report.html"
_POLL_SECONDS = 0.1
# A run is one thread on one core: two of them share two cores, and neither waits for the other at barriers.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Job:
    """A process to run.

    Attributes:
        name: for messages.
        command: program and arguments.
        folder: gets ``log.txt`` (its output) and ``sittings.jsonl`` (its time and memory); made where missing.
    """

    name: str
    command: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: which.
        exit_code: 0 where it succeeded, negative the signal that ended it.
        seconds: wall time.
        peak_mib: largest resident memory of the process in MiB.
    """

    job: Job
    exit_code: int
    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class RunSpec:
    """One run of a recipe.

    Attributes:
        recipe: its name.
        seed: of everything in the run.
        folder: the run's output directory.
        flags: further flags of ``pdtr train``.
    """

    recipe: str
    seed: int
    folder: Path
    flags: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the run wrote its report, which it does last."""
        return (self.folder / REPORT).is_file()

    def job(self) -> Job:
        """The process that runs it, or goes on with it."""
        own = ("--seed", str(self.seed), "--output-dir", str(self.folder), "--num-threads", "1")
        resume = ("--resume",) if (self.folder / CONFIG).is_file() else ()
        command = (sys.executable, "-m", "experiments.cli", "train", self.recipe, *own, *resume, *self.flags)
        return Job(f"{self.recipe}, seed {self.seed}", command, self.folder)


def run_specs(recipes: Sequence[str], seeds: Sequence[int], runs: Path, flags: Sequence[str]) -> list[RunSpec]:
    """Every recipe with every seed, in ``runs/RECIPE/seed-S``; all recipes of one seed before the next seed.

    Raises:
        ValueError: an unknown recipe, no seed, or one that is named twice.
    """
    from experiments.recipes import find_recipe

    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected at least one, each once, got {list(seeds)}")
    names = [find_recipe(recipe).__name__ for recipe in recipes]
    return [
        RunSpec(name, seed, runs / name / f"seed-{seed}", tuple(flags))
        for seed in dict.fromkeys(seeds)
        for name in names
    ]


def run_unfinished(specs: Sequence[RunSpec], num_jobs: int) -> list[Outcome]:
    """Start or resume every run that is not finished; -> those that failed."""
    unfinished = [spec for spec in specs if not spec.is_finished]
    print(f"{len(specs)} runs, {len(specs) - len(unfinished)} of them finished already", flush=True)
    outcomes = run_jobs([spec.job() for spec in unfinished], num_jobs, _print_outcome)
    return [outcome for outcome in outcomes if outcome.exit_code]


def run_jobs(jobs: Sequence[Job], num_jobs: int, on_end: Callable[[Outcome], None] | None = None) -> list[Outcome]:
    """Run processes, at most ``num_jobs`` at a time, in order; -> their outcomes in the order in which they ended.

    Whatever ends this function early, Ctrl-C for instance, ends the processes too.

    Args:
        jobs: what to run.
        num_jobs: processes at a time, at least 1.
        on_end: called with each outcome.
    """
    if num_jobs < 1:
        raise ValueError(f"jobs: expected 1 or more at a time, got {num_jobs}")
    waiting, running, outcomes = list(jobs), list[_Running](), list[Outcome]()
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                running.append(_Running(waiting.pop(0)))
            ended = [process for process in running if process.poll()]
            for process in ended:
                running.remove(process)
                outcomes.append(process.outcome())
                if on_end is not None:
                    on_end(outcomes[-1])
            if not ended:
                time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.stop()
    return outcomes


@dataclass(frozen=True)
class Cost:
    """What a run took over all its sittings; NaN where a sitting's end was never recorded (a power cut, ``kill -9``).

    Attributes:
        seconds: wall time, from the start of each process to its end: imports, evaluations and report included.
        peak_mib: the largest resident memory.
    """

    seconds: float
    peak_mib: float


def read_cost(folder: Path) -> Cost:
    """The cost of a run that :func:`run_jobs` ran; NaN where it ran otherwise."""
    path = folder / SITTINGS
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    ends = [row for row in rows if row["event"] == "end"]
    if not ends or 2 * len(ends) != len(rows):
        return Cost(math.nan, math.nan)
    return Cost(sum(row["seconds"] for row in ends), max(row["peak_mib"] for row in ends))


@dataclass
class _Running:
    """A process under way."""

    job: Job
    process: subprocess.Popen[bytes] = field(init=False)
    started: float = field(init=False)
    seconds: float = field(init=False, default=math.nan)
    peak_mib: float = field(init=False, default=math.nan)

    def __post_init__(self) -> None:
        self.job.folder.mkdir(parents=True, exist_ok=True)
        _append(self.job.folder, {"event": "start", "command": self.job.command})
        self.started = time.monotonic()
        with (self.job.folder / LOG).open("ab") as log:
            environment = {**os.environ, **_ENVIRONMENT}
            self.process = subprocess.Popen(
                self.job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def poll(self, options: int = os.WNOHANG) -> bool:
        """Whether it has ended; its peak memory is known from then on.

        The kernel counts the memory of the process that started it as its own until ``exec``: this one has to stay
        smaller than what it measures, and does not import torch.
        """
        pid, status, usage = os.wait4(self.process.pid, options)
        if pid == 0:
            return False
        # Popen must not wait for a process that is gone.
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.seconds = time.monotonic() - self.started
        self.peak_mib = maxrss_mib(usage.ru_maxrss)
        end = {"event": "end", "exit_code": self.process.returncode}
        _append(self.job.folder, {**end, "seconds": round(self.seconds, 2), "peak_mib": round(self.peak_mib, 1)})
        return True

    def stop(self) -> None:
        """End it and wait for that."""
        self.process.terminate()
        self.poll(0)

    def outcome(self) -> Outcome:
        return Outcome(self.job, self.process.returncode, self.seconds, self.peak_mib)


def _append(folder: Path, row: dict[str, Any]) -> None:
    with (folder / SITTINGS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def _print_outcome(outcome: Outcome) -> None:
    if outcome.exit_code == 0:
        print(f"{outcome.job.name}: {outcome.seconds:.0f} s, peak {outcome.peak_mib:.0f} MiB", flush=True)
        return
    log = outcome.job.folder / LOG
    lines = log.read_text(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "nothing"
    print(f"{outcome.job.name}: FAILED with exit code {outcome.exit_code}; {log} ends with: {said}", flush=True)
