"""Batches of both tasks for pre-training from files, made ahead by a thread each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.data.batches import BatchSettings, TaskBatches
from envs.data.dealing import redealt_position
from envs.data.examples import Examples
from envs.data.fields import Kind
from envs.data.prefetch import Prefetch
from envs.data.problems import Problems
from envs.data.records import RecordFiles, RecordSet
from envs.scenes.pretraining import SupervisedBatch

KINDS: dict[str, Kind] = {"t2i": "t2i", "edit": "edit"}
_VERSION = 2
# As long as captions get that CLIP reads to their end.
_TEXT = "a red circle to the left of a large blue square " * 5


class StreamBatches:
    """Endless batches of ``"t2i"`` and ``"edit"`` sets; satisfies ``pdtr.pretraining_data.BatchSource``.

    Its state is of one process: each saves and loads its own, or another number of processes loads all of them.

    Args:
        sets: the data sets of each task.
        settings: see :class:`BatchSettings`; of all tasks, or by task.
        rank: the process's number.
        world_size: number of processes; every row of an epoch comes to exactly one of them.

    Raises:
        FileNotFoundError: a path or a glob finds nothing.
        ValueError: there is an unknown task, one without sets, or a file of no known kind.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[RecordSet]],
        settings: BatchSettings | Mapping[str, BatchSettings] = BatchSettings(),  # noqa: B008 (frozen)
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        unknown = sorted(set(sets) - set(KINDS))
        if unknown or not sets or not all(sets.values()):
            got = f"a task {unknown[0]!r}" if unknown else "none" if not sets else "a task without one"
            raise ValueError(f"sets: expected data sets for {' or '.join(KINDS)}, got {got}")
        self._rank, self._world_size = rank, world_size
        by_task = dict.fromkeys(sets, settings) if isinstance(settings, BatchSettings) else settings
        self._settings = by_task
        self._tasks: dict[str, TaskBatches] = {}
        for task, of_task in sets.items():
            files = [RecordFiles(data, KINDS[task], by_task[task].limits) for data in of_task]
            examples = Examples(list(KINDS).index(task), files, by_task[task].drawing(rank, world_size))
            self._tasks[task] = TaskBatches(examples, by_task[task])
        self._states = {task: batches.state() for task, batches in self._tasks.items()}
        self._ahead = {
            task: Prefetch(batches.next_and_state, by_task[task].prefetch) for task, batches in self._tasks.items()
        }

    def next_batch(self, task: str) -> SupervisedBatch:
        """The next batch of a task: texts, targets, and for ``"edit"`` sources, uint8 [B, H, W, 3].

        Raises:
            ValueError: there are no sets for the task, or all rows of a file are bad.
        """
        if task not in self._ahead:
            raise ValueError(f"task: expected one of {', '.join(self._ahead)}, got {task!r}; give it data sets")
        batch, self._states[task] = self._ahead[task].next()
        return batch

    def largest_batches(self) -> dict[str, SupervisedBatch]:
        """Of each task whose resolution grows, a batch of black pictures as large as its batches get; none is read."""
        found = {}
        for task in self._tasks:
            count, size = self._settings[task].largest()
            if len(self._settings[task].resolution.sizes) > 1:
                pictures = np.zeros((count, *size, 3), np.uint8)
                found[task] = SupervisedBatch([_TEXT] * count, pictures, pictures if task == "edit" else None)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch of each task that was handed out, as JSON."""
        identities = {task: batches.examples.identity() for task, batches in self._tasks.items()}
        return {"version": _VERSION, "identity": identities, "tasks": dict(self._states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position of :meth:`state_dict`: the next batches are those that would have come.

        Raises:
            ValueError: the position is of other files, another seed or another share.
        """
        self._check_same(state, {})
        self._restore(state["tasks"])

    def load_shares(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the positions of another number of processes, given by rank.

        The epochs that they had begun are finished first, with every row that is left coming to exactly one process;
        see ``envs.data.dealing``. Batches are others than theirs would have been.

        Raises:
            ValueError: a position is of other files, another seed or another share.
        """
        for rank, state in enumerate(states):
            self._check_same(state, {"rank": rank, "world_size": len(states)})
        tasks = {task: [state["tasks"][task] for state in states] for task in self._tasks}
        self._restore({task: redealt_position(of, self._rank, self._world_size) for task, of in tasks.items()})

    def _restore(self, positions: Mapping[str, Mapping[str, Any]]) -> None:
        for task, batches in self._tasks.items():
            self._ahead[task].stop()
            batches.restore(positions[task])
            self._states[task] = batches.state()

    def problems(self) -> dict[str, Problems]:
        """The bad rows of this sitting, by task; rows that were read ahead are among them."""
        return {task: batches.examples.problems for task, batches in self._tasks.items()}

    def write_problems(self, folder: Path) -> None:
        """Write the counts and the first bad rows of each task to ``<task>_problems.jsonl``."""
        for task, problems in self.problems().items():
            problems.write(folder / f"{task}_problems.jsonl")

    def close(self) -> None:
        """End the threads."""
        for task, batches in self._tasks.items():
            self._ahead[task].stop()
            batches.examples.close()

    def _check_same(self, state: Mapping[str, Any], instead: Mapping[str, int]) -> None:
        """Whether a state is of these files and this share, or of what is named instead."""
        if state.get("version") != _VERSION:
            raise ValueError(f"state: expected version {_VERSION}, got {state.get('version')!r}")
        for task, batches in self._tasks.items():
            recorded = state["identity"].get(task, {})
            for name, value in {**batches.examples.identity(), **instead}.items():
                if recorded.get(name) != value:
                    raise ValueError(
                        f"state of {task!r}: expected a position with the same {name} ({value}), got one with "
                        f"{recorded.get(name)}; start the data anew, or go on with what the position is of"
                    )
