"""In which order a data set's rows come: shuffled, shared among processes, and resumable at any row.

An epoch goes through the files in an order drawn from (seed, epoch), and within them by windows: ``window`` rows in
their order are drawn from without repetition, by (seed, epoch, where the window begins). So a position is four numbers
and no buffer has to be saved: on resuming, the rows of the current window are passed over again, undecoded.

Among processes every row of an epoch belongs to exactly one: either whole files do (file k of the epoch's order is
process ``k mod world_size``'s), or, where there are few files, single rows (row r of file k is process
``(r + k) mod world_size``'s). Epochs begin for each process by itself. Another number of processes goes on by
``envs.data.dealing``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from envs.data.records import RecordFiles
from envs.data.rows import Row, held_bytes

Share = Literal["auto", "files", "rows"]
# Whole files are shared out where no process gets more than an eighth more of them than another.
_ENOUGH_FILES = 8
_FILES, _ROWS = 0, 1


@dataclass(frozen=True)
class Order:
    """How rows are ordered and shared.

    Attributes:
        seed: of the shuffles.
        window: rows that are shuffled at a time; 0: files and rows come in their own order.
        window_bytes: a window ends before it, once its rows hold so much: inline pictures of parquet files are held,
            those of tars and of paths are not.
        rank: the process's number.
        world_size: number of processes.
        share: "files", "rows", or "auto": files where there are enough of them for even shares.
    """

    seed: int = 0
    window: int = 1024
    window_bytes: int = 2**28
    rank: int = 0
    world_size: int = 1
    share: Share = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.window < 0:
            raise ValueError(
                f"expected a rank between 0 and world_size - 1 and a window of 0 or more, got rank {self.rank} of "
                f"{self.world_size} and window {self.window}"
            )
        if self.share not in get_args(Share):
            raise ValueError(f"share: expected 'auto', 'files' or 'rows', got {self.share!r}")

    def shares_files(self, num_files: int) -> bool:
        """Whether whole files are shared out."""
        if self.share == "auto":
            return num_files % self.world_size == 0 or num_files >= _ENOUGH_FILES * self.world_size
        return self.share == "files"

    def files(self, epoch: int, num_files: int) -> list[int]:
        """The files of an epoch, in order, for all processes alike."""
        if not self.window:
            return list(range(num_files))
        order: list[int] = np.random.default_rng([self.seed, _FILES, epoch]).permutation(num_files).tolist()
        return order


@dataclass(frozen=True)
class Cursor:
    """Where an order stands: before row ``taken`` of the window that begins at a row of a file of an epoch.

    Attributes:
        epoch: from 0.
        file: of the epoch's order, not of the set.
        row: of that file.
        taken: rows of the window that have come.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    taken: int = 0


@dataclass(frozen=True)
class OrderedRow:
    """A row and where it stands.

    Attributes:
        shard: its file's number in the set.
        number: its own in the file.
        row: what is there.
        epoch: that it comes in.
        after: the cursor behind it.
        finished: the files of which this process has now had all rows of the epoch.
    """

    shard: int
    number: int
    row: Row
    epoch: int
    after: Cursor
    finished: tuple[int, ...] = ()


@dataclass
class _Window:
    """Rows that are shuffled together: (file of the epoch's order, shard, number, row)."""

    start: Cursor
    rows: list[tuple[int, int, int, Row]] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def end(self) -> Cursor:
        """Where the next window begins, within the epoch."""
        file, _, number, _ = self.rows[-1]
        return Cursor(self.start.epoch, file, number + 1)


def ordered_rows(files: RecordFiles, order: Order, cursor: Cursor, last: int | None = None) -> Iterator[OrderedRow]:
    """The rows from a cursor on, epoch after epoch: to the end of epoch ``last``, or without end.

    Raises:
        ValueError: there is no row for this process in a whole epoch.
    """
    while last is None or cursor.epoch <= last:
        is_empty = cursor == Cursor(cursor.epoch)
        for window in _windows(files, order, cursor):
            is_empty = False
            yield from _shuffled(window, order, cursor.taken)
            cursor = replace(cursor, taken=0)
        if is_empty:
            raise ValueError(
                f"{', '.join(files.data.files)}: expected a row for each of {order.world_size} processes, got none for "
                f"number {order.rank}"
            )
        cursor = Cursor(cursor.epoch + 1)


def _shuffled(window: _Window, order: Order, taken: int) -> Iterator[OrderedRow]:
    count = len(window.rows)
    start = window.start
    places = list(range(count))
    if order.window:
        rng = np.random.default_rng([order.seed, _ROWS, start.epoch, start.file, start.row])
        places = rng.permutation(count).tolist()
    for index in range(taken, count):
        _, shard, number, row = window.rows[places[index]]
        is_last = index + 1 == count
        after = window.end if is_last else replace(start, taken=index + 1)
        yield OrderedRow(shard, number, row, start.epoch, after, tuple(window.finished) if is_last else ())


def _windows(files: RecordFiles, order: Order, cursor: Cursor) -> Iterator[_Window]:
    """The windows of an epoch from the one that a cursor is in."""
    window = _Window(replace(cursor, taken=0))
    by_files = order.shares_files(len(files.shards))
    for file, shard in enumerate(order.files(cursor.epoch, len(files.shards))):
        if file < cursor.file or (by_files and file % order.world_size != order.rank):
            continue
        for number, row in files.rows(shard, cursor.row if file == cursor.file else 0):
            if not by_files and (number + file) % order.world_size != order.rank:
                continue
            if len(window.rows) >= max(1, order.window) or window.num_bytes >= order.window_bytes:
                yield window
                window = _Window(window.end)
            window.rows.append((file, shard, number, row))
            window.num_bytes += held_bytes(row)
        window.finished.append(shard)
    if window.rows:
        yield window
