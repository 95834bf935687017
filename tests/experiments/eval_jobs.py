"""What each of several processes does in test_eval_processes.py; a module of its own, which the processes import."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.cli import main


def evaluate(arguments: Sequence[str]) -> None:
    """``pdtr eval`` with the arguments."""
    assert main(["eval", *arguments]) == 0
