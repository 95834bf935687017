"""Rows of an order dealt anew: what is left of an epoch when another number of processes goes on with it.

A process's rows are a sequence of legs. The last of them is its own share of all epochs to come, without end; where
another number of processes had begun epochs before it, what they left of them comes first, row by row one to each
process. So every row of an epoch comes to exactly one process, however often the number changes within it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from envs.data.order import Cursor, Order, OrderedRow, ordered_rows
from envs.data.records import RecordFiles


@dataclass(frozen=True)
class Leg:
    """One row in ``every`` of a share, from a cursor to the end of an epoch.

    Attributes:
        rank: of the process whose share it is, or was.
        world_size: number of the processes that shared.
        cursor: where it stands in that share.
        last: epoch that it ends with; None: it has no end.
        skip: rows that are left to others before the next one is taken.
        every: one row of so many is taken.
    """

    rank: int = 0
    world_size: int = 1
    cursor: Cursor = field(default_factory=Cursor)
    last: int | None = None
    skip: int = 0
    every: int = 1

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Leg:
        """A leg from its JSON, which ``dataclasses.asdict`` makes."""
        return cls(**{**content, "cursor": Cursor(**content["cursor"])})

    @property
    def last_begun(self) -> int:
        """The last epoch of which it has had, or could have had, a row; -1 before the first."""
        return self.cursor.epoch - (self.cursor == Cursor(self.cursor.epoch))


Legs = tuple[Leg, ...]
"""A process's place in a data set."""


def dealt_rows(files: RecordFiles, order: Order, legs: Legs) -> Iterator[tuple[OrderedRow, Legs]]:
    """The rows of legs, one leg after the other, and the legs that are left behind each.

    Args:
        files: of the set.
        order: whose rank and number of processes each leg has for itself.
        legs: the last of which has no end.

    Raises:
        ValueError: see :func:`envs.data.order.ordered_rows`.
    """
    for place, leg in enumerate(legs):
        share = replace(order, rank=leg.rank, world_size=leg.world_size)
        skip = leg.skip
        finished: tuple[int, ...] = ()
        for row in ordered_rows(files, share, leg.cursor, leg.last):
            finished += row.finished
            if skip:
                skip -= 1
                continue
            skip = leg.every - 1
            behind = replace(leg, cursor=row.after, skip=skip)
            yield replace(row, finished=finished), (behind, *legs[place + 1 :])
            finished = ()


def redealt(shares: Sequence[Legs], rank: int, world_size: int) -> Legs:
    """The legs of one of ``world_size`` processes that go on where others stood.

    Whatever epoch one of them had begun is finished first: row i of what was left of each leg is process
    ``i mod world_size``'s. From the epoch after that on, the processes have shares of their own.

    Args:
        shares: the legs of each of the processes before, by rank.
        rank: of this process.
        world_size: number of processes that go on.
    """
    last = max(legs[-1].last_begun for legs in shares)
    begun = [leg if leg.last is not None else replace(leg, last=last) for legs in shares for leg in legs]
    left = [
        replace(leg, skip=leg.skip + leg.every * rank, every=leg.every * world_size)
        for leg in begun
        if leg.last is not None and leg.cursor.epoch <= leg.last
    ]
    return (*left, Leg(rank, world_size, Cursor(last + 1)))


def redealt_position(states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """A task's position for one of another number of processes: ``TaskBatches.state()`` of each before, as one more.

    Examples that wait in buckets are dealt out too, one to each. The turns of aspect ratios, of which each process has
    its own, are taken from one of them.
    """
    own = states[rank % len(states)]
    waiting = [place for state in states for place in state["waiting"]]
    sets = zip(*(state["legs"] for state in states), strict=True)
    return {
        "batches": max(state["batches"] for state in states),
        "turn": own["turn"],
        "resting": own["resting"],
        "waiting": waiting[rank::world_size],
        "draws": max(state["draws"] for state in states),
        "legs": [
            [asdict(leg) for leg in redealt([tuple(map(Leg.of, legs)) for legs in of_set], rank, world_size)]
            for of_set in sets
        ],
    }
