"""What of a judge's time is hidden behind drawing is timed over a server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from experiments.benchmarks import judge_overlap
from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.tables import read_csv
from experiments.benchmarks.timing import Measurement
from tests.rewards.judges.fake_server import FakeServer, Reply, Request, as_json, says

SECONDS = 0.05


def answer(request: Request) -> Reply:
    if request.path == "/v1/models":
        return as_json({"data": [{"id": "judge"}]})
    time.sleep(SECONDS)
    return says({"4": 0.9, "5": 0.1})


def test_a_judge_is_partly_hidden_and_every_image_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(answer) as server:
        flags = ["--url", server.url, "--chunk-sizes", "48", "--repeats", "1", "--results", str(tmp_path)]
        assert run_benchmark(judge_overlap.benchmark, flags) == 0
    rows = {row.quantity: row.value for row in read_csv(tmp_path / judge_overlap.TABLE, Measurement)}
    assert 0 < rows["hidden share of judging"] < 1
    assert rows["judging / drawing"] > 0
    assert "hidden share" in capsys.readouterr().out
    # Two rollouts of 96 images and the judge's trial.
    assert sum(request.path == "/v1/chat/completions" for request in server.requests) == 2 * 96 + 1


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in {
        ("--chunk-sizes", "7"): "divisors of a rollout's 96 images, got 7",
        ("--repeats", "0"): "repeats, num_threads: expected 1 or more",
        ("--url", "http://127.0.0.1:9/v1"): "pdtr judge serve",
    }.items():
        assert run_benchmark(judge_overlap.benchmark, flags) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
