"""Scored edits as a data set: parquet files that ``datasets`` streams, with PNGs inside and nothing pickled.

A folder holds ``SPLIT-NNNNN.parquet`` files. A row is one edit: ``id``, ``prompt_id`` (edits of one prompt share it),
``tag``, ``instruction``, ``source`` and ``image`` (image structs), ``scores`` (a struct, a number in [0, 1] a
dimension) and ``metadata`` (JSON: how it was drawn).
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rewards.base import Images

logger = logging.getLogger(__name__)

DIMENSIONS = ("success", "preservation", "total")
"""What an edit is scored on, each in [0, 1]; the last is what a reward model's total is trained on."""
_MOST_WARNINGS = 5


@dataclass(frozen=True)
class ScoredEdit:
    """One edit and what a judge said of it.

    Attributes:
        id: its name.
        prompt_id: of the prompt (instruction and source) that it is an edit for.
        instruction: what was asked for.
        source: the picture before, uint8 [H, W, 3].
        image: the picture after, uint8 [H, W, 3].
        scores: a number in [0, 1] for each of ``DIMENSIONS``.
        tag: kind of instruction, for tables.
        metadata: JSON-like: how it was drawn.
    """

    id: str
    prompt_id: str
    instruction: str
    source: Images
    image: Images
    scores: Mapping[str, float]
    tag: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where the ``number``-th file of a split goes."""
    return folder / f"{split}-{number:05d}.parquet"


def write_shard(path: Path, edits: Sequence[ScoredEdit]) -> None:
    """Write one parquet file; it appears whole or not at all.

    Raises:
        ValueError: there is nothing to write, or a dimension is missing from an edit's scores.
        ModuleNotFoundError: ``datasets``, of the extra ``judge-training``, is not installed.
    """
    import datasets

    if not edits:
        raise ValueError(f"{path}: expected at least one edit to write, got none")
    rows = [_to_row(edit) for edit in edits]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    datasets.Dataset.from_dict(columns, features=_features()).to_parquet(str(temporary))
    os.replace(temporary, path)


def read_edits(folder: Path, split: str) -> Iterator[ScoredEdit]:
    """Stream the edits of a split in order; rows that cannot be used are logged, counted and left out.

    Raises:
        ValueError: the folder has no such split, a file is no parquet file, or no row of it can be used.
        ModuleNotFoundError: ``datasets``, of the extra ``judge-training``, is not installed.
    """
    num_rows = num_bad = 0
    for num_rows, row in enumerate(_rows(folder, split), 1):
        try:
            edit = _from_row(row)
        except (ValueError, OSError, TypeError, KeyError) as error:
            num_bad += 1
            if num_bad <= _MOST_WARNINGS:
                logger.warning("%s, split %s: row %d is left out: %s", folder, split, num_rows - 1, error)
            continue
        yield edit
    if num_bad:
        logger.warning("%s, split %s: %d of %d rows were left out", folder, split, num_bad, num_rows)
    if num_bad == num_rows:
        raise ValueError(f"{folder}, split {split}: expected scored edits, got {num_rows} rows, none of them usable")


def split_files(folder: Path, split: str) -> list[str]:
    """The files of a split in order.

    Raises:
        ValueError: there is none; the splits that are there are named.
    """
    files = sorted(map(str, folder.glob(f"{split}-*.parquet")))
    if not files:
        there = sorted({path.name.rsplit("-", 1)[0] for path in folder.glob("*-*.parquet")})
        raise ValueError(
            f"{folder}: expected files {split}-*.parquet, got splits {', '.join(there) or 'none'}; "
            "make them with: pdtr edit-reward data"
        )
    return files


def _rows(folder: Path, split: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    files = split_files(folder, split)
    try:
        stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        # Undecoded, so that one broken picture is one row's trouble.
        for name in ("source", "image"):
            stream = stream.cast_column(name, datasets.Image(decode=False))
        yield from stream
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, KeyError) as error:
        raise ValueError(f"{folder}, split {split}: a file cannot be read as scored edits ({error})") from error


def _features() -> Any:
    import datasets

    text = datasets.Value("string")
    return datasets.Features(
        {
            "id": text,
            "prompt_id": text,
            "tag": text,
            "instruction": text,
            "source": datasets.Image(),
            "image": datasets.Image(),
            "scores": {name: datasets.Value("float32") for name in DIMENSIONS},
            "metadata": text,
        }
    )


def _to_row(edit: ScoredEdit) -> dict[str, Any]:
    missing = [name for name in DIMENSIONS if name not in edit.scores]
    if missing:
        raise ValueError(f"{edit.id}: expected scores {', '.join(DIMENSIONS)}, got none for {', '.join(missing)}")
    return {
        "id": edit.id,
        "prompt_id": edit.prompt_id,
        "tag": edit.tag,
        "instruction": edit.instruction,
        "source": {"bytes": _png(edit.source), "path": None},
        "image": {"bytes": _png(edit.image), "path": None},
        "scores": {name: float(edit.scores[name]) for name in DIMENSIONS},
        "metadata": json.dumps(dict(edit.metadata)),
    }


def _from_row(row: Mapping[str, Any]) -> ScoredEdit:
    scores = {name: row["scores"][name] for name in DIMENSIONS}
    for name, value in scores.items():
        if value is None or not math.isfinite(value) or not 0 <= value <= 1:
            raise ValueError(f"scores.{name}: expected a number in [0, 1], got {value}")
    if not row["instruction"] or not row["prompt_id"]:
        raise ValueError("instruction and prompt_id: expected text, got an empty one")
    metadata = json.loads(row["metadata"] or "{}")
    source, image = _picture(row, "source"), _picture(row, "image")
    return ScoredEdit(
        row["id"] or "", row["prompt_id"], row["instruction"], source, image, scores, row["tag"] or "", metadata
    )


def _png(image: Images) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _picture(row: Mapping[str, Any], name: str) -> Images:
    from PIL import Image

    struct = row[name]
    if not struct or not struct.get("bytes"):
        raise ValueError(f"{name}: expected a picture in the row, got none")
    try:
        with Image.open(io.BytesIO(struct["bytes"])) as opened:
            return np.asarray(opened.convert("RGB"), np.uint8)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: expected a picture, got bytes that cannot be read as one ({error})") from error
