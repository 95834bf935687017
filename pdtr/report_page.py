"""The report's sections as HTML; everything that a run wrote is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from pdtr import report_figures as figures
from pdtr.measures import Measure
from pdtr.progress import duration
from pdtr.report_data import BASE, TASK_NAMES, RunRecord, by_id, difference
from pdtr.report_images import grids
from pdtr.report_matrix import Cell, Row
from pdtr.report_panel import by_task, captioned, panel
from pdtr.statistics import Interval, success_interval

# Metrics by figure: the name that is logged (by task or not), and what the figure is called.
DIAGNOSTICS = {
    "grad_norm": "Gradient norm before clipping",
    "kl_loss": "KL to the reference",
    "approx_kl": "KL to the policy that acted",
    "ratio": "Importance ratio",
    "clip_fraction": "Clipped share",
    "policy_loss": "Policy loss",
    "old_distance": "Distance to the old policy",
    "zero_std_ratio": "Groups without spread (share)",
    "missing_ratio": "Missing rewards (share)",
    "group_std": "Spread within groups",
    "advantage_abs_mean": "Mean absolute advantage",
    "learning_rate": "Learning rate",
    "skipped_updates": "Skipped updates (share)",
}
TIMES = {
    "seconds_rollout": "rollouts",
    "seconds_update": "updates",
    "seconds_scored": "rewards",
    "seconds_waited": "waiting for them",
}


def body(run: RunRecord, rows: list[Row]) -> str:
    """The whole page below <main>."""
    sections = [_head(run, rows), _matrix(run, rows), _curves(run), _skills(run), grids(run)]
    sections += [panel(run), _diagnostics(run)]
    # The problems last: the other sections may still find some.
    return "\n".join([sections[0], _problems(run), *sections[1:], _facts(run)])


def shown(measure: Measure, value: float, sign: str = "") -> str:
    """A value of a measure, or a difference with the sign "+"; a real minus sign."""
    return measure.told(value, sign).replace("-", "−")


def change(measure: Measure, found: Interval | None, what: str) -> str:
    """A difference with its interval, coloured where the interval clears 0."""
    if found is None or math.isnan(found.value):
        return ""
    kind = {1: " up", 0: "", -1: " down"}[found.sign]
    value, low, high = (shown(measure, part, "+") for part in found)
    text = f"{value} [{low}, {high}] {what}"
    return f'<span class="change{kind}">{escape(text)}</span>'


def task_name(task: str) -> str:
    """A task's name for people, escaped."""
    return escape(TASK_NAMES.get(task, task))


def _head(run: RunRecord, rows: list[Row]) -> str:
    heroes = "".join(_hero(run, task, [row["cells"][task] for row in rows]) for task in run.tasks)
    facts = [" → ".join(dict.fromkeys(TASK_NAMES.get(name, name) for name, _, _ in run.stages))]
    facts.append(f"{len(run.metrics)} iterations" if run.metrics else "no iterations yet")
    if run.metrics and isinstance(run.metrics[-1].get("seconds"), int | float):
        facts.append(duration(run.metrics[-1]["seconds"]))
    facts += [f"seed {run.config['seed']}"] if "seed" in run.config else []
    facts += [f"started {run.config['started']}"] if "started" in run.config else []
    title = escape(str(run.config.get("recipe") or run.folder.name))
    subtitle = escape(" · ".join(str(fact) for fact in facts if fact))
    return f'<h1>{title}</h1>\n<p class="sub">{subtitle}</p>\n<div class="heroes">{heroes}</div>'


def _hero(run: RunRecord, task: str, cells: list[Cell | None]) -> str:
    known = [cell for cell in cells if cell is not None]
    if not known:
        return f'<div class="card hero"><div class="name">{task_name(task)}</div><div>not measured yet</div></div>'
    first, last = known[0], known[-1]
    measure = run.measure(task)
    numbers = shown(measure, last["score"].value)
    if len(known) > 1:
        numbers = f"{shown(measure, first['score'].value)} → {numbers}"
    unit = " <small>%</small>" if measure.is_share else ""
    return (
        f'<div class="card hero"><div class="name">{task_name(task)}, held-out {escape(measure.name)}</div>'
        f'<div class="numbers">{numbers}{unit}</div>{change(measure, last["over_base"], "over base")}</div>'
    )


def _problems(run: RunRecord) -> str:
    if not run.problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<div class="warning"><strong>This report is partial</strong><ul>{items}</ul></div>'


