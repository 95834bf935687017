"""report.html: what a run did, in one file that needs no server; and its headline table for the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

from pdtr.measures import STRICT, Measure
from pdtr.report_data import TASK_NAMES, read_run
from pdtr.report_matrix import Cell, Row, interference_rows
from pdtr.statistics import Interval


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, finished or not; what is missing is said in it.

    Returns:
        The report's path.

    Raises:
        ValueError: the folder holds no run; the nearest ones are named.
    """
    from html import escape

    from pdtr.report_page import body

    run = read_run(run_folder)
    template = Template((files("pdtr") / "templates" / "report.html").read_text("utf-8"))
    title = escape(str(run.config.get("recipe") or run_folder.name)) + " · report"
    page = template.substitute(title=title, body=body(run, interference_rows(run)))
    path = run_folder / "report.html"
    temporary = path.with_name("report.html.tmp")
    temporary.write_text(page, "utf-8")
    os.replace(temporary, path)
    return path


def interference_table(run_folder: Path) -> list[Row]:
    """The interference matrix: a row for the base and after each stage, a cell for each task.

    Returns:
        Dictionaries as :class:`pdtr.report_matrix.Row` describes them; shares of 1, not percent.

    Raises:
        ValueError: the folder holds no run; the nearest ones are named.
    """
    return interference_rows(read_run(run_folder))


def format_table(rows: Sequence[Row]) -> str:
    """The interference matrix as plain text; ``*`` where a difference's interval clears 0.

    Shares are in percent, their differences in points; mean rewards are on their own scale.
    """
    tasks = list(dict.fromkeys(task for row in rows for task in row["cells"]))
    named = {task: _measures(rows, task) for task in tasks}
    heads = [f"{TASK_NAMES.get(task, task)}{f' ({measure})' if measure else ''}" for task, measure in named.items()]
    lines = [["", *heads]]
    for index, row in enumerate(rows):
        cells = [row["cells"].get(task) for task in tasks]
        lines.append([row["label"], *(_score(cell) for cell in cells)])
        if index > 1:
            lines.append(["  over the row before", *(_change(cell, "over_previous") for cell in cells)])
        if index > 0:
            lines.append(["  over base", *(_change(cell, "over_base") for cell in cells)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(tasks) + 1)]
    text = ["  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    what = "scores" if any(named.values()) else "strict success in %"
    return "\n".join([f"Held-out {what}, with 95 % intervals; * where a change clears 0", *text])


def _measures(rows: Sequence[Row], task: str) -> str:
    """What a task's scores are of; empty where all are strict success."""
    found = {cell["success"] for row in rows if (cell := row["cells"].get(task)) is not None}
    return "" if found <= {STRICT} else ", ".join(sorted(Measure(success).axis for success in found))


def _score(cell: Cell | None) -> str:
    return "not measured" if cell is None else _told(cell, cell["score"], "")


def _change(cell: Cell | None, over: Literal["over_previous", "over_base"]) -> str:
    found = None if cell is None else cell[over]
    return "" if cell is None or found is None else _told(cell, found, "+") + (" *" if found.sign else "")


def _told(cell: Cell, found: Interval, sign: str) -> str:
    value, low, high = (Measure(cell["success"]).told(part, sign) for part in found)
    return f"{value} [{low}, {high}]"
