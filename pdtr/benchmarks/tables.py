"""Rows of the files that benchmarks come in: JSON, JSON lines, parquet, or a data set that Hugging Face saved."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from envs.data.parquet import BrokenAtError, check_installed, parquet_rows
from pdtr.benchmarks.pictures import Picture

T = TypeVar("T")
Record = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and the row."""
MAX_TEXT_BYTES = 2**28
"""Of a file of text: the largest published one has a tenth of it."""


def records(path: Path) -> Iterator[Record]:
    """Rows of a ``.parquet`` (or a folder of such), ``.jsonl`` or ``.json`` file, or of ``Dataset.save_to_disk``.

    A ``.json`` file holds a list of objects, or one object of them by id, which each gets as ``key``. In parquet files
    pictures are as Hugging Face writes them: ``{"bytes", "path"}``.

    Raises:
        ValueError: there is no such file, or it is in none of these formats.
    """
    if not path.exists():
        near = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        raise ValueError(f"{path}: expected a benchmark's data, got no such file; beside it are {near[:8] or 'none'}")
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".json":
        return _json(path)
    raise ValueError(
        f"{path}: expected a .parquet, .jsonl or .json file or a folder of parquet files, got {path.suffix!r}"
    )


def parsed(path: Path, parse: Callable[[int, Record], T | None]) -> tuple[tuple[T, ...], tuple[str, ...]]:
    """All good rows of a file, and what is wrong with the others.

    Args:
        path: see :func:`records`.
        parse: makes something of a row's place in the file, from 0, and the row; None passes over it; a ValueError
            makes it a bad row.

    Raises:
        ValueError: no row is good.
    """
    found: list[T] = []
    problems: list[str] = []
    for position, (where, row) in enumerate(records(path)):
        try:
            made = parse(position, (where, row))
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        found += [] if made is None else [made]
    if not found:
        first = f"{len(problems)} bad ones, the first: {problems[0]}" if problems else "none that was asked for"
        raise ValueError(f"{path}: expected one good row or more, got {first}")
    return tuple(found), tuple(problems)


def text_of(row: Mapping[str, Any], *names: str) -> str:
    """A text of a row, under the first of some names that it has.

    Raises:
        ValueError: it has none, or another type.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise ValueError(f"expected a text under {' or '.join(names)}, got the keys {', '.join(map(str, list(row)[:8]))}")


def picture_of(value: object, root: Path, name: str) -> Picture:
    """A picture of a row, decoded once to see that it is whole: Hugging Face's struct, bytes, or a path below root.

    Raises:
        ValueError: it is none of these, no picture, too large, or its path leads out of the root.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        picture = Picture(name, value["bytes"])
    elif isinstance(value, bytes):
        picture = Picture(name, value)
    elif isinstance(value, str) and value:
        full = (root / value).resolve()
        if not full.is_relative_to(root.resolve()):
            raise ValueError(f"expected a picture inside {root}, got the path {value!r}; give --image-root")
        picture = Picture(f"{name} ({value})", full)
    else:
        raise ValueError(f"{name}: expected a picture's bytes or path, got {type(value).__name__}")
    picture.load()
    return picture


def _folder(path: Path) -> Iterator[Record]:
    files = sorted(path.rglob("*.parquet"))
    if files:
        return (record for file in files for record in _parquet(file))
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _saved(path)
    raise ValueError(
        f"{path}: expected .parquet files or a data set saved by Hugging Face, got a folder without either"
    )


def _parquet(path: Path) -> Iterator[Record]:
    check_installed(path)
    try:
        for number, row in parquet_rows(path, frozenset):
            yield f"{path.name}, row {number + 1}", row
    # A file that is no parquet file is a ValueError of pyarrow's.
    except (BrokenAtError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a parquet file, got one that cannot be read: {error}") from error


def _saved(path: Path) -> Iterator[Record]:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{path}: data sets that Hugging Face saved are read by datasets, which is not installed; "
            "type: pip install 'pdtr[judge-training]'"
        )
    datasets: Any = importlib.import_module("datasets")
    loaded = datasets.load_from_disk(str(path))
    splits = loaded.values() if isinstance(loaded, Mapping) else [loaded]
    number = 0
    for split in splits:
        # Pictures stay as they are encoded: the limits on their size are ours.
        for name, feature in split.features.items():
            split = split.cast_column(name, datasets.Image(decode=False)) if type(feature) is datasets.Image else split
        for row in split:
            number += 1
            yield f"{path.name}, row {number}", row


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _object(line)


def _json(path: Path) -> Iterator[Record]:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file ({error})") from error
    entries = content.items() if isinstance(content, dict) else enumerate(content, start=1)
    for name, entry in entries:
        row = entry if isinstance(entry, dict) else {}
        yield f"entry {name}", {**row, "key": name} if isinstance(content, dict) else row


def _object(line: str) -> Mapping[str, Any]:
    """A line's object; an empty one where it is none, which no parser takes."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_TEXT_BYTES} bytes, got {path.stat().st_size}")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got another encoding ({error})") from error
