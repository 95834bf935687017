"""Batches of one task, each of one bucket: one resolution, one aspect ratio.

Examples wait in their bucket until it is full. The places of those that wait are part of the state, and they are read
again on resuming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from envs.data.buckets import RATIOS, ProgressiveResolution, Size, bucket_size
from envs.data.examples import Drawing, Examples
from envs.data.framing import Example, Place
from envs.data.order import Order, Share
from envs.data.pictures import Limits
from envs.scenes.pretraining import SupervisedBatch


@dataclass(frozen=True)
class BatchSettings:
    """What batches are like, and how they are made.

    Attributes:
        batch_size: examples of a batch.
        resolution: S by the number of batches of the task that there have been, in all processes together.
        balanced: aspect ratios take turns, so that rare ones are seen as often as common ones: what a full bucket
            cannot hold while another's turn lasts is passed over. Otherwise whichever is full first comes.
        patience: with ``balanced``, examples read for a ratio's turn, in batches; a ratio that did not fill by then has
            its next turn when it has.
        limits: what a row may cost.
        most_stretch: how much wider or narrower than the target's a source's shape may be.
        window: rows that are shuffled at a time; 0: none.
        window_bytes: bytes that a window's rows may hold.
        share: what processes share out; see :class:`envs.data.order.Order`.
        num_workers: threads that decode, of each task.
        prefetch: batches made ahead, of each task; 0: none.
        seed: of all draws.
    """

    batch_size: int = 16
    resolution: ProgressiveResolution = field(default_factory=ProgressiveResolution)
    balanced: bool = False
    patience: int = 16
    limits: Limits = field(default_factory=Limits)
    most_stretch: float = 1.1
    window: int = 1024
    window_bytes: int = 2**28
    share: Share = "auto"
    num_workers: int = 4
    prefetch: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.patience < 1 or self.prefetch < 0 or self.seed < 0:
            raise ValueError(
                "expected batch_size and patience of 1 or more, prefetch and seed of 0 or more, got "
                f"{self.batch_size}, {self.patience}, {self.prefetch}, {self.seed}"
            )

    def largest(self) -> tuple[int, Size]:
        """Examples and (height, width) of the batch with the most pixels that there will be."""
        schedule = self.resolution
        return max(
            (
                (schedule.batch_size(start, self.batch_size), bucket_size(ratio, size))
                for start, size in zip(schedule.starts, schedule.sizes, strict=True)
                for ratio in RATIOS
            ),
            key=lambda shape: shape[0] * shape[1][0] * shape[1][1],
        )

    def drawing(self, rank: int, world_size: int) -> Drawing:
        """How one process draws."""
        order = Order(
            seed=self.seed,
            window=self.window,
            window_bytes=self.window_bytes,
            rank=rank,
            world_size=world_size,
            share=self.share,
        )
        return Drawing(order, self.most_stretch, self.num_workers)


class TaskBatches:
    """The batches of one task, one after another. For one thread at a time.

    Args:
        examples: where its examples come from.
        settings: see :class:`BatchSettings`.
    """

    def __init__(self, examples: Examples, settings: BatchSettings) -> None:
        self.examples, self._settings = examples, settings
        self._num_batches = self._turn = 0
        self._resting: set[int] = set()
        self._waiting: list[list[Example]] = [[] for _ in RATIOS]
        self._to_read: list[Place] = []

    def next(self) -> SupervisedBatch:
        """The next batch.

        Raises:
            ValueError: all rows of a file are bad.
        """
        resolution = self._settings.resolution
        size = resolution.size(self._num_batches)
        count = resolution.batch_size(self._num_batches, self._settings.batch_size)
        self._read_waiting(size)
        num_read = 0
        while (ratio := self._chosen(count, num_read)) is None:
            example = self.examples.take(size)
            num_read += 1
            queue = self._waiting[example.ratio]
            # Out of turn a full bucket takes no more; what is read for another's turn would pile up in it.
            if not self._settings.balanced or len(queue) < count:
                queue.append(example)
        taken, self._waiting[ratio] = self._waiting[ratio][:count], self._waiting[ratio][count:]
        # Every process has had as many.
        self._num_batches += self.examples.world_size
        self._turn = (ratio + 1) % len(RATIOS)
        self._resting.discard(ratio)
        return _stacked(taken)

    def next_and_state(self) -> tuple[SupervisedBatch, dict[str, Any]]:
        """The next batch, and the position behind it."""
        return self.next(), self.state()

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        waiting = [example.place for queue in self._waiting for example in queue] + self._to_read
        return {
            "batches": self._num_batches,
            "turn": self._turn,
            "resting": sorted(self._resting),
            "waiting": [[place.data, place.shard, place.number] for place in waiting],
            **self.examples.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a position of :meth:`state`; what was waiting is read with the next batch."""
        self._num_batches, self._turn = int(state["batches"]), int(state["turn"])
        self._resting = set(state["resting"])
        self._waiting = [[] for _ in RATIOS]
        self._to_read = [Place(*place) for place in state["waiting"]]
        self.examples.restore(state)

    def _read_waiting(self, size: int) -> None:
        """Examples that wait at another resolution, or since before a stop, are read again at this one."""
        others = [queue for queue in self._waiting if queue and queue[0].size != size]
        places = [example.place for queue in others for example in queue] + self._to_read
        for queue in others:
            queue.clear()
        self._to_read = []
        for example in self.examples.again(places, size) if places else ():
            self._waiting[example.ratio].append(example)

    def _chosen(self, count: int, num_read: int) -> int | None:
        """The ratio of the batch, once its examples are there."""
        full = [ratio for ratio, queue in enumerate(self._waiting) if len(queue) >= count]
        if not self._settings.balanced:
            return full[0] if full else None
        in_turn = sorted(range(len(RATIOS)), key=lambda ratio: (ratio - self._turn) % len(RATIOS))
        for ratio in in_turn:
            if ratio in full:
                return ratio
            if ratio not in self._resting and num_read < self._settings.patience * count:
                return None
            self._resting.add(ratio)
        return None


def _stacked(examples: Sequence[Example]) -> SupervisedBatch:
    sources = [example.source for example in examples if example.source is not None]
    return SupervisedBatch(
        [example.text for example in examples],
        np.stack([example.target for example in examples]),
        np.stack(sources) if sources else None,
    )
