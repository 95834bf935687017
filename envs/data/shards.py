"""The files of a data set: found by globs, in one order, pieces of a cut tar put together."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from envs.data.parts import Parts
from rewards.names import hint, nearest

Format = Literal["txt", "jsonl", "json", "csv", "tsv", "parquet", "tar"]
SUFFIXES: dict[str, Format] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".tar": "tar",
}
_PIECE = re.compile(r"(?P<tar>.+\.tar)\.(?P<label>[0-9]+|[a-z]{2,4})")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Shard:
    """One file of rows.

    Attributes:
        path: the file; of a cut tar, without the pieces' labels.
        parts: what it is read from.
        format: what is in it.
    """

    path: Path
    parts: Parts
    format: Format

    @property
    def folder(self) -> Path:
        """Where paths in it start from, unless another folder is given."""
        return self.path.parent


def find_shards(patterns: Sequence[str | Path]) -> tuple[Shard, ...]:
    """The files that paths and globs (``*``, ``?``, ``[...]``, ``**``) name, each once, in the order of their paths.

    A tar that was cut (``split``: ``x.tar.000``, ``x.tar.001`` or ``x.tar.aa``, ``x.tar.ab``) is one shard, whichever
    of its pieces are named.

    Raises:
        FileNotFoundError: nothing is there for a pattern; the message names the nearest file.
        ValueError: a file has an unknown suffix or is compressed, or a piece of a tar is missing.
    """
    paths = {path for pattern in patterns for path in _matching(str(pattern))}
    tars = {Path(match["tar"]) for path in paths if (match := _piece_of(path))}
    whole = [Shard(path, Parts.of([path]), _format(path)) for path in paths if not _piece_of(path)]
    return tuple(sorted([*whole, *map(_cut_tar, tars)], key=lambda shard: shard.path.as_posix()))


def fingerprint(shards: Iterable[Shard]) -> str:
    """What a position in these files depends on: their names and sizes, not where they are."""
    listed = "\n".join(f"{shard.path.name} {shard.parts.size}" for shard in shards)
    return hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()[:16]


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ValueError(f"{pattern}: expected files of rows, got a folder; name them, such as {pattern}/*.parquet")
    found = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
    # A cut tar may be called by its own name.
    found = found or _pieces(path)
    if not found:
        folder = path.parent
        names = [entry.name for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []
        where = hint(path.name, names) if names else f"; there is no file in {folder}"
        raise FileNotFoundError(f"{pattern}: expected files of rows, got none{where}")
    return found


def _format(path: Path) -> Format:
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise ValueError(f"{path}: expected a file that can be read from any byte, got a compressed one; decompress it")
    if suffix not in SUFFIXES:
        near = nearest(suffix, SUFFIXES)
        raise ValueError(
            f"{path}: expected a file ending in {', '.join(SUFFIXES)}, got {suffix!r}; did you mean "
            f"{path.with_suffix(near).name}?"
        )
    return SUFFIXES[suffix]


def _piece_of(path: Path) -> re.Match[str] | None:
    """Whether a file is a piece of a tar, by its name."""
    match = _PIECE.fullmatch(str(path))
    return None if match is None or path.suffix in _COMPRESSED else match


def _pieces(tar: Path) -> list[Path]:
    if tar.suffix != ".tar" or not tar.parent.is_dir():
        return []
    return [path for path in tar.parent.iterdir() if (match := _piece_of(path)) and Path(match["tar"]) == tar]


def _cut_tar(tar: Path) -> Shard:
    numbered = {_number(path.suffix[1:]): path for path in _pieces(tar)}
    first, last = (min(numbered) if min(numbered) <= 1 else 0), max(numbered)
    missing = next((number for number in range(first, last) if number not in numbered), None)
    if missing is not None:
        raise ValueError(
            f"{tar}: expected all of its pieces, from {first} to {last}, got {len(numbered)} without number {missing}; "
            "fetch it"
        )
    return Shard(tar, Parts.of([numbered[number] for number in sorted(numbered)]), "tar")


def _number(label: str) -> int:
    """A piece's place: digits as a number, letters as ``split`` counts them (aa, ab, ..., az, ba)."""
    if label.isdigit():
        return int(label)
    number = 0
    for letter in label:
        number = 26 * number + ord(letter) - ord("a")
    return number
