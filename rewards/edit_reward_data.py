"""Judged edits as a data set: parquet files that ``datasets`` streams, with PNGs inside and nothing pickled.

A folder holds ``SPLIT-NNNNN.parquet`` files. A row is one edit: ``instruction``, ``source`` and ``image`` (image
structs), ``prompt_id`` (edits of one prompt share it and lie together), and what was said of it: ``scores`` (a struct,
a number in [0, 1] a dimension, whatever the dimensions are), ``rank`` (its place among the edits of its prompt, 1 the
best), or both. ``id``, ``tag`` and ``metadata`` (JSON: how it was drawn) may be left out.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.base import Images
from rewards.edit_reward_columns import RANK_FIX, picture_column, png, rank_column, scores_column

logger = logging.getLogger(__name__)

TOTAL = "total"
DIMENSIONS = ("success", "preservation", TOTAL)
"""What an edit of the embedded world is scored on, each in [0, 1]; other data have dimensions of their own."""
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
        scores: a number in [0, 1] for each dimension; none for an edit that is only compared with others.
        tag: kind of instruction, for tables.
        metadata: JSON-like: how it was drawn.
        rank: its place among the edits of its prompt, 1 the best; those of one rank are equally good.
    """

    id: str
    prompt_id: str
    instruction: str
    source: Images
    image: Images
    scores: Mapping[str, float]
    tag: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None

    @property
    def total(self) -> float:
        """Its score on the last of :func:`ordered_dimensions`; NaN where it has none."""
        return self.scores[ordered_dimensions(self.scores)[-1]] if self.scores else math.nan


