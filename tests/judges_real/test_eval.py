"""`pdtr eval` of the benchmarks that ask a judge, on a real vLLM: what it says goes into the numbers, and is named.

A random judge gives one grade for everything. So it is asked with other ranges of the grades too, which tell their
mean, their least and their roots apart.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from pdtr.benchmarks.scoring import ROWS, Row, read_rows
from rewards.judges.templates import FOLDER, Template, load_template, parse_template
from rewards.questions import QUESTION_TEMPLATE
from tests.judges_real.conftest import NAME, Serving
from tests.pdtr.benchmarks.files import DPG_ROWS, gedit_row, results, write_dpg, write_imgedit, write_parquet

pytestmark = [pytest.mark.judge, pytest.mark.timeout(900)]

EDITS = {"1": ("add", "add a red circle"), "2": ("alter", "make it blue")}
Ranges = Mapping[str, tuple[int, int]]
Evaluate = Callable[..., tuple[list[Row], str]]


@pytest.fixture
def evaluate(serving: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Draws with the shipped policy in few steps and has the server judge; -> the rows, and what was printed."""

    def run(name: str, data: Path, templates: Sequence[Template], *more: Any) -> tuple[list[Row], str]:
        flags = ["--data", data, "--output", tmp_path / "out", "--base-url", serving.url, "--call-seconds", 600]
        flags += ["--num-inference-steps", 2, "--num-threads", 1, *more]
        assert main(["eval", name, *map(str, flags)]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        for told in (f"judge {NAME} ", "in place of", "not comparable with published numbers", "2 steps"):
            assert told in printed
        for template in templates:
            assert f"{template.name}:{template.sha256[:12]}" in printed
        assert results(tmp_path / "out")["comparable"] is False
        return read_rows(tmp_path / "out" / ROWS), printed

    return run


def asked(name: str, shipped: Ranges, ranges: Ranges, folder: Path) -> Path:
    """A copy of a template that ships, with these ranges of its grades."""
    text = (FOLDER / f"{name}.txt").read_text("utf-8")
    for grade, (low, high) in ranges.items():
        before = f"{grade} {shipped[grade][0]}-{shipped[grade][1]}"
        assert before in text
        text = text.replace(before, f"{grade} {low}-{high}")
    path = folder / f"{name}.txt"
    path.write_text(text, "utf-8")
    return path


def grades(row: Row, ranges: Ranges, prefix: str = "") -> list[float]:
    """What the judge gave, in its range; whole numbers."""
    found = [row.values[prefix + name] for name in ranges]
    for grade, (low, high) in zip(found, ranges.values(), strict=True):
        assert low <= grade <= high
        assert grade == round(grade)
    return found


def value(folder: Path, metric: str, task: str) -> float | None:
    """A number of the results; None where nothing is available, and then its one image has failed."""
    (row,) = [row for row in results(folder)["numbers"] if (row["metric"], row["task"]) == (metric, task)]
    assert row["failed"] == (1 if row["value"] is None else 0)
    found: float | None = row["value"]
    return found


SC: Ranges = {"edit_success": (0, 10), "restraint": (0, 10)}
PQ: Ranges = {"naturalness": (0, 10), "artifacts": (0, 10)}


@pytest.mark.parametrize(
    ("consistency", "quality"),
    [(SC, PQ), ({"edit_success": (0, 5), "restraint": (0, 6)}, {"naturalness": (0, 8), "artifacts": (0, 10)})],
    ids=["shipped", "other ranges"],
)
def test_gedit(evaluate: Evaluate, tmp_path: Path, consistency: Ranges, quality: Ranges) -> None:
    tasks = {"a": "color_alter", "b": "subject-add"}
    data = write_parquet(tmp_path / "data.parquet", [gedit_row(name, task) for name, task in tasks.items()])
    paths = asked("viescore_sc.v1", SC, consistency, tmp_path), asked("viescore_pq.v1", PQ, quality, tmp_path)
    # Random text is long.
    flags = ("--consistency-template", paths[0], "--quality-template", paths[1], "--max-tokens", 2048)
    rows, _ = evaluate("gedit", data, [load_template(path) for path in paths], *flags)
    assert [(row.item, row.reason) for row in rows] == [(name, "") for name in tasks]
    for row in rows:
        given = {"SC": (consistency, "consistency/"), "PQ": (quality, "quality/")}
        expected = {}
        for metric, (ranges, prefix) in given.items():
            highs = [high for _, high in ranges.values()]
            expected[metric] = 10 * min(map(operator.truediv, grades(row, ranges, prefix), highs))
        expected["O"] = math.sqrt(expected["SC"] * expected["PQ"])
        found = {metric: value(tmp_path / "out", metric, tasks[row.item]) for metric in expected}
        assert found == pytest.approx(expected, abs=1e-5)


GRADES: Ranges = {"compliance": (1, 5), "seamlessness": (1, 5), "preservation": (1, 5)}


@pytest.mark.parametrize(
    "ranges",
    [GRADES, {"compliance": (1, 2), "seamlessness": (3, 5), "preservation": (4, 5)}],
    ids=["shipped", "other ranges"],
)
def test_imgedit(evaluate: Evaluate, tmp_path: Path, ranges: Ranges) -> None:
    data, path = write_imgedit(tmp_path / "data", EDITS), asked("imgedit.v1", GRADES, ranges, tmp_path)
    rows, _ = evaluate("imgedit", data, [load_template(path)], "--template", path, "--max-tokens", 2048)
    assert [(row.item, row.reason) for row in rows] == [("1", ""), ("2", "")]
    for row, task in zip(rows, ("add", "adjust"), strict=True):
        given = grades(row, ranges)
        capped = [min(grade, given[0]) for grade in given]
        assert value(tmp_path / "out", "score", task) == pytest.approx(sum(given) / 3)
        assert value(tmp_path / "out", "capped", task) == pytest.approx(sum(capped) / 3)


def test_a_judge_that_is_cut_off_has_failed(evaluate: Evaluate, tmp_path: Path) -> None:
    data = write_imgedit(tmp_path / "data", EDITS)
    rows, printed = evaluate("imgedit", data, [load_template("imgedit.v1")], "--max-tokens", 8)
    assert all(row.values == {} and row.reason.endswith("(cut off at max_tokens)") for row in rows)
    assert [value(tmp_path / "out", "score", task) for task in ("add", "adjust")] == [None, None]
    assert printed.count("failed: 1 x ") + 2 * printed.count("failed: 2 x ") == 2


def test_dpg(evaluate: Evaluate, tmp_path: Path) -> None:
    """Four images; a random judge's labels are not sure of themselves."""
    template = parse_template(QUESTION_TEMPLATE, "question.v1")
    data = write_dpg(tmp_path / "dpg_bench.csv", DPG_ROWS[4:])
    rows, _ = evaluate("dpg", data, [template], "--min-label-mass", 0.02)
    assert [(row.item, row.sample, row.reason) for row in rows] == [("stock_2", sample, "") for sample in range(4)]
    answers = [(row.values["question/1"], row.values["question/2"]) for row in rows]
    assert {answer for pair in answers for answer in pair} <= {0.0, 1.0}
    # The second question counts where the first is answered with yes.
    scores = [(birds + birds * two) / 2 for birds, two in answers]
    assert value(tmp_path / "out", "score", "overall") == pytest.approx(100 * sum(scores) / 4)
