"""The report's section on reward hacking; see :mod:`pdtr.panel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pdtr import report_figures as figures
from pdtr.panel import hacking_alarm
from pdtr.report_data import TASK_NAMES, RunRecord

# Statistics of the drawn images by figure: the name that is logged, by task, and what the figure is called.
PANEL = {
    "image/saturation": "Saturation",
    "image/edge_density": "Edge density (share of pixels)",
    "image/entropy": "Entropy of grey levels, bits",
    "image/dark_share": "Dark pixels (share)",
    "image/jpeg_bytes": "JPEG bytes an image",
    "image/diversity": "Distance within groups",
    "image/source_distance": "Distance to the source",
}


def panel(run: RunRecord) -> str:
    """Trained reward beside each held-out one, how well the two agree, and the statistics of the images."""
    alarms, parts, agreements = [], [], []
    for task in run.tasks:
        title = TASK_NAMES.get(task, task)
        rivals = run.rivals(task)
        for name, history in rivals.items():
            held_out = f"held-out reward {name}".rstrip()
            caption = f"{title}: trained reward and {held_out} on the tuning prompts"
            parts.append(captioned(caption, figures.divergence_curve(run, history)))
            alarms += [f"{title}, iteration {iteration}: {alarm}" for iteration, alarm in _alarms(history, name)]
        if rivals:
            caption = f"{title}: rank correlation of the two over the prompts"
            agreements.append(captioned(caption, figures.agreement_curve(run, task, rivals)))
    small = [
        captioned(title, figures.metric_curve(run, names))
        for name, title in PANEL.items()
        if (names := by_task(run, name))
    ]
    if not parts and not small:
        return ""
    items = "".join(f"<li>{escape(alarm)}</li>" for alarm in alarms)
    warning = f'<div class="warning"><strong>The reward is being hacked</strong><ul>{items}</ul></div>' if items else ""
    note = (
        "Pictures that all change one way, grow alike within their groups or leave the source as it was give away a "
        "policy that has found a fault of its reward."
    )
    return (
        f'<h2>Is the reward being hacked?</h2><p class="note">{note}</p>{warning}'
        f'<div class="pair">{"".join(parts)}</div><div class="small">{"".join([*agreements, *small])}</div>'
    )


def _alarms(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, str]]:
    """The alarms that went off, each with its iteration."""
    found = ((history[count - 1], hacking_alarm(history[:count], name)) for count in range(2, len(history) + 1))
    return [(int(entry["iteration"]), alarm) for entry, alarm in found if alarm]


def by_task(run: RunRecord, name: str) -> dict[str, str]:
    """The tasks' own metrics of a name that were logged, with the tasks' names."""
    found = {f"{name}/{task}": TASK_NAMES.get(task, task) for task in run.tasks}
    return {key: title for key, title in found.items() if len(figures.series(run, key)[0])}


def captioned(caption: str, svg: str) -> str:
    """A figure as a card with its caption."""
    return f'<figure class="card"><figcaption>{escape(caption)}</figcaption>{svg}</figure>'
