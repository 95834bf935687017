"""Examples of one task: records of several sets, mixed by weight, decoded ahead by threads, cut to a bucket.

Which row comes when follows from the seed and the position alone; threads change how long it takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from envs.data.buckets import FACTOR
from envs.data.dealing import Leg, Legs, dealt_rows
from envs.data.framing import Example, Place, framed
from envs.data.order import Order, OrderedRow
from envs.data.pictures import BadRowError
from envs.data.problems import Problems
from envs.data.records import RecordFiles
from envs.data.rows import BrokenRow, Row
from envs.data.shards import fingerprint

_DEPENDED_ON = ("seed", "window", "window_bytes", "rank", "world_size", "share")


@dataclass(frozen=True)
class Drawing:
    """How examples are drawn.

    Attributes:
        order: of the rows of each set, which has a seed of its own made of this one.
        most_stretch: see :func:`envs.data.framing.framed`.
        num_workers: threads that decode ahead; 0 decodes where the example is asked for.
    """

    order: Order
    most_stretch: float = 1.1
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.most_stretch < 1 or self.num_workers < 0:
            raise ValueError(
                f"expected most_stretch of 1 or more and num_workers of 0 or more, got {self.most_stretch} and "
                f"{self.num_workers}"
            )


@dataclass(frozen=True)
class _Ahead:
    """A row whose example is being made."""

    place: Place
    ordered: OrderedRow
    after: Legs
    future: Future[Example]


class Examples:
    """Endless examples of one task. For one thread at a time.

    Args:
        task: a number that the draws depend on, so that two tasks of one file see different orders.
        files: the sets; draw d is of set i with a chance proportional to its weight, by (seed, d).
        drawing: see :class:`Drawing`.
    """

    def __init__(self, task: int, files: Sequence[RecordFiles], drawing: Drawing) -> None:
        self.problems = Problems()
        self._files, self._drawing = files, drawing
        self._seeds = [_seed(drawing.order.seed, task, index) for index in range(len(files) + 1)]
        self._weights = np.array([entry.data.weight for entry in files])
        self._pool = ThreadPoolExecutor(drawing.num_workers, "decode") if drawing.num_workers else None
        own = Leg(drawing.order.rank, drawing.order.world_size)
        self._start(0, [(own,) for _ in files])

    @property
    def world_size(self) -> int:
        """Number of the processes that share the rows."""
        return self._drawing.order.world_size

    def take(self, size: int) -> Example:
        """The next good example at a size; bad rows are counted on the way.

        Raises:
            ValueError: all rows of a file are bad; the commonest reason is named.
        """
        while True:
            while len(self._ahead) <= 2 * self._drawing.num_workers:
                self._ahead.append(self._begin(size))
            ahead = self._ahead.popleft()
            example = self._finished(ahead, size)
            self._draws += 1
            self._legs[ahead.place.data] = ahead.after
            self._watch(ahead, example is not None)
            if example is not None:
                return example

    def again(self, places: Sequence[Place], size: int) -> list[Example]:
        """Examples that were taken before, at a size; rows that can no longer be used are counted and left out."""
        numbers: dict[tuple[int, int], list[int]] = {}
        for place in places:
            numbers.setdefault((place.data, place.shard), []).append(place.number)
        rows = {key: self._files[key[0]].rows_at(key[1], wanted) for key, wanted in numbers.items()}
        gone = BrokenRow("a row that was read before", "a shorter file")
        found = []
        for place in places:
            row = rows[place.data, place.shard].get(place.number, gone)
            try:
                found.append(self._make(place, row, size))
            except BadRowError as error:
                self._count(place, error)
        return found

    def state(self) -> dict[str, Any]:
        """The position behind the last example that was taken, as JSON."""
        return {"draws": self._draws, "legs": [[asdict(leg) for leg in legs] for legs in self._legs]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a position of :meth:`state`."""
        self._start(int(state["draws"]), [tuple(map(Leg.of, legs)) for legs in state["legs"]])

    def identity(self) -> dict[str, Any]:
        """What a position depends on, as JSON."""
        order = self._drawing.order
        named = {"files": [fingerprint(entry.shards) for entry in self._files], "weights": self._weights.tolist()}
        return named | {name: getattr(order, name) for name in _DEPENDED_ON}

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, draws: int, legs: list[Legs]) -> None:
        self._draws = self._begun = draws
        self._legs = legs
        orders = [replace(self._drawing.order, seed=seed) for seed in self._seeds[1:]]
        self._rows = [dealt_rows(*each) for each in zip(self._files, orders, legs, strict=True)]
        self._ahead: deque[_Ahead] = deque()
        self._had_good: dict[tuple[int, int], bool] = {}

    def _begin(self, size: int) -> _Ahead:
        data = self._choice(self._begun)
        self._begun += 1
        ordered, after = next(self._rows[data])
        place = Place(data, ordered.shard, ordered.number)
        if self._pool is not None:
            return _Ahead(place, ordered, after, self._pool.submit(self._make, place, ordered.row, size))
        future: Future[Example] = Future()
        try:
            future.set_result(self._make(place, ordered.row, size))
        except BadRowError as error:
            future.set_exception(error)
        return _Ahead(place, ordered, after, future)

    def _choice(self, draw: int) -> int:
        """The set of a draw."""
        if len(self._files) == 1:
            return 0
        shares = np.cumsum(self._weights / self._weights.sum())
        at = np.random.default_rng([self._seeds[0], draw]).random()
        return min(int(np.searchsorted(shares, at, side="right")), len(self._files) - 1)

    def _make(self, place: Place, row: Row, size: int) -> Example:
        record = self._files[place.data].record(row, place.shard, place.number)
        return framed(record, place, size, self._drawing.most_stretch)

    def _finished(self, ahead: _Ahead, size: int) -> Example | None:
        self.problems.num_rows += 1
        try:
            example = ahead.future.result()
            # Begun before the resolution changed.
            return example if example.size == size else self._make(ahead.place, ahead.ordered.row, size)
        except BadRowError as error:
            self._count(ahead.place, error)
            return None

    def _count(self, place: Place, error: BadRowError) -> None:
        self.problems.add(self._files[place.data].shards[place.shard].path, place.number, error)

    def _watch(self, ahead: _Ahead, is_good: bool) -> None:
        """Stop at a file of which all rows are bad; a process that saw only bad ones looks through the whole file."""
        key = (ahead.place.data, ahead.place.shard)
        self._had_good[key] = self._had_good.get(key, False) or is_good
        for shard in ahead.ordered.finished:
            if not self._had_good.pop((ahead.place.data, shard), True):
                self._check_file(ahead.place.data, shard)

    def _check_file(self, data: int, shard: int) -> None:
        files, found = self._files[data], Problems()
        for number, row in files.rows(shard):
            try:
                self._make(Place(data, shard, number), row, FACTOR)
                return
            except BadRowError as error:
                found.add(files.shards[shard].path, number, error)
        raise ValueError(
            f"{files.shards[shard].path}: expected rows that can be used, got {found.num_bad} bad ones, the commonest "
            f"reason: {found.commonest()}; the first: {found.first[0]}"
        )


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
