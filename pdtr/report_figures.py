"""The report's figures, drawn by matplotlib without a display, as SVG text that goes into the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pdtr.measures import Measure
from pdtr.panel import agreement
from pdtr.report_data import TASK_NAMES, RunRecord, by_id
from pdtr.statistics import Interval, mean_interval, success_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable with every common colour-vision deficiency (Okabe & Ito).
TASK_COLORS = {"edit": "#0072b2", "t2i": "#d55e00"}
LABEL_COLORS = ("#8a94a6", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
# Of a row of a small figure's legend, the lines beside them left out.
_LEGEND_LETTERS = 36
_STAGE_TINTS = ("#eef4fb", "#fdf3ea", "#eef8f3", "#f8eff5")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pdtr",
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": "#c5ccd8",
    "axes.labelcolor": "#4a5466",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#6b7588",
    "ytick.color": "#6b7588",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaf0",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def held_out_curve(run: RunRecord, task: str) -> str:
    """Held-out success over iterations: the tune set's curve with its interval, the final set's points."""
    with _style():
        figure, axes = _axes(run, (5.6, 3.1))
        color, measure = TASK_COLORS.get(task, LABEL_COLORS[3]), run.measure(task)
        tune = [row for row in run.evaluations if row.get("task") == task and row.get("set") == "tune"]
        points = [(int(row["iteration"]), _interval(run, row)) for row in tune]
        if points:
            x = [iteration for iteration, _ in points]
            y = measure.factor * np.array([interval for _, interval in points])
            axes.fill_between(x, y[:, 1], y[:, 2], color=color, alpha=0.15, linewidth=0)
            axes.plot(x, y[:, 0], color=color, marker="o", markersize=3, label="tuning prompts")
        finals = [row for row in run.evaluations if row.get("task") == task and row.get("set") == "final"]
        for index, row in enumerate(finals):
            value, low, high = (measure.factor * part for part in _interval(run, row))
            error = [[max(value - low, 0)], [max(high - value, 0)]]
            label = "final prompts" if index == 0 else None
            place = int(row["iteration"])
            # Not clipped: the base and the last stage lie on the axes' edges.
            axes.errorbar(place, value, error, fmt="D", color="#2b3445", markersize=5, label=label, clip_on=False)
        axes.set_ylabel(measure.axis)
        if points or finals:
            axes.legend(loc="best", fontsize=8)
        return _svg(figure)


def reward_curve(run: RunRecord, task: str) -> str:
    """Training reward over iterations: each iteration's mean, and the mean over a window within the stage."""
    with _style():
        figure, axes = _axes(run, (5.6, 3.1))
        color = TASK_COLORS.get(task, LABEL_COLORS[3])
        x, y = series(run, f"reward/{task}")
        axes.plot(x, y, ".", color=color, alpha=0.35, markersize=4, label="mean of an iteration")
        window = max(5, len(run.metrics) // 15)
        for index, (_, first, last) in enumerate(run.stages):
            inside = (x >= first) & (x <= last)
            means = np.array(smooth(y[inside], window)).reshape(-1, 3)
            label = f"mean over {window} iterations" if index == 0 else None
            axes.fill_between(x[inside], means[:, 1], means[:, 2], color=color, alpha=0.15, linewidth=0)
            axes.plot(x[inside], means[:, 0], color=color, label=label)
        axes.set_ylabel("reward")
        axes.legend(loc="best", fontsize=8)
        return _svg(figure)


def divergence_curve(run: RunRecord, history: Sequence[Mapping[str, Any]]) -> str:
    """Means of the trained and of the held-out reward over iterations, with their intervals over prompts."""
    with _style():
        figure, axes = _axes(run, (5.6, 3.1))
        x = [int(entry["iteration"]) for entry in history]
        for index, (name, label) in enumerate({"trained": "trained on", "reward": "held out"}.items()):
            y = np.array([mean_interval(entry[name]) for entry in history])
            color = LABEL_COLORS[index % len(LABEL_COLORS)]
            axes.fill_between(x, y[:, 1], y[:, 2], color=color, alpha=0.15, linewidth=0)
            axes.plot(x, y[:, 0], color=color, marker="o", markersize=3, label=label)
        axes.set_ylabel("reward")
        axes.legend(loc="best", fontsize=8)
        return _svg(figure)


def agreement_curve(run: RunRecord, task: str, rivals: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Spearman's correlation over the prompts of the trained reward with each held-out one, over iterations."""
    with _style():
        figure, axes = _axes(run, (3.6, 2.1))
        for index, (name, history) in enumerate(rivals.items()):
            x = [int(entry["iteration"]) for entry in history]
            y = [agreement(entry["trained"], entry["reward"]) for entry in history]
            color = LABEL_COLORS[3 + index % 3] if name else TASK_COLORS.get(task, LABEL_COLORS[3])
            axes.plot(x, y, color=color, marker="o", markersize=3, label=name or "held out")
        axes.set_ylim(top=1.02)
        if len(rivals) > 1 or "" not in rivals:
            axes.legend(loc="best", fontsize=8)
        return _svg(figure)


def metric_curve(run: RunRecord, names: Mapping[str, str]) -> str:
    """Curves of some metrics over iterations in one small figure; ``names`` gives each its legend."""
    names = {name: _shortened(label) for name, label in names.items()}
    num_columns = max(1, min(3, _LEGEND_LETTERS // max(map(len, names.values()))))
    num_rows = math.ceil(len(names) / num_columns)
    with _style():
        # Two rows of the legend fit above the axes; for more the figure grows.
        figure, axes = _axes(run, (3.6, 2.1 + 0.19 * max(0, num_rows - 2)))
        for index, (name, label) in enumerate(names.items()):
            x, y = series(run, name)
            color = TASK_COLORS.get(name.rpartition("/")[2], LABEL_COLORS[(index + 1) % len(LABEL_COLORS)])
            axes.plot(x, y, color=color, linewidth=1.3, label=label, marker="." if len(x) == 1 else "")
        axes.locator_params(axis="y", nbins=5)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        values = np.unique(np.concatenate([series(run, name)[1] for name in names]))
        if len(values) == 1:
            axes.set_yticks(values, [f"{values[0]:.4g}"])
        if len(names) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=num_columns, fontsize=8, columnspacing=1.2)
        return _svg(figure)


def _shortened(label: str) -> str:
    """A label that fits into a small figure's legend; its two ends tell labels apart."""
    half = (_LEGEND_LETTERS - 1) // 2
    return label if len(label) <= _LEGEND_LETTERS else f"{label[:half]}…{label[-half:]}"


def skill_figure(skills: Sequence[str], columns: Mapping[str, Mapping[str, Any]], measure: Measure) -> str:
    """Success by skill, a dot with its interval for each moment; ``columns`` has scores a prompt by label."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(5.6, 0.9 + 0.42 * len(skills)), layout="constrained")
        axes = figure.subplots()
        offsets = np.linspace(-0.22, 0.22, len(columns)) if len(columns) > 1 else np.zeros(1)
        for index, (label, scores) in enumerate(columns.items()):
            found = [success_interval(list(by_id(scores, skill).values())) for skill in skills]
            values = measure.factor * np.array(found).reshape(-1, 3)
            errors = np.abs(values[:, 1:] - values[:, :1]).T
            y = np.arange(len(skills)) + offsets[index]
            color = LABEL_COLORS[index % len(LABEL_COLORS)]
            axes.errorbar(
                values[:, 0], y, xerr=errors, fmt="o", color=color, markersize=4.5, elinewidth=1.2, label=label
            )
        axes.set_yticks(range(len(skills)), [skill or "(none)" for skill in skills])
        axes.invert_yaxis()
        if measure.is_share:
            axes.set_xlim(-2, 102)
        axes.set_xlabel(measure.axis)
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8.5)
        return _svg(figure)


def series(run: RunRecord, name: str) -> tuple[Any, Any]:
    """Iterations and values of a metric where it was logged as a finite number, two float arrays [n]."""
    rows = [(row["iteration"], row[name]) for row in run.metrics if isinstance(row.get(name), int | float)]
    found = np.array(rows, dtype=np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def smooth(values: Sequence[float], window: int) -> list[Interval]:
    """Mean and Student's interval over a centred window, cut off at the ends; one for each value."""
    half = window // 2
    return [mean_interval(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _interval(run: RunRecord, row: Mapping[str, Any]) -> Interval:
    scores = run.scores(row)
    if scores is not None:
        return success_interval(scores["strict"])
    mean = row.get("strict")
    return Interval(float("nan") if mean is None else float(mean), float("nan"), float("nan"))


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]


def _axes(run: RunRecord, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Axes over iterations with the stages shaded."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    axes: Axes = figure.subplots()
    tints = {
        name: _STAGE_TINTS[i % len(_STAGE_TINTS)] for i, name in enumerate(dict.fromkeys(s[0] for s in run.stages))
    }
    for name, first, last in run.stages:
        axes.axvspan(first - 1, last, color=tints[name], linewidth=0, zorder=0)
        if size[0] > 4 and len(run.stages) <= 6:
            middle = ((first - 1 + last) / 2, 1.01)
            text = TASK_NAMES.get(name, name)
            axes.annotate(text, middle, xycoords=("data", "axes fraction"), ha="center", fontsize=8.5, color="#6b7588")
    if run.stages:
        axes.set_xlim(0, max(run.stages[-1][2], 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if size[0] > 4:
        axes.set_xlabel("iteration")
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element that scales with its column."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    element = stream.getvalue()
    element = element[element.index("<svg") :]
    # Several figures share the page: groups need no names, and the size is the column's.
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    head, rest = element.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest
