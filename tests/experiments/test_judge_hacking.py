"""The study of where a judge is hacked, on runs made by hand: the judge rises, the truth rises and then falls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import judge_hacking
from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.tables import read_csv
from pdtr.evaluate import Evaluation
from pdtr.logbook import Logbook
from pdtr.metrics import evaluation_row

# Judge and truth by iteration, and the share of edits that is right.
MOMENTS = {0: (0.4, 0.4, 0.3), 30: (0.5, 0.6, 0.5), 60: (0.8, 0.2, 0.1)}
NUM_PROMPTS = 40


def evaluate(logbook: Logbook, iteration: int, kind: str, label: str, seed: int) -> None:
    judge, truth, share = MOMENTS[iteration]
    noise = np.random.default_rng(seed).normal(0, 0.02, NUM_PROMPTS).astype(np.float32)
    strict = (np.arange(NUM_PROMPTS) < share * NUM_PROMPTS).astype(np.float32)
    ids, no_images = tuple(map(str, range(NUM_PROMPTS))), np.zeros((0, 1, 1, 3), np.uint8)
    found = {
        "edit": Evaluation(ids, ("add",) * NUM_PROMPTS, strict, truth + noise, no_images, judge + noise),
        "t2i": Evaluation(ids, ("colors",) * NUM_PROMPTS, strict, truth + noise, no_images),
    }
    for task, evaluation in found.items():
        row = evaluation_row(evaluation, task, kind, label) | {"iteration": iteration, "seconds": 1.0}
        logbook.evaluation(row, evaluation.ids, evaluation.skills, evaluation.scores, no_images)


def make_run(folder: Path, seed: int) -> None:
    logbook = Logbook(folder, tensorboard=False)
    config = {"recipe": judge_hacking.RECIPE, "seed": seed, "config": {"seed": seed}}
    (folder / "config.json").write_text(json.dumps(config))
    for iteration in range(1, 61):
        logbook.metrics({"iteration": iteration, "seconds": 1.0, "stage_name": "edit", "tasks": ["edit"]})
    for iteration in MOMENTS:
        evaluate(logbook, iteration, "tune", "", seed)
    evaluate(logbook, 0, "final", "base", seed)
    evaluate(logbook, 60, "final", "after edit", seed)
    (folder / "report.html").write_text("")


def test_every_evaluation_is_a_row_and_says_whether_the_alarm_went_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1, 2):
        make_run(tmp_path / "runs" / judge_hacking.RECIPE / f"seed-{seed}", seed)
    flags = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert run_benchmark(judge_hacking.benchmark, flags) == 0
    rows = read_csv(tmp_path / judge_hacking.TABLE, judge_hacking.Moment)
    assert [(row.seed, row.iteration, row.alarm) for row in rows if row.seed == 1] == [
        (1, 0, "no"),
        (1, 30, "no"),
        (1, 60, "yes"),
    ]
    for row in rows:
        assert (row.judge, row.truth, row.strict) == pytest.approx(MOMENTS[row.iteration], abs=0.02)
        assert row.correlation == pytest.approx(1)
    said = capsys.readouterr().out
    assert "3 of 3" in said
    # From 30 to 10 %, in every run.
    assert "-20.0" in said


def test_runs_that_failed_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A judge that does not answer ends a run before it begins."""
    make_run(tmp_path / "runs" / judge_hacking.RECIPE / "seed-0", 0)
    nobody = ["--", "--rewards.url", "http://127.0.0.1:9/v1"]
    flags = ["--seeds", "0", "1", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert run_benchmark(judge_hacking.benchmark, [*flags, *nobody]) == 1
    rows = read_csv(tmp_path / judge_hacking.TABLE, judge_hacking.Moment)
    assert {row.seed for row in rows} == {0}
    assert "1 of 1" in capsys.readouterr().out


def test_the_runs_flags_are_those_of_train() -> None:
    assert judge_hacking.Options(num_iterations=7).flags[-4:] == (
        "--curriculum.stages.0.num-iterations",
        "7",
        "--curriculum.stages.0.decay-share",
        "0.2",
    )
