"""Records: rows of files as texts and pictures. A data set is files, the names of their fields, and a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envs.data.fields import Fields, Kind, Resolved
from envs.data.parquet import check_installed
from envs.data.pictures import BadRowError, Limits, load_picture
from envs.data.rows import Reading, Row, read_rows, rows_at
from envs.data.shards import Shard, find_shards
from envs.spaces import UnicodeText, describe_text
from rewards.base import Images

_TEXT = UnicodeText()


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        text: a prompt or an instruction.
        target: the picture to learn, uint8 [H, W, 3]; None where the kind of record has none.
        sources: the pictures to edit, uint8 [H, W, 3] each.
        id: its own name, or its file's with its number from 0.
        metadata: the other values of the row that JSON can hold.
    """

    text: str
    target: Images | None = None
    sources: tuple[Images, ...] = ()
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordSet:
    """A data set on disk.

    Attributes:
        files: paths and globs of its files: jsonl, json, csv, tsv, parquet, tar.
        fields: how its fields are called.
        image_root: folder that pictures' paths start from; each file's own unless given. Paths may not leave it.
        weight: its share of the draws among several sets.
    """

    files: tuple[str, ...]
    fields: Fields = field(default_factory=Fields)
    image_root: Path | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        given: object = self.files
        if isinstance(given, str) or not given:
            raise ValueError(
                f"files: expected a tuple of paths or globs, got {self.files!r}; write ('data/*.parquet',)"
            )
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight: expected a number above 0, got {self.weight}")


class RecordFiles:
    """A data set's files, opened for records of one kind.

    Args:
        data: the set.
        kind: what the records are for.
        limits: what a row may cost.

    Raises:
        FileNotFoundError: a path or a glob finds nothing.
        ValueError: a file is of no known kind, or cannot be read here.
    """

    def __init__(self, data: RecordSet, kind: Kind, limits: Limits) -> None:
        self.data, self.kind, self.limits = data, kind, limits
        self.shards: tuple[Shard, ...] = find_shards(data.files)
        for shard in self.shards:
            if shard.format == "parquet":
                check_installed(shard.path)
        self._reading = Reading(limits, lambda names: data.fields.wanted(names, kind))

    def rows(self, shard: int, start: int = 0) -> Iterator[tuple[int, Row]]:
        """(number, row) of a file from row ``start`` on."""
        return read_rows(self.shards[shard], self._reading, start)

    def rows_at(self, shard: int, numbers: Sequence[int]) -> dict[int, Row]:
        """Some rows of a file by their numbers; those that are no longer there are left out."""
        return rows_at(self.shards[shard], self._reading, numbers)

    def root(self, shard: int) -> Path:
        """The folder that a file's paths start from."""
        return self.data.image_root or self.shards[shard].folder

    def text(self, values: Mapping[str, Any], names: Resolved) -> str:
        """A row's text.

        Raises:
            BadRowError: there is none.
        """
        return _text(values[names.text], names.text)

    def record(self, row: Row, shard: int, number: int) -> Record:
        """A row as a record.

        Raises:
            BadRowError: a text or a picture is missing, damaged, or beyond the limits.
        """
        values = row.values()
        names = self.data.fields.resolve(tuple(values), self.kind)
        root = self.root(shard)
        text = self.text(values, names)
        target = None
        if names.target:
            target = load_picture(values[names.target], root, self.limits, names.target)
            self._check_size(target, names.target)
        sources = tuple(
            load_picture(entry, root, self.limits, name)
            for name in names.sources
            for entry in listed(values[name], name)
        )
        # WebDataset's key is the row's name, or nothing.
        used = names.names | {"__key__"}
        metadata = {name: value for name, value in values.items() if name not in used and _is_plain(value)}
        return Record(text, target, sources, self._row_id(values, names.id, shard, number), metadata)

    def _row_id(self, values: Mapping[str, Any], name: str, shard: int, number: int) -> str:
        """A row's own name, if it is a text or a number, or its file's with its number."""
        own = values.get(name)
        if isinstance(own, str | int) and own != "" and str(own) in _TEXT:
            return str(own)
        return f"{self.shards[shard].path.stem}/{number:08d}"

    def _check_size(self, image: Images, name: str) -> None:
        height, width = image.shape[:2]
        if height * width < self.limits.min_pixels:
            raise BadRowError(f"at least {self.limits.min_pixels} pixels", f"{name} of {width}x{height}")


def listed(value: Any, name: str) -> Sequence[Any]:
    """The pictures of a field: those of a list, or the one.

    Raises:
        BadRowError: the list is empty.
    """
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise BadRowError(f"{name!r}: a source picture", "an empty list")
    return entries


def _text(value: Any, name: str) -> str:
    text = value[0] if isinstance(value, list) and value else value
    if not isinstance(text, str) or not text.strip():
        raise BadRowError(f"{name!r}: a text", "an empty one" if isinstance(text, str) else describe_text(text))
    if text not in _TEXT:
        raise BadRowError(f"{name!r}: {_TEXT.description}", describe_text(text))
    return text


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    return value is None or isinstance(value, str | int | float | bool)
