"""Tables on the terminal and CSV files of dataclasses: pure text, one row a record."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

from pdtr.statistics import Interval

RESULTS = Path(__file__).parents[1] / "results"
"""Where results that are committed go."""

Row = TypeVar("Row")
_READ: dict[Any, type[str | int | float]] = {"str": str, "int": int, "float": float}


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def points(interval: Interval | None, signed: bool = False) -> str:
    """A share of 1 in percentage points, ``41.2 [38.0, 44.4]``; ``-`` for what is not known."""
    if interval is None or math.isnan(interval.value):
        return "-"
    sign = "+" if signed else ""
    return quantity(Interval(*(100 * part for part in interval)), f"{sign}.1f")


def quantity(interval: Interval, form: str = ".3g") -> str:
    """A number with its interval, ``812 [790, 834]``; the interval is left out where there is none."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclass records of one type, replacing the file at once; there must be at least one."""
    if not rows:
        raise ValueError(f"{path}: expected at least one row to write, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [entry.name for entry in fields(rows[0])]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_written(getattr(row, name)) for name in names] for row in rows)
    os.replace(temporary, path)


def read_csv(path: Path, kind: type[Row]) -> list[Row]:
    """Read what :func:`write_csv` wrote.

    Raises:
        ValueError: the columns are not the fields of ``kind``, or a value is not of its field's type.
    """
    entries: tuple[Field[Any], ...] = fields(kind)  # type: ignore[arg-type]
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        expected = [entry.name for entry in entries]
        if reader.fieldnames != expected:
            raise ValueError(f"{path}: expected the columns {expected}, got {reader.fieldnames}")
        try:
            return [kind(**{entry.name: _READ[entry.type](row[entry.name]) for entry in entries}) for row in reader]
        except ValueError as error:
            raise ValueError(f"{path}: a damaged value ({error}); measure again") from error


def _written(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
