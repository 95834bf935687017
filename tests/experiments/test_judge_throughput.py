"""The load generator asks the very same things as the judge, and both are timed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.benchmarks import judge_throughput
from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.tables import read_csv
from experiments.benchmarks.timing import Measurement
from tests.rewards.judges.fake_server import FakeServer, Reply, Request, as_json, says

CALLS, REPEATS = 5, 2
PICTURE = re.compile("data:image/png;base64,[^']+")


def answer(request: Request) -> Reply:
    return as_json({"data": [{"id": "judge"}]}) if request.path == "/v1/models" else says({"4": 0.9, "5": 0.1})


def test_both_send_the_same_bodies_but_for_the_noise_at_every_concurrency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(answer) as server:
        arguments = ["--url", server.url, "--concurrency", "1", "3", "--num-calls", str(CALLS)]
        arguments += ["--repeats", str(REPEATS), "--results", str(tmp_path)]
        assert run_benchmark(judge_throughput.benchmark, arguments) == 0
    bodies = [repr(request.body) for request in server.requests if request.body]
    # Two concurrencies, two ways of asking, and one round more than the repeats.
    times = 2 * 2 * (REPEATS + 1)
    pictures = [url for body in bodies for url in PICTURE.findall(body)]
    assert len(set(pictures)) == len(pictures) == 2 * CALLS * times
    asked = [PICTURE.sub("a picture", body) for body in bodies]
    assert len(set(asked)) == CALLS
    assert all(asked.count(body) == times for body in set(asked))
    assert "judge / bare" in capsys.readouterr().out
    rows = read_csv(tmp_path / judge_throughput.TABLE, Measurement)
    assert {(row.quantity, row.case) for row in rows} == {
        (quantity, case)
        for quantity in ("judge calls", "bare calls", "judge / bare")
        for case in ("1 in flight", "3 in flight")
    }


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark(judge_throughput.benchmark, ["--url", "http://127.0.0.1:9/v1"]) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
