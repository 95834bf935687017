"""Score a benchmark's images, a row an image, so that scoring can be stopped, resumed, and done again by another judge.

A row belongs to an image's pixels and to the scorer's fingerprint. One that has no reason to be missing anything is
not scored again; one that has is tried again whenever scoring is resumed: a judge may be back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdtr.benchmarks.pictures import pixels_digest, resized

if TYPE_CHECKING:
    from pdtr.benchmarks.base import Benchmark, Item, Scorer
    from rewards.base import Images, Prompt, Scores

ROWS = "scores.jsonl"
TOTAL = "total"

Key = tuple[str, int, str, str]


@dataclass(frozen=True)
class Row:
    """What was measured of one image.

    Attributes:
        item: the id of its item.
        sample: which of the item's images.
        image: hash of its pixels.
        scorer: the scorer's fingerprint.
        values: the total and the components that are available.
        reason: why something is not; empty where all is.
    """

    item: str
    sample: int
    image: str
    scorer: str
    values: Mapping[str, float]
    reason: str = ""

    @property
    def key(self) -> Key:
        """What makes two rows of one image by one scorer the same."""
        return self.item, self.sample, self.image, self.scorer


@dataclass(frozen=True)
class Task:
    """One image to score."""

    item: Item
    sample: int
    image: Images

    def row(self, scorer: str, values: Mapping[str, float], reason: str) -> Row:
        """Its row."""
        return Row(self.item.id, self.sample, pixels_digest(self.image), scorer, values, reason)


def score_images(
    benchmark: Benchmark,
    scorer: Scorer,
    root: Path,
    rows_path: Path,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Score what has no row yet; -> the rows of all images, in the order of the items.

    Args:
        benchmark: whose images.
        scorer: what scores them.
        root: the images' folder, in the benchmark's layout.
        rows_path: a JSON lines file, appended to.
        on_images: told (images that have a row, all images) after every batch.

    Raises:
        ValueError: an image is not there, is no picture, or belongs to another prompt; or the rows' file is damaged.
    """
    fingerprint = scorer.fingerprint
    known = {row.key: row for row in read_rows(rows_path)}
    rows: dict[tuple[str, int], Row] = {}
    waiting: list[Task] = []
    total = benchmark.samples * len(benchmark.items)
    for task in _tasks(benchmark, root):
        row = known.get((task.item.id, task.sample, pixels_digest(task.image), fingerprint))
        if row is not None and not row.reason:
            rows[row.item, row.sample] = row
            continue
        waiting.append(task)
        if len(waiting) >= scorer.batch_size:
            rows |= _scored(benchmark, scorer, waiting, rows_path)
            waiting = []
            on_images(len(rows), total)
    if waiting:
        rows |= _scored(benchmark, scorer, waiting, rows_path)
    on_images(len(rows), total)
    return [rows[item.id, sample] for item in benchmark.items for sample in range(benchmark.samples)]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. A last line that was cut off is passed over.

    Raises:
        ValueError: another line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            # Whoever was killed while writing left no line feed.
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}: expected the scores of an image, got a damaged line"
                ) from error
    return rows


def _tasks(benchmark: Benchmark, root: Path) -> Iterator[Task]:
    for item in benchmark.items:
        for sample, image in enumerate(benchmark.layout.read(root, item, benchmark.samples)):
            yield Task(item, sample, image)


def _scored(benchmark: Benchmark, scorer: Scorer, tasks: Sequence[Task], path: Path) -> dict[tuple[str, int], Row]:
    prompts = {task.item.index: task.item.shown() for task in tasks}
    images = [_as_shown(task.image, prompts[task.item.index], benchmark.at_source_size) for task in tasks]
    # Images of one size make an array; those of others wait for nothing, as all arrays are scored at a time.
    by_size: dict[tuple[int, ...], list[int]] = {}
    for position, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(position)
    batches = [
        (np.stack([images[position] for position in positions]), [prompts[tasks[p].item.index] for p in positions])
        for positions in by_size.values()
    ]
    found = asyncio.run(_all_scores(scorer, batches))
    rows: dict[int, Row] = {}
    for positions, scores in zip(by_size.values(), found, strict=True):
        for place, position in enumerate(positions):
            rows[position] = tasks[position].row(scorer.fingerprint, *_values(scores, place))
    ordered = [rows[position] for position in range(len(tasks))]
    _append(path, ordered)
    return {(row.item, row.sample): row for row in ordered}


async def _all_scores(scorer: Scorer, batches: Sequence[tuple[Images, Sequence[Prompt]]]) -> list[Scores]:
    from rewards.scoring import score_async

    return list(await asyncio.gather(*(score_async(scorer.reward, images, prompts) for images, prompts in batches)))


def _as_shown(image: Images, prompt: Prompt, at_source_size: bool) -> Images:
    if not at_source_size or not prompt.source_images:
        return image
    height, width, _ = prompt.source_images[0].shape
    return resized(image, (height, width))


def _values(scores: Scores, place: int) -> tuple[dict[str, float], str]:
    columns = {TOTAL: scores.total, **scores.components}
    found = {name: float(column[place]) for name, column in columns.items()}
    return {name: value for name, value in found.items() if value == value}, scores.reasons.get(place, "")


def _append(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")


def _mend(path: Path) -> None:
    """Cut off a last line without a line feed, so that what is appended starts a line."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)


def _plain(row: Row) -> dict[str, Any]:
    return {**asdict(row), "values": dict(row.values)}
