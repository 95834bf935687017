"""The interference matrix: what each stage of a run did to each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from pdtr.report_data import BASE, RunRecord, by_id, difference, success_of
from pdtr.statistics import Interval, success_interval


class Cell(TypedDict):
    """One task at one moment; every interval is of 95 %, scores are shares of 1.

    ``over_previous`` and ``over_base`` are paired differences to the row before and to the base; None in the base's own
    row, and where the scores of either side are missing. ``success`` is the component that is counted.
    """

    score: Interval
    success: str
    count: int
    missing: int
    over_previous: Interval | None
    over_base: Interval | None


class Row(TypedDict):
    """One row of the interference matrix; a task that was not measured then has None."""

    label: str
    iteration: int | None
    cells: dict[str, Cell | None]


def interference_rows(run: RunRecord) -> list[Row]:
    """The interference matrix of a run: what each stage did to each task."""
    rows: list[Row] = []
    known: dict[str, dict[str, dict[str, float]]] = {task: {} for task in run.tasks}
    previous = ""
    for label in run.labels:
        cells: dict[str, Cell | None] = {}
        iteration = None
        for task in run.tasks:
            evaluation = run.final(label, task)
            cells[task] = None if evaluation is None else _cell(run, evaluation, known[task], previous)
            iteration = iteration if evaluation is None else int(evaluation["iteration"])
        rows.append({"label": label, "iteration": iteration, "cells": cells})
        previous = label
    return rows


def _cell(run: RunRecord, evaluation: Mapping[str, Any], known: dict[str, dict[str, float]], previous: str) -> Cell:
    """One cell; ``known`` has the task's earlier scores, by label and id, and is added to."""
    scores, success = run.scores(evaluation), success_of(evaluation)
    if scores is None:
        mean = evaluation.get("strict")
        unknown = Interval(float("nan") if mean is None else float(mean), float("nan"), float("nan"))
        counts = int(evaluation.get("count") or 0), int(evaluation.get("missing") or 0)
        return {
            "score": unknown,
            "success": success,
            "count": counts[0],
            "missing": counts[1],
            "over_previous": None,
            "over_base": None,
        }
    own = by_id(scores)
    values: NDArray[np.float64] = scores["strict"]
    cell: Cell = {
        "score": success_interval(values),
        "success": success,
        "count": len(values),
        "missing": int(np.isnan(values).sum()),
        "over_previous": difference(own, known[previous]) if previous in known else None,
        "over_base": difference(own, known[BASE]) if BASE in known else None,
    }
    known[str(evaluation["label"])] = own
    return cell
