"""How a benchmark starts and ends: as ``pdtr`` does, a mistake in what was asked for is one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from experiments.cli import MISTAKE, STOPPED, explain, is_mistake
from experiments.threads import set_waiting

SEPARATOR = "--"


def run_benchmark(benchmark: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; -> the exit code.

    Args:
        benchmark: takes its arguments, prints what came of them, returns 0, or 1 where a part of it failed.
        arguments: without the program's name; ``sys.argv``'s unless given.
    """
    set_waiting()
    try:
        return benchmark(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return STOPPED
    except Exception as error:
        if not is_mistake(error) or os.environ.get("PDTR_TRACEBACK", "") not in ("", "0"):
            raise
        print(explain(error), file=sys.stderr)
        return MISTAKE


def split_flags(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """``OWN -- OTHERS`` -> (own, others): what follows the two hyphens goes to ``pdtr train`` as it is."""
    arguments = list(arguments)
    if SEPARATOR not in arguments:
        return arguments, ()
    index = arguments.index(SEPARATOR)
    return arguments[:index], tuple(arguments[index + 1 :])
