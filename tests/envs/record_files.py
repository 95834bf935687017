"""Writers of small data sets in every format, for the tests of records."""

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

FORMATS = ("jsonl", "json", "csv", "parquet", "tar")
Row = Mapping[str, Any]


def png(number: int = 0, width: int = 8, height: int = 8) -> bytes:
    """A picture of one colour that tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(image: np.ndarray) -> int:
    """The number of a picture of :func:`png`, cropped and resized or not."""
    assert (image == image[0, 0]).all()
    return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> None:
    """A tar with these members in order."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, rows: Sequence[Row], row_group_size: int = 4) -> None:
    """A parquet file with pictures as structs, as ``datasets`` writes them."""
    columns = {name: [_struct(row.get(name)) for row in rows] for name in rows[0]}
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)


def _struct(value: Any) -> Any:
    return {"bytes": value, "path": None} if isinstance(value, bytes) else value


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows in the format of the suffix; bytes are pictures: inline, or in files beside it."""
    if path.suffix == ".parquet":
        write_parquet(path, rows)
    elif path.suffix == ".tar":
        members = []
        for number, row in enumerate(rows):
            for name, value in row.items():
                is_picture = isinstance(value, bytes)
                member = f"{path.stem}-{number:04d}.{name}.{'png' if is_picture else 'txt'}"
                members.append((member, value if is_picture else str(value).encode()))
        write_tar(path, members)
    else:
        _write_text(path, [_beside(path, number, row) for number, row in enumerate(rows)])


def _beside(path: Path, number: int, row: Row) -> Row:
    found = {}
    for name, value in row.items():
        if isinstance(value, bytes):
            file = f"{path.stem}_{path.suffix[1:]}_{number}_{name}.png"
            (path.parent / file).write_bytes(value)
            value = file
        found[name] = value
    return found


def _write_text(path: Path, rows: Sequence[Row]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
