"""The report's images: the same prompts before and after, cut from the strips that evaluations leave."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdtr.logbook import EVALUATION_FOLDER
from pdtr.report_data import TASK_NAMES, RunRecord, strip_of


def grids(run: RunRecord) -> str:
    """The section with the images of each task."""
    parts = [part for task in run.tasks if (part := _task_grid(run, task))]
    if not parts:
        return ""
    measures = ", ".join(dict.fromkeys(run.measure(task).name for task in run.tasks))
    note = f"The first held-out prompts, not chosen; the same noise at every moment. Ticks: {escape(measures)}."
    return f'<h2>Before and after</h2><p class="note">{note}</p>{"".join(parts)}'


def cut_strip(path: Path, count: int) -> list[NDArray[np.uint8]]:
    """The images of a strip, uint8 [H, W, 3] each.

    Raises:
        ValueError: the file cannot be read, or is not ``count`` images wide.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            strip = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path}: expected a strip of {count} images, got {type(error).__name__}") from error
    if count < 1 or strip.shape[1] % count:
        raise ValueError(f"{path}: expected {count} images side by side, got a width of {strip.shape[1]} pixels")
    return list(np.split(strip, count, axis=1))


def data_uri(image: NDArray[np.uint8]) -> str:
    """An image as a PNG in a data URI."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _task_grid(run: RunRecord, task: str) -> str:
    found = {label: row for label in run.labels if (row := run.final(label, task)) is not None}
    if not found:
        return ""
    texts = _texts(run, task)
    count = _count(run, next(iter(found.values())), texts)
    columns: dict[str, list[NDArray[np.uint8]]] = {}
    sources = run.folder / EVALUATION_FOLDER / f"sources-{task}.png"
    if sources.exists():
        _add(run, columns, "source", sources, count)
    for label, row in found.items():
        _add(run, columns, label, run.folder / strip_of(row), count)
    if not columns:
        return ""
    scores = {label: run.scores(row) for label, row in found.items()}
    cards = "".join(_card(index, texts, columns, scores) for index in range(count))
    return f'<h3 style="margin-top:18px">{escape(TASK_NAMES.get(task, task))}</h3><div class="grid">{cards}</div>'


def _add(run: RunRecord, columns: dict[str, list[NDArray[np.uint8]]], label: str, path: Path, count: int) -> None:
    try:
        columns[label] = cut_strip(path, count)
    except ValueError as error:
        run.note(str(error))


def _card(
    index: int,
    texts: Sequence[str],
    columns: Mapping[str, list[NDArray[np.uint8]]],
    scores: Mapping[str, Mapping[str, Any] | None],
) -> str:
    text = texts[index] if index < len(texts) else _first_id(index, scores)
    single = min(found[index].shape[1] for found in columns.values())
    images = "".join(
        f"<figure{_wide(found[index].shape[1] // single)}>"
        f'<img src="{data_uri(found[index])}" alt="{escape(label)}: {escape(text)}">'
        f"<figcaption>{escape(label)}{_mark(index, scores.get(label))}</figcaption></figure>"
        for label, found in columns.items()
    )
    return f'<div class="card sample"><p>{escape(text)}</p><div class="row">{images}</div></div>'


def _wide(count: int) -> str:
    """Has a figure of several pictures side by side show each as large as a single one."""
    return f' style="--pictures: {count}"' if count > 1 else ""


def _mark(index: int, scores: Mapping[str, Any] | None) -> str:
    if scores is None or index >= len(scores["strict"]) or np.isnan(scores["strict"][index]):
        return ""
    value = float(scores["strict"][index])
    if value in (0.0, 1.0):
        return ' <span class="hit">✓</span>' if value else ' <span class="miss">✗</span>'
    return f" {value:.2f}"


def _first_id(index: int, scores: Mapping[str, Mapping[str, Any] | None]) -> str:
    known = next((found["ids"] for found in scores.values() if found is not None and index < len(found["ids"])), None)
    return f"prompt {index + 1}" if known is None else str(known[index])


def _texts(run: RunRecord, task: str) -> list[str]:
    path = run.folder / EVALUATION_FOLDER / f"prompts-{task}.json"
    try:
        return [str(text) for text in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        run.note(f"{path.name} cannot be read ({type(error).__name__}): images are named by their prompts’ ids.")
        return []


def _count(run: RunRecord, row: Mapping[str, Any], texts: Sequence[str]) -> int:
    """How many images a strip has: as the evaluation says, else as many as there are texts, else as configured."""
    evaluation = run.config.get("config", {}).get("evaluation", {})
    configured = evaluation.get("num_grid", 0) if isinstance(evaluation, Mapping) else 0
    return int(row.get("num_images") or len(texts) or min(int(configured), int(row.get("count") or 0)))
