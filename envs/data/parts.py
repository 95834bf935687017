"""Files that were cut in pieces and are read as one, and ranges of their bytes that are read when they are wanted."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Parts:
    """Files that are one after another: most often a single one, or a tar that was split.

    Attributes:
        paths: in order.
        starts: where each begins in the whole, in bytes, and the whole's size at the end.
    """

    paths: tuple[Path, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Parts:
        """The parts with their sizes as they are on disk.

        Raises:
            OSError: one is not there.
        """
        return cls(tuple(paths), tuple(accumulate((path.stat().st_size for path in paths), initial=0)))

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.starts[-1]

    def read(self, offset: int, size: int) -> bytes:
        """A range of the whole; less of it where the whole ends before."""
        with PartsReader(self) as reader:
            reader.seek(offset)
            pieces = []
            while size > 0 and (piece := reader.read(size)):
                pieces.append(piece)
                size -= len(piece)
        return b"".join(pieces)


class PartsReader(io.RawIOBase):
    """A raw file over parts: it can seek, and has one part open at a time."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self._parts, self._position = parts, 0
        self._open: tuple[int, BinaryIO] | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position in the whole."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a position in the whole."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._parts.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer from where the reader stands, up to the end of a part at most."""
        starts = self._parts.starts
        if self._position >= self._parts.size:
            return 0
        index = bisect_right(starts, self._position) - 1
        handle = self._part(index)
        handle.seek(self._position - starts[index])
        piece = handle.read(min(len(buffer), starts[index + 1] - self._position))
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        """Close the part that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
        super().close()

    def _part(self, index: int) -> BinaryIO:
        if self._open is None or self._open[0] != index:
            if self._open is not None:
                self._open[1].close()
            self._open = (index, self._parts.paths[index].open("rb"))
        return self._open[1]


@dataclass(frozen=True)
class Blob:
    """A range of bytes that is read when it is wanted: a member of a tar.

    Attributes:
        parts: what it is a range of.
        offset: where it begins, in bytes.
        size: how many there are.
    """

    parts: Parts
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            OSError: there are fewer, or the file is gone.
        """
        data = self.parts.read(self.offset, self.size)
        if len(data) < self.size:
            raise OSError(f"{self.parts.paths[-1]}: {self.size} bytes at {self.offset} are cut off after {len(data)}")
        return data
