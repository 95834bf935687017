"""One picture of a run, for a README or a slide: fixed held-out prompts, at the base and at the end."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdtr.logbook import EVALUATION_FOLDER
from pdtr.report_data import RunRecord, read_run, strip_of
from pdtr.report_images import cut_strip

NAME = "before_after.png"
_TITLES = {"edit": "Editing", "t2i": "Text-to-image"}


def write_picture(run_folder: Path, count: int = 6) -> Path:
    """Draw ``before_after.png`` into a run's folder: the first prompts of each task, not chosen, same noise.

    Args:
        run_folder: a run that has evaluated its base and at least one stage.
        count: prompts a task.

    Returns:
        The picture's path.

    Raises:
        ValueError: the folder holds no run, or no images before and after.
    """
    run = read_run(run_folder)
    rows = [
        (f"{_TITLES.get(task, task)}: {label}", *column) for task in run.tasks for label, column in _rows(run, task)
    ]
    if not rows:
        raise ValueError(f"{run_folder}: expected images of the base and of a stage's end, found none")
    path = run_folder / NAME
    _draw(rows, count, path)
    return path


def _rows(run: RunRecord, task: str) -> list[tuple[str, tuple[list[str], list[NDArray[np.uint8]]]]]:
    """(label, (texts, images)) for the source, the base and the last stage."""
    moments = [(label, run.final(label, task)) for label in run.labels]
    found = [(label, row) for label, row in moments if row is not None and row.get("num_images")]
    if len(found) < 2:
        return []
    folder = run.folder / EVALUATION_FOLDER
    texts = [str(text) for text in json.loads((folder / f"prompts-{task}.json").read_text("utf-8"))]
    number = int(found[0][1]["num_images"])
    rows = []
    if (folder / f"sources-{task}.png").exists():
        rows.append(("source", (texts, cut_strip(folder / f"sources-{task}.png", number))))
    for name, (_, row) in (("before", found[0]), ("after", found[-1])):
        rows.append((name, (texts, cut_strip(run.folder / strip_of(row), number))))
    return rows


def _draw(rows: list[tuple[str, list[str], list[NDArray[np.uint8]]]], count: int, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(count, *(len(images) for _, _, images in rows))
    # Several sources stand side by side: columns are that much wider, so that all pictures are of one scale.
    shapes = [images[0].shape[1] / images[0].shape[0] for _, _, images in rows]
    wide = max(shapes) / min(shapes)
    figure = Figure(figsize=(1.55 * wide * count, 1.75 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(rows), count, squeeze=False)
    previous: list[str] = []
    for line, (label, texts, images) in enumerate(rows):
        for column in range(count):
            axis = axes[line][column]
            axis.imshow(images[column], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if texts is not previous:
                axis.set_title("\n".join(textwrap.wrap(texts[column], int(22 * wide))), fontsize=7)
        axes[line][0].set_ylabel(label.replace(": ", "\n"), fontsize=8)
        previous = texts
    figure.savefig(path)
