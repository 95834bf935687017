"""What a run writes down: JSON lines, one file an evaluation, strips of images, and TensorBoard.

A line is appended with one write, so a kill at any moment leaves at most one torn last line, which readers leave out
and the next logbook cuts off. NaN and infinities, which JSON does not have, are written as null.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
EVALUATION_FOLDER = "evaluations"
TENSORBOARD_FOLDER = "tensorboard"


class Logbook:
    """The log of one run; one process writes it, any number may read.

    Args:
        folder: the run's; it is made where it is missing, and a line that a kill tore is cut off.
        tensorboard: write event files too.
    """

    def __init__(self, folder: Path, tensorboard: bool = True) -> None:
        self.folder = folder
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        (folder / EVALUATION_FOLDER).mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVALUATIONS):
            _cut_torn_line(folder / name)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one iteration's metrics; ``row["iteration"]`` counts from 1."""
        _append(self.folder / METRICS, row)
        self._scalars(int(row["iteration"]), {key: value for key, value in row.items() if key != "iteration"})

    def evaluation(
        self,
        row: Mapping[str, Any],
        ids: Sequence[str],
        skills: Sequence[str],
        scores: Mapping[str, ArrayLike],
        images: NDArray[np.uint8],
    ) -> None:
        """Write one evaluation of one task.

        An evaluation that a resumed run repeats (same iteration, task, set and label) takes the old one's place.

        Args:
            row: the summary: "iteration", "task", "set", "label" and the scores.
            ids: of the prompts, in an order that never changes, so that any two evaluations are paired.
            skills: of the prompts.
            scores: "strict" (success a prompt), "reward" and, where the run trains on another one, "trained", and
                "held_out/NAME" of rewards that are only logged and "trained/NAME" of components that stages weigh, [N]
                each; NaN where not available.
            images: the first prompts' images, uint8 [n, H, W, 3]; n may be 0.
        """
        stem = f"{int(row['iteration']):06d}-{row['task']}-{row['set']}"
        content = {"ids": list(ids), "skills": list(skills), **{key: np.asarray(v) for key, v in scores.items()}}
        _replace(self.folder / EVALUATION_FOLDER / f"{stem}.json", (json_line(content) + "\n").encode())
        if len(images):
            _write_strip(self.folder / EVALUATION_FOLDER / f"{stem}.png", images)
        full = {**row, "num_images": len(images), "file": f"{EVALUATION_FOLDER}/{stem}.json"}
        rows = read_evaluations(self.folder)
        if any(_identity(old) == _identity(full) for old in rows):
            rows = [full if _identity(old) == _identity(full) else old for old in rows]
            _replace_rows(self.folder / EVALUATIONS, rows)
        else:
            _append(self.folder / EVALUATIONS, full)
        prefixes = ("strict", "reward", "trained", "agreement", "held_out/")
        names = [key for key in row if key.startswith(prefixes) and key != "strict_by_skill"]
        values = {f"held_out/{row['task']}/{row['set']}/{key}": row[key] for key in names}
        self._scalars(int(row["iteration"]), values)

    def prompts(self, task: str, texts: Sequence[str], sources: NDArray[np.uint8] | None = None) -> None:
        """Write what the images of ``evaluation`` belong to, once a task.

        Args:
            task: "t2i" or "edit".
            texts: of the first n prompts.
            sources: their source images, uint8 [n, H, W, 3], where the task has any; those of a prompt side by side.
        """
        folder = self.folder / EVALUATION_FOLDER
        _replace(folder / f"prompts-{task}.json", (json_line(list(texts)) + "\n").encode())
        if sources is not None and len(sources):
            _write_strip(folder / f"sources-{task}.png", sources)

    def truncate(self, iteration: int) -> None:
        """Drop what was logged after an iteration, so that a resumed run's log becomes that of one never stopped.

        The evaluations that belong to the iteration itself stay; a run that repeats one replaces it.
        """
        for name in (METRICS, EVALUATIONS):
            rows = _read(self.folder / name)
            _replace_rows(self.folder / name, [row for row in rows if int(row["iteration"]) <= iteration])
        for path in (self.folder / EVALUATION_FOLDER).iterdir():
            number = path.name.partition("-")[0]
            if number.isdecimal() and int(number) > iteration:
                path.unlink()
        self.close()
        self._purge_step = iteration + 1

    def close(self) -> None:
        """Close the event file; writing again opens another."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _scalars(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in values.items() if _is_number(value)}
        if not self._tensorboard or not numbers:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Readers of event files leave out what an earlier sitting wrote from this step on.
            folder = str(self.folder / TENSORBOARD_FOLDER)
            self._writer = SummaryWriter(folder, purge_step=self._purge_step)
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's iterations, in order; none where there is no file. A torn last line is left out.

    Raises:
        ValueError: a line that is not the last one is damaged.
    """
    return _read(folder / METRICS)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's evaluations, as :func:`read_metrics`."""
    return _read(folder / EVALUATIONS)


def read_scores(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """The scores a prompt that belong to an evaluation's row.

    Returns:
        "ids" and "skills" as lists; "strict", "reward" and, where there are any, "trained", "trained/NAME" and
        "held_out/NAME" as float64 [N], NaN where not available.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = folder / str(row.get("file", ""))
    try:
        found = json.loads(path.read_bytes())
        names = ["strict", "reward", *(key for key in found if key.startswith(("trained", "held_out/")))]
        scores: dict[str, Any] = {key: np.array(found[key], dtype=np.float64) for key in names}
        scores |= {key: [str(entry) for entry in found[key]] for key in ("ids", "skills")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the scores of an evaluation, got {error!r}; evaluate again") from error
    if len({len(entry) for entry in scores.values()}) != 1:
        raise ValueError(f"{path}: expected as many ids, skills, strict and reward, got other lengths; evaluate again")
    return scores


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("iteration", "task", "set", "label"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """JSON's own types; what is not finite becomes null."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def json_line(value: Any) -> str:
    """A value as one line of JSON; what is not finite is null."""
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("ab", buffering=0) as file:
        file.write((json_line(row) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _replace_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows or path.exists():
        _replace(path, "".join(json_line(row) + "\n" for row in rows).encode())


def _write_strip(path: Path, images: NDArray[np.uint8]) -> None:
    """Images side by side in one row, PNG [H, n W]."""
    from PIL import Image

    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(np.concatenate(list(np.asarray(images)), axis=1)).save(temporary, format="PNG", optimize=True)
    os.replace(temporary, path)


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        _replace(path, whole)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *whole, rest = path.read_bytes().split(b"\n")
    if rest:
        warnings.warn(f"{path}: the last line is torn and is left out", stacklevel=3)
    return [_parse(path, number, line) for number, line in enumerate(whole, start=1)]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: expected a JSON object, got a damaged line ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
        raise ValueError(f"{path}, line {number}: expected a JSON object with a whole 'iteration'")
    return row
