"""``pdtr eval`` in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from experiments.cli import main

Run = Callable[..., str]


@pytest.fixture
def pdtr_eval(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; -> what it printed."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["eval", *map(str, arguments)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def eval_complaint(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["eval", *map(str, arguments)]) == 2
        # Libraries show their bars there, too.
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pdtr: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return run
