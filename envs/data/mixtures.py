"""Data sets of a task as a command line names them: files, or small JSON files that list several sets.

``{"sets": [{"files": [...], "fields": {...}, "image_root": "...", "weight": 2}, ...]}``; all but ``files`` may be left
out. A file of rows is an array in JSON, a list of sets an object, so one is never taken for the other.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from envs.data.fields import Fields
from envs.data.records import RecordSet
from envs.spaces import UnicodeText, describe_text
from rewards.names import hint

MAX_LIST_BYTES = 2**20
"""A list of sets is written by hand; it names files, and holds no rows."""
MAX_SETS = 1000
_MOST_WEIGHT = 1e9
_TEXT = UnicodeText()
_KEYS = ("files", "fields", "image_root", "weight")
_FIELDS = tuple(entry.name for entry in fields_of(Fields))


def record_sets(files: Sequence[str], image_root: Path | None = None) -> list[RecordSet]:
    """The sets of files, globs and lists of sets: those of the lists, and one of all that is no list.

    Args:
        files: as a command line has them.
        image_root: folder that pictures' paths start from, of sets that name none.

    Raises:
        ValueError: a list is not as it should be; the message names the file, the entry and the nearest right name.
    """
    lists = [name for name in files if is_list(name)]
    rows = tuple(name for name in files if name not in lists)
    found = [RecordSet(rows, image_root=image_root)] if rows else []
    return found + [entry for name in lists for entry in read_list(Path(name), image_root)]


def is_list(name: str) -> bool:
    """Whether a file lists sets: a ``.json`` that holds an object."""
    path = Path(name)
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open("rb") as handle:
        start = handle.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"{")


def read_list(path: Path, image_root: Path | None = None) -> list[RecordSet]:
    """The sets that a file lists; its paths start from its own folder.

    Raises:
        ValueError: it is too large, no JSON, or an entry is not as it should be.
    """
    if path.stat().st_size > MAX_LIST_BYTES:
        raise ValueError(
            f"{path}: expected a list of sets of at most {MAX_LIST_BYTES} bytes, got {path.stat().st_size}; write rows "
            "as an array, or as .jsonl"
        )
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a list of sets in JSON, got what is none ({error}); mend it") from error
    _check_keys(document, ("sets",), str(path))
    entries = document.get("sets")
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_SETS:
        got = f"{len(entries)}" if isinstance(entries, list) else _described(entries)
        raise ValueError(f'{path}: expected 1 to {MAX_SETS} sets, as {{"sets": [{{"files": [...]}}]}}, got {got}')
    return [_record_set(entry, path, index, image_root) for index, entry in enumerate(entries)]


def _record_set(entry: Any, path: Path, index: int, image_root: Path | None) -> RecordSet:
    where = f"{path}: sets[{index}]"
    _check_keys(entry, _KEYS, where)
    files = tuple(str(path.parent / name) for name in _texts(entry.get("files"), f"{where}.files"))
    if not files:
        raise ValueError(f'{where}.files: expected paths or globs, got none; write "files": ["data/*.parquet"]')
    nested = next((name for name in files if is_list(name)), None)
    if nested is not None:
        raise ValueError(f"{where}.files: expected files of rows, got another list of sets, {nested}; name its files")
    if "image_root" in entry:
        image_root = path.parent / _text(entry["image_root"], f"{where}.image_root")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= _MOST_WEIGHT:
        raise ValueError(
            f"{where}.weight: expected a number above 0 and at most {_MOST_WEIGHT:g}, got {_described(weight)}; "
            "leave it out for 1"
        )
    return RecordSet(files, _named_fields(entry.get("fields", {}), f"{where}.fields"), image_root, float(weight))


def _named_fields(given: Any, where: str) -> Fields:
    _check_keys(given, _FIELDS, where)
    names: dict[str, Any] = {
        name: _text(value, f"{where}.{name}") for name, value in given.items() if name != "sources"
    }
    if "sources" in given:
        names["sources"] = _texts(given["sources"], f"{where}.sources")
    return Fields(**names)


def _check_keys(given: Any, known: Collection[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected an object with {', '.join(known)}, got {_described(given)}")
    for name in given:
        if name not in known:
            raise ValueError(
                f"{where}: expected one of {', '.join(known)}, got {describe_text(name)}{hint(name, known)}"
            )


def _texts(given: Any, where: str) -> tuple[str, ...]:
    """The texts of a list, or the one."""
    return tuple(_text(value, where) for value in (given if isinstance(given, list) else [given]))


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str) or not given or given not in _TEXT or "\0" in given:
        raise ValueError(f"{where}: expected a text that is not empty, got {_described(given)}")
    return given


def _described(value: Any) -> str:
    return describe_text(value) if isinstance(value, str) else json.dumps(value)[:80]
