"""Where supervised batches come from: a protocol that can be resumed, and the embedded world's source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from envs.scenes.grammar import Split
    from envs.scenes.pretraining import SupervisedBatch


class BatchSource(Protocol):
    """Endless batches of each task, with a position that can be saved.

    After ``load_state_dict(state_dict())`` the next batches are those that would have come without a stop. A source may
    shuffle, stream or be one process's share: what it needs to go on is in its state, as JSON. Where another number of
    processes goes on, each is given the states of all that were before.
    """

    def next_batch(self, task: str, /) -> SupervisedBatch:
        """The next batch of ``"t2i"`` or ``"edit"``; the source says how large batches are.

        Raises:
            ValueError: there is no such task in it.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on from a position of :meth:`state_dict`."""
        ...

    def load_shares(self, states: Sequence[Mapping[str, Any]], /) -> None:
        """Go on as one of another number of processes, from the positions of those before, by rank.

        What comes next is this process's part of what they would have had. A source that cannot deal it out says so.
        """
        ...


@dataclass
class ScenesSource:
    """Rendered prompts and edits of the embedded world; batch k of a task follows from (seed, task, k) alone.

    Processes take turns: the k-th batch of one is number ``k world_size + rank``. So another number of processes goes
    on with the same batches.

    Attributes:
        sizes: examples of a batch, by task.
        seed: of the draws.
        split: of the world.
        mislabelled: share of the pairs whose text and picture differ in one thing.
        rank: of this process among those that share the batches.
        world_size: their number.
    """

    sizes: Mapping[str, int]
    seed: int = 0
    split: Split = "train"
    mislabelled: float = 0.0
    rank: int = 0
    world_size: int = 1
    _drawn: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes.values()) < 1:
            raise ValueError(f"sizes: expected 1 or more examples for each task, got {dict(self.sizes)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: expected one of {self.world_size} from 0, got {self.rank}")

    def next_batch(self, task: str) -> SupervisedBatch:
        """See :class:`BatchSource`."""
        import numpy as np

        from envs.scenes.pretraining import supervised_batch

        if task not in self.sizes:
            raise ValueError(f"task: expected one of {', '.join(self.sizes)}, got {task!r}; give it a size")
        drawn = self._drawn.get(task, 0)
        self._drawn[task] = drawn + self.world_size
        rng = np.random.default_rng([self.seed, list(self.sizes).index(task), drawn + self.rank])
        return supervised_batch(task, rng, self.sizes[task], self.split, self.mislabelled)

    def state_dict(self) -> dict[str, Any]:
        """Batches drawn so far by all processes, each of which has drawn as many, by task."""
        return {"drawn": dict(self._drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`BatchSource`."""
        self._drawn = {task: int(count) for task, count in state["drawn"].items()}

    def load_shares(self, states: Sequence[Mapping[str, Any]]) -> None:
        """See :class:`BatchSource`; all processes have the same state."""
        self.load_state_dict(states[0])
