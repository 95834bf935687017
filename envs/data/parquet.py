"""Rows of a parquet file, a few at a time: of large columns only those that are wanted are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Rows that are held decoded at a time; a picture in each.
_BATCH = 16


class BrokenAtError(Exception):
    """A file that cannot be read from row ``number`` on."""

    def __init__(self, number: int, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.number = number


def check_installed(path: Path) -> None:
    """Check that parquet files can be read here.

    Raises:
        ValueError: ``pyarrow`` is not installed.
    """
    if find_spec("pyarrow") is None:
        raise ValueError(
            f"{path}: parquet files are read by pyarrow, which is not installed; type: pip install pyarrow"
        )


def parquet_rows(
    path: Path,
    columns: Callable[[Sequence[str]], frozenset[str]],
    start: int = 0,
    wanted: frozenset[int] | None = None,
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number, values) of the rows, from the row group on that row ``start`` is in.

    Args:
        path: the file.
        columns: which of its columns are wanted, of all their names; those without bytes come besides.
        start: the first row that is wanted; those before in its row group come all the same.
        wanted: if given, row groups without one of these rows are passed over.

    Raises:
        BrokenAtError: a row cannot be read, after those before it.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = _columns(file.schema_arrow, columns)
        end = 0
        for group in range(file.num_row_groups):
            number, end = end, end + file.metadata.row_group(group).num_rows
            if end <= start or (wanted is not None and wanted.isdisjoint(range(number, end))):
                continue
            for values in _group_rows(file, group, names, number):
                yield number, values
                number += 1


def _group_rows(file: Any, group: int, names: Sequence[str], number: int) -> Iterator[Mapping[str, Any]]:
    try:
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=names):
            for values in batch.to_pylist():
                yield values
                number += 1
    except Exception as error:  # pyarrow's own, OSError, and on odd types nearly any.
        raise BrokenAtError(number, error) from error


def _columns(schema: Any, columns: Callable[[Sequence[str]], frozenset[str]]) -> list[str]:
    wanted = columns(schema.names)
    return [entry.name for entry in schema if entry.name in wanted or not _has_bytes(entry.type)]


def _has_bytes(kind: Any) -> bool:
    """Whether a column may hold encoded pictures."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    return any(_has_bytes(kind.field(index).type) for index in range(kind.num_fields))
