"""The report's section on reward hacking; see :mod:`pdtr.panel`."""

from __future__ import annotations

from html import escape

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
    """Trained reward beside held-out reward where they are not one, and the statistics of the images."""
    alarms, parts = [], []
    for task in run.tasks:
        history = run.trained_history(task)
        if history:
            caption = f"{TASK_NAMES.get(task, task)}: trained and held-out reward on the tuning prompts"
            parts.append(captioned(caption, figures.divergence_curve(run, history)))
        found = (hacking_alarm(history[:count]) for count in range(2, len(history) + 1))
        alarms += [
            f"{TASK_NAMES.get(task, task)}, iteration {entry['iteration']}: {alarm}"
            for entry, alarm in zip(history[1:], found, strict=True)
            if alarm
        ]
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
        f'<div class="pair">{"".join(parts)}</div><div class="small">{"".join(small)}</div>'
    )


def by_task(run: RunRecord, name: str) -> dict[str, str]:
    """The tasks' own metrics of a name that were logged, with the tasks' names."""
    found = {f"{name}/{task}": TASK_NAMES.get(task, task) for task in run.tasks}
    return {key: title for key, title in found.items() if len(figures.series(run, key)[0])}


def captioned(caption: str, svg: str) -> str:
    """A figure as a card with its caption."""
    return f'<figure class="card"><figcaption>{escape(caption)}</figcaption>{svg}</figure>'
