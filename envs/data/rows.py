"""Rows of files as they stand, in order and by number: nothing is decoded until a row's values are asked for.

A row is anything with ``values()``. What stops the reading of a file (a cut tar, a damaged page) is its last row, a bad
one, so that the rows before are used.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from envs.data.lines import bounded_lines, decode_text, parse_object
from envs.data.parquet import BrokenAtError, parquet_rows
from envs.data.pictures import BadRowError, Limits
from envs.data.shards import Shard
from envs.data.tars import tar_rows

# A JSON document is parsed as a whole: about ten times as much memory.
MAX_DOCUMENT_BYTES = 2**31


class Row(Protocol):
    """One row of a file."""

    def values(self) -> Mapping[str, Any]:
        """Its values by the names that the file gives them.

        Raises:
            BadRowError: it cannot be read.
        """
        ...


@dataclass(frozen=True)
class ParsedRow:
    """A row whose values are known."""

    content: Mapping[str, Any]

    def values(self) -> Mapping[str, Any]:
        """See :class:`Row`."""
        return self.content


@dataclass(frozen=True)
class LineRow:
    """A line with a text (the field ``text``) or a JSON object; None if it is too long to be held."""

    line: bytes | None
    is_first: bool
    max_bytes: int
    is_json: bool

    def values(self) -> Mapping[str, Any]:
        """See :class:`Row`."""
        if self.line is None:
            raise BadRowError(f"a line of at most {self.max_bytes} bytes", "a longer one")
        text = decode_text(self.line, self.is_first)
        return parse_object(text) if self.is_json else {"text": text}


@dataclass(frozen=True)
class BrokenRow:
    """Where a file could not be read any further."""

    expected: str
    got: str

    def values(self) -> Mapping[str, Any]:
        """See :class:`Row`."""
        raise BadRowError(self.expected, self.got)


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        limits: see :class:`Limits`.
        columns: which of a parquet file's columns are wanted even if they are large, of all its names.
    """

    limits: Limits
    columns: Callable[[Sequence[str]], frozenset[str]]


def read_rows(
    shard: Shard, reading: Reading, start: int = 0, wanted: frozenset[int] | None = None
) -> Iterator[tuple[int, Row]]:
    """The rows of a file from number ``start`` on, with their numbers; where ``wanted`` is given others may lack."""
    following = 0
    try:
        for number, row in _numbered(shard, reading, start, wanted):
            following = number + 1
            if number >= start:
                yield number, row
    except Exception as error:  # Damaged files make their libraries raise nearly anything.
        at = error.number if isinstance(error, BrokenAtError) else following
        # A start right behind the break: it was this file's last row.
        if start == 0 or at != start - 1:
            yield max(at, start), BrokenRow(f"a whole {shard.format} file", f"{type(error).__name__}: {error}"[:300])


def rows_at(shard: Shard, reading: Reading, numbers: Sequence[int]) -> dict[int, Row]:
    """The rows of some numbers, in one pass; those that the file no longer has are left out."""
    wanted, found = frozenset(numbers), {}
    for number, row in read_rows(shard, reading, min(wanted), wanted):
        if number in wanted:
            found[number] = row
        if len(found) == len(wanted):
            break
    return found


def held_bytes(row: Row) -> int:
    """About how many bytes a row keeps in memory: its inline pictures, or its line."""
    if isinstance(row, LineRow):
        return len(row.line or b"")
    return _inline(row.content.values()) if isinstance(row, ParsedRow) else 0


def _inline(values: Iterable[Any]) -> int:
    total = 0
    for value in values:
        if isinstance(value, bytes | str):
            total += len(value)
        elif isinstance(value, Mapping):
            total += _inline(value.values())
        elif isinstance(value, list):
            total += _inline(value)
    return total


def _numbered(shard: Shard, reading: Reading, start: int, wanted: frozenset[int] | None) -> Iterator[tuple[int, Row]]:
    if shard.format == "parquet":
        for number, content in parquet_rows(shard.path, reading.columns, start, wanted):
            yield number, ParsedRow(content)
        return
    yield from enumerate(_sequential(shard, reading.limits))


def _sequential(shard: Shard, limits: Limits) -> Iterator[Row]:
    if shard.format == "tar":
        yield from tar_rows(shard.parts, limits)
    elif shard.format in ("jsonl", "txt"):
        with shard.path.open("rb") as handle:
            for number, line in enumerate(bounded_lines(handle, limits.max_bytes)):
                yield LineRow(line, number == 0, limits.max_bytes, shard.format == "jsonl")
    elif shard.format == "json":
        yield from _json_rows(shard)
    else:
        yield from _csv_rows(shard)


def _json_rows(shard: Shard) -> Iterator[Row]:
    if shard.parts.size > MAX_DOCUMENT_BYTES:
        raise ValueError(f"at most {MAX_DOCUMENT_BYTES} bytes are read, write it as .jsonl")
    document = json.loads(shard.path.read_bytes().decode("utf-8-sig"))
    if not isinstance(document, list):
        raise ValueError(f"expected an array of objects, got a {type(document).__name__}")
    for entry in document:
        yield ParsedRow(entry) if isinstance(entry, dict) else BrokenRow("a JSON object", f"a {type(entry).__name__}")


def _csv_rows(shard: Shard) -> Iterator[Row]:
    # What is no UTF-8 becomes lone surrogates: a bad text, not a bad file.
    with shard.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        for row in csv.DictReader(handle, delimiter="\t" if shard.format == "tsv" else ","):
            yield ParsedRow({name: value for name, value in row.items() if isinstance(name, str) and value is not None})