def ordered_dimensions(names: Iterable[str]) -> tuple[str, ...]:
    """Dimensions with the total last: the one of that name, or else the last of them."""
    return tuple(sorted(names, key=lambda name: name == TOTAL))


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where the ``number``-th file of a split goes."""
    return folder / f"{split}-{number:05d}.parquet"


def write_shard(path: Path, edits: Sequence[ScoredEdit]) -> None:
    """Write one parquet file; it appears whole or not at all. The columns are those that the edits need.

    Raises:
        ValueError: there is nothing to write, or an edit lacks a dimension that others have, or scores and a rank.
        ModuleNotFoundError: ``datasets``, of the extra ``judge-training``, is not installed.
    """
    import datasets

    if not edits:
        raise ValueError(f"{path}: expected at least one edit to write, got none")
    dimensions = ordered_dimensions(dict.fromkeys(name for edit in edits for name in edit.scores))
    features = _features(dimensions, any(edit.rank is not None for edit in edits))
    rows = [_to_row(edit, dimensions) for edit in edits]
    columns = {name: [row[name] for row in rows] for name in features}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(temporary))
    os.replace(temporary, path)


def read_edits(folder: Path, split: str, scored: bool = True) -> Iterator[ScoredEdit]:
    """Stream the edits of a split in order; rows that cannot be used are logged, counted and left out.

    Args:
        folder: of the files.
        split: which of them.
        scored: every edit needs scores; without it a rank is enough.

    Raises:
        ValueError: the folder has no such split, a file is no parquet file or has other dimensions, or no row of it
            can be used.
        ModuleNotFoundError: ``datasets``, of the extra ``judge-training``, is not installed.
    """
    dimensions = read_dimensions(folder, split)
    num_rows = num_bad = 0
    first = ""
    for num_rows, row in enumerate(_rows(folder, split), 1):
        try:
            edit = _from_row(row, dimensions, scored)
        except (ValueError, OSError, TypeError, KeyError) as error:
            num_bad += 1
            first = first or f"; row {num_rows - 1}: {_said(error)}"
            if num_bad <= _MOST_WARNINGS:
                logger.warning("%s, split %s: row %d is left out: %s", folder, split, num_rows - 1, _said(error))
            continue
        yield edit
    if num_bad:
        logger.warning("%s, split %s: %d of %d rows were left out", folder, split, num_bad, num_rows)
    if num_bad == num_rows:
        raise ValueError(
            f"{folder}, split {split}: expected judged edits, got {num_rows} rows, none of them usable{first}"
        )


def read_dimensions(folder: Path, split: str) -> tuple[str, ...]:
    """What the edits of a split are scored on, the total last; nothing where its files have no scores.

    Raises:
        ValueError: the folder has no such split, a file is no parquet file, or its dimensions are not the others'.
    """
    import pyarrow
    from pyarrow import parquet

    known: dict[tuple[str, ...], str] = {}
    for path in split_files(folder, split):
        try:
            schema = parquet.read_schema(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: a file cannot be read as scored edits ({error})") from error
        kind = schema.field("scores").type if "scores" in schema.names else pyarrow.struct([])
        if not pyarrow.types.is_struct(kind):
            raise ValueError(f"{path}: scores: expected a struct, a number in [0, 1] a dimension, got {kind}")
        names = ordered_dimensions(kind.field(index).name for index in range(kind.num_fields))
        known.setdefault(names, path)
    (names, path), *others = known.items()
    for different, other in others:
        raise ValueError(
            f"{other}: expected the dimensions {', '.join(names) or 'none'} of {path}, got "
            f"{', '.join(different) or 'none'}; write all files of a split with the same"
        )
    return names


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


def _features(dimensions: Sequence[str], ranked: bool) -> Any:
    import datasets

    text = datasets.Value("string")
    said: dict[str, Any] = {"scores": {name: datasets.Value("float32") for name in dimensions}} if dimensions else {}
    said |= {"rank": datasets.Value("int32")} if ranked else {}
    names = {"id": text, "prompt_id": text, "tag": text, "instruction": text}
    pictures = {"source": datasets.Image(), "image": datasets.Image()}
    return datasets.Features({**names, **pictures, **said, "metadata": text})


def _to_row(edit: ScoredEdit, dimensions: Sequence[str]) -> dict[str, Any]:
    missing = [name for name in dimensions if name not in edit.scores]
    if missing and (edit.scores or edit.rank is None):
        raise ValueError(f"{edit.id}: expected scores {', '.join(dimensions)}, got none for {', '.join(missing)}")
    if not edit.scores and edit.rank is None:
        raise ValueError(f"{edit.id}: expected scores or a rank, got neither; {RANK_FIX}")
    return {
        "id": edit.id,
        "prompt_id": edit.prompt_id,
        "tag": edit.tag,
        "instruction": edit.instruction,
        "source": {"bytes": png(edit.source), "path": None},
        "image": {"bytes": png(edit.image), "path": None},
        "scores": {name: float(edit.scores[name]) for name in dimensions} if edit.scores else None,
        "rank": edit.rank,
        "metadata": json.dumps(dict(edit.metadata)),
    }


def _from_row(row: Mapping[str, Any], dimensions: Sequence[str], scored: bool) -> ScoredEdit:
    scores, rank = scores_column(row, dimensions), rank_column(row)
    if scored and not scores:
        raise ValueError(
            "scores: expected a number in [0, 1] a dimension, got none; score it, or train on ranks alone: "
            "--regression-weight 0"
        )
    if not scores and rank is None:
        raise ValueError(f"scores and rank: expected one of them, got neither; {RANK_FIX}")
    if not row["instruction"] or not row["prompt_id"]:
        raise ValueError("instruction and prompt_id: expected text, got an empty one")
    metadata = json.loads(row.get("metadata") or "{}")
    source, image = picture_column(row, "source"), picture_column(row, "image")
    name, tag = row.get("id") or "", row.get("tag") or ""
    return ScoredEdit(name, row["prompt_id"], row["instruction"], source, image, scores, tag, metadata, rank)


def _said(error: Exception) -> str:
    return f"expected a column {error}, got none" if isinstance(error, KeyError) else str(error)
