"""How long ``pdtr --help`` and ``import pdtr`` take, beside an interpreter that does nothing.

Type ``python -m experiments.benchmarks.startup``. The figures go to ``startup.csv``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.tables import RESULTS, quantity, text_table, write_csv
from experiments.benchmarks.timing import Measurement, interleaved, median_interval
from experiments.flags import Usage, parse
from pdtr.statistics import Interval

TABLE = "startup.csv"


@dataclass(frozen=True)
class Options:
    """Time the start of the command and of the package.

    Attributes:
        repeats: of each; one more, which writes the bytecode, is not counted.
        results: folder of the CSV file.
    """

    repeats: int = 20
    results: Path = RESULTS


def benchmark(arguments: Sequence[str]) -> int:
    """Measure, write the CSV file, print the table."""
    options = parse(Options(), Usage("python -m experiments.benchmarks.startup"), arguments)
    found = measure(commands(), options.repeats)
    write_csv(options.results / TABLE, found)
    best = {row.case: row.value for row in found if row.quantity == "best"}
    rows = [
        [row.case, str(row.n), f"{best[row.case]:.3f}", quantity(Interval(row.value, row.low, row.high), ".3f")]
        for row in found
        if row.quantity == "median"
    ]
    print(f"Machine: {found[0].machine}\n\nSeconds from the shell, median with 95 % bootstrap interval")
    print(text_table(["", "n", "best", "median"], rows))
    return 0


def commands() -> dict[str, tuple[str, ...]]:
    """What is timed, by what one types."""
    script = Path(sys.executable).with_name("pdtr")
    program = (str(script),) if script.is_file() else (sys.executable, "-m", "experiments.cli")
    return {
        "pdtr --help": (*program, "--help"),
        "python -c 'import pdtr'": (sys.executable, "-c", "import pdtr"),
        "python -c pass": (sys.executable, "-c", "pass"),
    }


def measure(timed: dict[str, tuple[str, ...]], num_repeats: int) -> list[Measurement]:
    """Best and median of each command, in seconds; the commands take turns."""
    # Before the measuring, whose own load would be shown otherwise.
    machine = describe_machine()
    seconds = interleaved({name: _runner(command) for name, command in timed.items()}, num_repeats)
    found = []
    for name, values in seconds.items():
        best, median = float(values.min()), median_interval(values)
        found.append(Measurement("best", name, best, float("nan"), float("nan"), len(values), "s", machine))
        found.append(Measurement("median", name, *median, len(values), "s", machine))
    return found


def _runner(command: tuple[str, ...]) -> Callable[[], object]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return lambda: subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