def _matrix(run: RunRecord, rows: list[Row]) -> str:
    measures = {task: escape(run.measure(task).axis) for task in run.tasks}
    head = "".join(f'<th>{task_name(task)}<div class="dim">{what}</div></th>' for task, what in measures.items())
    lines = []
    for row in rows:
        when = "not measured yet" if row["iteration"] is None else f"iteration {row['iteration']}"
        label = f'<th scope="row">{escape(row["label"])}<div class="dim">{when}</div></th>'
        cells = "".join(
            _matrix_cell(run.measure(task), row["cells"][task], len(rows) > 1 and row is rows[1]) for task in run.tasks
        )
        lines.append(f"<tr>{label}{cells}</tr>")
    return (
        "<h2>What each stage did to each task</h2>"
        '<p class="note">Scores on held-out prompts that were never used for choosing, with 95 % intervals (Wilson’s '
        "where each is 0 or 1, the bootstrap’s elsewhere). Differences, of percentages in points, are over the same "
        "prompts with the same noise, with 95 % paired bootstrap intervals; they are coloured where the interval "
        "clears 0.</p>"
        f'<div class="card scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _matrix_cell(measure: Measure, cell: Cell | None, is_second: bool) -> str:
    """``is_second``: the row before is the base, so that one difference says both."""
    if cell is None:
        return '<td class="dim">not measured yet</td>'
    value, low, high = (shown(measure, part) for part in cell["score"])
    missing = f", {cell['missing']} missing" if cell["missing"] else ""
    previous = "" if is_second and cell["over_base"] else change(measure, cell["over_previous"], "over the row before")
    return (
        f'<td><span class="value">{value}</span> <span class="range">[{low}, {high}]'
        f" of {cell['count']} prompts{missing}</span><br>"
        f"{previous}{change(measure, cell['over_base'], 'over base')}</td>"
    )


def _curves(run: RunRecord) -> str:
    held_out = [
        captioned(f"{TASK_NAMES.get(task, task)}: held-out {run.measure(task).name}", figures.held_out_curve(run, task))
        for task in run.tasks
        if any(row.get("task") == task for row in run.evaluations)
    ]
    rewards = [
        captioned(f"{TASK_NAMES.get(task, task)}: training reward", figures.reward_curve(run, task))
        for task in run.tasks
        if len(figures.series(run, f"reward/{task}")[0])
    ]
    groups = "".join(f'<div class="pair">{"".join(group)}</div>' for group in (held_out, rewards) if group)
    note = (
        "Bands are 95 % intervals: Wilson’s over the prompts of an evaluation (of a reward the bootstrap’s), Student’s "
        "over the iterations of a "
        "window that stays within its stage. Shaded: the stages."
    )
    empty = '<p class="note">Nothing was logged yet.</p>'
    return f'<h2>Learning curves</h2><p class="note">{note}</p>{groups or empty}'


def _skills(run: RunRecord) -> str:
    parts = [part for task in run.tasks if (part := _task_skills(run, task))]
    return f'<h2>Success by skill</h2><div class="pair">{"".join(parts)}</div>' if parts else ""


def _task_skills(run: RunRecord, task: str) -> str:
    found = {label: run.final(label, task) for label in run.labels}
    columns = {label: scores for label, row in found.items() if row is not None and (scores := run.scores(row))}
    skills = list(dict.fromkeys(skill for scores in columns.values() for skill in scores["skills"]))
    if not any(skills):
        return ""
    last, measure = list(columns)[-1], run.measure(task)
    lines = []
    for skill in skills:
        rates = [success_interval(list(by_id(scores, skill).values())).value for scores in columns.values()]
        cells = "".join(f"<td>{shown(measure, rate)}</td>" for rate in rates)
        if BASE in columns and last != BASE:
            over = change(measure, difference(by_id(columns[last], skill), by_id(columns[BASE], skill)), "")
            cells += f"<td>{over}</td>"
        lines.append(f"<tr><td>{escape(skill) or '(none)'}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(label)}</th>" for label in columns)
    head += "<th>change over base</th>" if BASE in columns and last != BASE else ""
    table = f"<table><thead><tr><th>skill</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    svg = figures.skill_figure(skills, columns, measure)
    return f'<div class="card"><h3>{task_name(task)}</h3>{svg}<div class="scroll">{table}</div></div>'


def _diagnostics(run: RunRecord) -> str:
    if not run.metrics:
        return ""
    logged = {name for row in run.metrics for name in row if len(figures.series(run, name)[0])}
    parts, absent = [], []
    for name, title in DIAGNOSTICS.items():
        names = {**({name: title} if name in logged else {}), **by_task(run, name)}
        if names:
            parts.append(captioned(title, figures.metric_curve(run, names)))
        else:
            absent.append(title)
    for task in run.tasks:
        own = sorted(name for name in logged if name.startswith(f"reward/{task}/"))
        if own:
            legends = {name: name.rpartition("/")[2] for name in own}
            parts.append(
                captioned(f"Reward components, {TASK_NAMES.get(task, task)}", figures.metric_curve(run, legends))
            )
    times = {name: label for name, label in TIMES.items() if name in logged}
    parts += [captioned("Seconds an iteration", figures.metric_curve(run, times))] if times else []
    note = f'<p class="note">Not logged: {escape("; ".join(absent))}.</p>' if absent else ""
    return f'<h2>Diagnostics</h2>{note}<div class="small">{"".join(parts)}</div>'


def _facts(run: RunRecord) -> str:
    command = str(run.config.get("command", ""))
    shown = f"<pre>{escape(command)}</pre>" if command else ""
    facts = {"folder": str(run.folder), **{key: run.config[key] for key in ("seed", "started") if key in run.config}}
    if run.metrics and isinstance(run.metrics[-1].get("seconds"), int | float):
        facts["time in iterations"] = duration(run.metrics[-1]["seconds"])
    versions = run.config.get("versions")
    facts |= versions if isinstance(versions, Mapping) else {}
    settings = flat(run.config.get("config", {}))
    return (
        "<h2>How to get this again</h2>"
        f'<div class="pair"><div class="card">{shown}{_table(facts)}</div>'
        f'<div class="card"><details open><summary>Configuration</summary>{_table(settings)}</details></div></div>'
    )


def _table(facts: Mapping[str, Any]) -> str:
    lines = "".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in facts.items())
    return f'<table class="facts"><tbody>{lines}</tbody></table>' if lines else '<p class="note">unknown</p>'


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested JSON as dotted names, in order; a class's own name stands where the class is."""
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, entry in value.items():
            name = prefix if key == "class" and prefix else f"{prefix}.{key}" if prefix else str(key)
            found |= flat(entry, name)
        return found
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return {key: text for i, entry in enumerate(value) for key, text in flat(entry, f"{prefix}[{i}]").items()}
    return {prefix: value if isinstance(value, str) else json.dumps(value)}
