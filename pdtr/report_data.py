"""What a report is made of: a run's folder read leniently, and the interference matrix."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdtr.evaluate import HELD_OUT
from pdtr.logbook import EVALUATION_FOLDER, EVALUATIONS, METRICS, read_evaluations, read_metrics, read_scores
from pdtr.measures import REWARD, STRICT, Measure
from pdtr.statistics import Interval, paired_bootstrap
from pdtr.tasks import TRAINED

CONFIG = "config.json"
BASE = "base"
TASK_NAMES = {"edit": "Editing", "t2i": "Text-to-image"}


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        folder: the run's.
        config: config.json; empty where it cannot be read.
        metrics: a row an iteration.
        evaluations: a row an evaluation of one task.
        problems: what is missing or damaged, in sentences.
    """

    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    problems: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """Every task that was practised or measured; editing and text-to-image first."""
        seen = [str(row["task"]) for row in self.evaluations if "task" in row]
        seen += [str(task) for row in self.metrics for task in row.get("tasks", ())]
        return [task for task in TASK_NAMES if task in seen] + sorted(set(seen) - set(TASK_NAMES))

    @property
    def stages(self) -> list[tuple[str, int, int]]:
        """(name, first iteration, last iteration) of each stretch of iterations with one stage."""
        found: list[tuple[str, int, int]] = []
        for row in self.metrics:
            name, iteration = str(row.get("stage_name") or "training"), int(row["iteration"])
            if found and found[-1][0] == name:
                found[-1] = (name, found[-1][1], iteration)
            else:
                found.append((name, iteration, iteration))
        return found

    @property
    def labels(self) -> list[str]:
        """Rows of the interference matrix: the base, then after each stage, measured or not."""
        labels = [BASE, *(f"after {name}" for name, _, _ in self.stages)]
        return list(dict.fromkeys([*labels, *(str(row["label"]) for row in self.evaluations if row.get("label"))]))

    def final(self, label: str, task: str) -> Mapping[str, Any] | None:
        """The large evaluation with a label; None where there is none."""
        wanted = {"set": "final", "label": label, "task": task}
        found = [row for row in self.evaluations if all(row.get(key) == value for key, value in wanted.items())]
        return found[-1] if found else None

    def scores(self, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """An evaluation's scores a prompt; None, and a problem noted, where they cannot be read."""
        try:
            return read_scores(self.folder, row)
        except ValueError as error:
            self.note(str(error))
            return None

    def rivals(self, task: str) -> dict[str, list[dict[str, Any]]]:
        """Each reward that a task is not trained on, beside the one that it is, on the tuning prompts and in order.

        Returns:
            Under "" what the task is measured by, where it is trained on another reward, and under their names the
            members of the trained reward that are only logged: "iteration", and "trained" and "reward", [N] each, and
            "parts", by name what stages weigh of the trained one.
        """
        rows = [row for row in self.evaluations if (row.get("task"), row.get("set")) == (task, "tune")]
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            scores = self.scores(row) or {}
            others = {name.partition("/")[2]: name for name in scores if name.startswith(f"{HELD_OUT}/")}
            others |= {"": REWARD} if TRAINED in scores else {}
            parts = {key.partition("/")[2]: scores[key] for key in scores if key.startswith(f"{TRAINED}/")}
            for name, key in others.items():
                trained = scores.get(TRAINED, scores[REWARD])
                entry = {"iteration": row["iteration"], "trained": trained, "parts": parts, "reward": scores[key]}
                found.setdefault(name, []).append(entry)
        return found

    def measure(self, task: str) -> Measure:
        """What counts as success in a task's evaluations; one without any answer does not say."""
        rows = [row for row in self.evaluations if row.get("task") == task]
        known = [row for row in rows if row.get("strict") == row.get("strict")]
        return Measure(success_of((known or rows)[-1]) if rows else STRICT)

    def note(self, problem: str) -> None:
        """Note a problem once."""
        if problem not in self.problems:
            self.problems.append(problem)


def read_run(folder: Path) -> RunRecord:
    """Read a run, finished or not; what is missing is noted in its ``problems``.

    Raises:
        ValueError: the folder holds no run.
    """
    if not is_run(folder):
        near = nearest_runs(folder)
        fix = f"; the nearest runs are {', '.join(map(str, near))}" if near else "; there is none near it either"
        state = "a folder without these" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
        raise ValueError(f"{folder}: expected a run's folder with {CONFIG} or {METRICS}, got {state}{fix}")
    problems: list[str] = []
    config = _read_config(folder / CONFIG, problems)
    metrics = _read_rows(folder, read_metrics, METRICS, problems)
    evaluations = _read_rows(folder, read_evaluations, EVALUATIONS, problems)
    run = RunRecord(folder, config, metrics, evaluations, problems)
    for label in run.labels:
        lacking = [TASK_NAMES.get(task, task) for task in run.tasks if run.final(label, task) is None]
        if lacking:
            run.note(f"No final evaluation “{label}” of {' and '.join(lacking)} yet.")
    return run


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or the beginning of one."""
    return any((folder / name).is_file() for name in (CONFIG, METRICS, EVALUATIONS))


def nearest_runs(folder: Path, count: int = 3) -> list[Path]:
    """Folders with runs around a path: above it, below it and beside it, and those in runs/; the best names first."""
    start = folder.absolute()
    around = [*start.parents, *_folders_below(start), *_folders_below(start.parent), *_folders_below(Path("runs"))]
    found = list(dict.fromkeys(path for path in around if is_run(path)))
    return sorted(found, key=lambda path: -difflib.SequenceMatcher(None, str(path), str(start)).ratio())[:count]


def by_id(scores: Mapping[str, Any], skill: str | None = None) -> dict[str, float]:
    """Success by prompt id, of one skill or of all; where ids repeat, they are told apart by their count."""
    found: dict[str, float] = {}
    for name, own, value in zip(scores["ids"], scores["skills"], scores["strict"], strict=True):
        key = name if name not in found else f"{name}#{len(found)}"
        if skill is None or own == skill:
            found[key] = float(value)
    return found


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> Interval:
    """Paired difference over the prompts that both have."""
    shared = [name for name in after if name in before]
    return paired_bootstrap([after[name] for name in shared], [before[name] for name in shared])


def success_of(row: Mapping[str, Any]) -> str:
    """What a row's "strict" is of; rows of older runs do not say, and are of strict success."""
    return str(row.get("success") or STRICT)


def _folders_below(folder: Path) -> Iterator[Path]:
    """Folders one and two levels below; a few hundred are enough to name a neighbour."""
    if not folder.is_dir():
        return
    try:
        children = [path for path in sorted(folder.iterdir())[:200] if path.is_dir()]
    except OSError:
        return
    for child in children:
        yield child
        try:
            yield from [path for path in sorted(child.iterdir())[:50] if path.is_dir()]
        except OSError:
            continue


def _read_config(path: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({type(error).__name__}): configuration and versions are unknown.")
        return {}
    return found if isinstance(found, dict) else {}


def _read_rows(
    folder: Path, read: Callable[[Path], list[dict[str, Any]]], name: str, problems: list[str]
) -> list[dict[str, Any]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            rows = read(folder)
        except ValueError as error:
            problems.append(str(error))
            return []
    problems += [str(entry.message) for entry in caught]
    if not rows:
        problems.append(f"{name} has no rows.")
    return rows


def strip_of(row: Mapping[str, Any]) -> str:
    """Path of an evaluation's images within the run's folder."""
    return str(Path(str(row.get("file", EVALUATION_FOLDER))).with_suffix(".png"))
