"""The log survives kills at any moment, and a resumed log becomes that of a run never stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdtr.logbook import Logbook, read_evaluations, read_metrics, read_scores

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


def evaluate(logbook: Logbook, iteration: int, kind: str = "tune", label: str = "", strict: float = 1.0) -> None:
    row = {"iteration": iteration, "task": "edit", "set": kind, "label": label, "strict": strict, "reward": 0.5}
    scores = {"strict": np.array([strict, math.nan]), "reward": np.array([0.5, 0.25])}
    logbook.evaluation(row, ("a", "b"), ("move", "add"), scores, IMAGES)


def write(folder: Path, iterations: range) -> Logbook:
    logbook = Logbook(folder, tensorboard=False)
    for iteration in iterations:
        logbook.metrics({"iteration": iteration, "reward/edit": iteration / 7, "tasks": ["edit"]})
        if iteration % 2 == 0:
            evaluate(logbook, iteration)
    return logbook


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_come_back(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[2] == {"iteration": 3, "reward/edit": 3 / 7, "tasks": ["edit"]}
    [row] = read_evaluations(tmp_path)
    assert row["file"] == "evaluations/000002-edit-tune.json"
    assert row["num_images"] == 2
    scores = read_scores(tmp_path, row)
    assert scores["ids"] == ["a", "b"]
    assert scores["skills"] == ["move", "add"]
    np.testing.assert_array_equal(scores["strict"], [1.0, np.nan])
    np.testing.assert_array_equal(scores["reward"], [0.5, 0.25])
    strip = np.asarray(Image.open(tmp_path / "evaluations/000002-edit-tune.png"))
    np.testing.assert_array_equal(strip, np.concatenate([IMAGES[0], IMAGES[1]], axis=1))


def test_what_json_does_not_have_becomes_null(tmp_path: Path) -> None:
    values = {"nan": math.nan, "inf": np.float32("inf"), "array": np.array([1.0, -np.inf]), "deep": {"x": [math.nan]}}
    Logbook(tmp_path, tensorboard=False).metrics({"iteration": 1, **values, "fine": np.int64(3)})

    def fail(name: str) -> None:
        raise AssertionError(f"not JSON: {name}")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=fail)
    assert row == {"iteration": 1, "nan": None, "inf": None, "array": [1.0, None], "deep": {"x": [None]}, "fine": 3}


def test_a_torn_last_line_is_left_out_with_a_warning_and_cut_off_by_the_next_logbook(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.warns(UserWarning, match="last line is torn"):
        assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 2]
    Logbook(tmp_path, tensorboard=False).metrics({"iteration": 3, "reward/edit": 3 / 7, "tasks": ["edit"]})
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"itera\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_metrics(tmp_path)


def test_a_resumed_log_is_that_of_a_run_never_stopped(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "stopped", range(1, 8))
    # What a kill between a file and its row leaves behind.
    (tmp_path / "stopped/evaluations/000008-edit-tune.json").write_text("{}")
    logbook = Logbook(tmp_path / "stopped", tensorboard=False)
    logbook.truncate(4)
    assert [row["iteration"] for row in read_metrics(tmp_path / "stopped")] == [1, 2, 3, 4]
    write(tmp_path / "stopped", range(5, 9))
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_a_repeated_evaluation_takes_the_old_ones_place(tmp_path: Path) -> None:
    logbook = Logbook(tmp_path, tensorboard=False)
    evaluate(logbook, 4, "final", "after edit", strict=0.0)
    evaluate(logbook, 4, "tune", strict=1.0)
    evaluate(logbook, 4, "final", "after edit", strict=1.0)
    rows = read_evaluations(tmp_path)
    assert [(row["set"], row["strict"]) for row in rows] == [("final", 1.0), ("tune", 1.0)]
    assert read_scores(tmp_path, rows[0])["strict"][0] == 1.0


def test_prompts_of_the_grids(tmp_path: Path) -> None:
    Logbook(tmp_path, tensorboard=False).prompts("edit", ["make it <red>", "добавь"], IMAGES)
    assert json.loads((tmp_path / "evaluations/prompts-edit.json").read_text()) == ["make it <red>", "добавь"]
    assert Image.open(tmp_path / "evaluations/sources-edit.png").size == (8, 4)


def test_missing_scores_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.json: expected the scores of an evaluation"):
        read_scores(tmp_path, {"file": "evaluations/gone.json"})


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logbook = Logbook(tmp_path)
    for iteration in (1, 2, 3):
        logbook.metrics({"iteration": iteration, "reward/edit": 0.0, "stage_name": "edit", "kl_loss": math.nan})
    resumed = Logbook(tmp_path)
    resumed.truncate(1)
    resumed.metrics({"iteration": 2, "reward/edit": 1.0})
    evaluate(resumed, 2)
    resumed.close()
    logbook.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/edit")] == [(1, 0.0), (2, 1.0)]
    assert [event.value for event in events.Scalars("held_out/edit/tune/strict")] == [1.0]


WRITER = """
import sys
from pathlib import Path
from pdtr.logbook import Logbook, read_metrics
folder = Path(sys.argv[1])
logbook = Logbook(folder, tensorboard=False)
iteration = len(read_metrics(folder))
while True:
    iteration += 1
    logbook.metrics({"iteration": iteration, "text": "x" * 20_000})
"""


def test_kill_loses_at_most_the_line_being_written(tmp_path: Path, root: Path) -> None:
    for count in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env={**os.environ}, cwd=root)
        lines, deadline = count * 5, time.monotonic() + 60
        path = tmp_path / "metrics.jsonl"
        while (not path.exists() or path.read_bytes().count(b"\n") < lines + 5) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        rows = Logbook(tmp_path, tensorboard=False).folder
        assert [row["iteration"] for row in read_metrics(rows)] == list(range(1, len(read_metrics(rows)) + 1))
        assert len(read_metrics(rows)) >= 5
