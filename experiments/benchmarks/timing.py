"""Timing on a machine that is not quiet: calls in turn, medians, bootstrap intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experiments.benchmarks.tables import quantity, text_table
from pdtr.statistics import Interval


@dataclass(frozen=True)
class Measurement:
    """One figure; a row of the CSV.

    Attributes:
        quantity: what was measured.
        case: of what: task, sampler, algorithm or command.
        value: in ``unit``.
        low: 95 % interval; NaN where there is none.
        high: see ``low``.
        n: repeats.
        unit: of the three.
        machine: on which.
    """

    quantity: str
    case: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    machine: str


def shown(row: Measurement, form: str = "") -> str:
    """The figure with its interval; unless a form is given, ratios have three decimals and others four digits."""
    return quantity(Interval(row.value, row.low, row.high), form or (".3f" if row.unit == "ratio" else ".4g"))


def figures_table(found: Sequence[Measurement]) -> str:
    """A line a figure, with its repeats."""
    rows = [[f"{row.quantity}: {row.case}", str(row.n), shown(row), row.unit] for row in found]
    return text_table(["", "n", "value", "unit"], rows)


def cases_table(found: Sequence[Measurement]) -> str:
    """A line a figure of as many repeats each, its case in a column of its own."""
    rows = [[row.quantity, row.case, shown(row, ".3f"), row.unit] for row in found]
    return text_table(["", "case", "value", "unit"], rows)


def interleaved(calls: Mapping[str, Callable[[], object]], num_repeats: int) -> dict[str, NDArray[np.float64]]:
    """Seconds of every call at every repeat, ``{name: [num_repeats]}``.

    All calls are made once a repeat, in an order that turns round each time, so that what else the machine does falls
    on all alike. One more round goes first and is not counted.
    """
    if num_repeats < 1:
        raise ValueError(f"repeats: expected 1 or more, got {num_repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-1, num_repeats):
        names = list(calls) if repeat % 2 == 0 else list(calls)[::-1]
        for name in names:
            started = time.perf_counter()
            calls[name]()
            elapsed = time.perf_counter() - started
            if repeat >= 0:
                seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}


def median_interval(values: ArrayLike, num_resamples: int = 10_000, seed: int = 0) -> Interval:
    """Median with its 95 % percentile bootstrap interval.

    Args:
        values: [n], at least one.
        num_resamples: draws of n values each, with replacement.
        seed: of the draws.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) == 0:
        raise ValueError(f"values: expected an array [n] with at least one value, got shape {list(found.shape)}")
    draws = np.random.default_rng(seed).integers(len(found), size=(num_resamples, len(found)))
    low, high = np.quantile(np.median(found[draws], axis=1), (0.025, 0.975))
    return Interval(float(np.median(found)), float(low), float(high))
