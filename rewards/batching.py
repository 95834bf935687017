"""Many callers of one reward: what waits at the same time is scored in one call, no larger than the reward declares."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from rewards.base import Images, Prompt, Reward, Scores, reward_name, reward_traits
from rewards.scoring import call_spans, score

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """There is no room for more images to wait."""


class RewardFailed(Exception):
    """The reward raised an exception, which is the cause of this one."""


@dataclass(frozen=True, eq=False)
class _Piece:
    """What has to be scored in one call: as much of a caller's images as a batch holds, or one group."""

    images: Images
    prompts: Sequence[Prompt]
    answer: Future[Scores] = field(default_factory=Future)


class Batcher:
    """Calls a reward from threads of its own, as many as the reward's ``concurrency`` asks for.

    Images of one size whose prompts wait at the same time are joined up to the reward's ``batch_size``, first come,
    first served; a group is always a call of its own. Where a joined call fails, its callers' images are scored apart,
    so that an exception reaches only those that it is about.

    Args:
        reward: the reward.
        max_waiting: most images that wait; more are refused, unless nothing waits at all.
        on_call: told the number of images of every call, from the thread that makes it.
    """

    def __init__(self, reward: Reward, max_waiting: int, on_call: Callable[[int], None] = lambda _: None) -> None:
        self._reward = reward
        self._traits = reward_traits(reward)
        self._max_waiting = max_waiting
        self._on_call = on_call
        self._queue: deque[_Piece] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        name = reward_name(reward)
        # Daemons, so that a reward that never returns does not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(self._traits.concurrency)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """How many images wait."""
        with self._changed:
            return self._num_waiting()

    def submit(self, images: Images, prompts: Sequence[Prompt]) -> list[Future[Scores]]:
        """Queue images uint8 [B, H, W, 3], B of 1 or more; -> the scores of consecutive parts of them.

        A future that is cancelled before its part is taken is not scored. It raises RewardFailed where the reward
        raises an exception.

        Raises:
            QueueFull: too many images wait.
            RuntimeError: the batcher is closed.
        """
        spans = call_spans(self._traits, prompts)
        pieces = [_Piece(images[start:stop], prompts[start:stop]) for start, stop in spans]
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the batcher is closed")
            waiting = self._num_waiting()
            if waiting and waiting + len(images) > self._max_waiting:
                raise QueueFull(f"{waiting} images wait, and {self._max_waiting} may")
            self._queue.extend(pieces)
            self._changed.notify(len(pieces))
        return [piece.answer for piece in pieces]

    def close(self, seconds: float) -> None:
        """Cancel what waits, and give the calls that run some seconds to end."""
        with self._changed:
            self._is_closed = True
            waiting = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for piece in waiting:
            piece.answer.cancel()
        for thread in self._threads:
            thread.join(seconds / len(self._threads))

    def _num_waiting(self) -> int:
        return sum(len(piece.images) for piece in self._queue if not piece.answer.cancelled())

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
                taken = self._take()
            pieces = [piece for piece in taken if piece.answer.set_running_or_notify_cancel()]
            if pieces:
                self._answer(pieces)

    def _take(self) -> list[_Piece]:
        """Take the first piece from the queue, and those that fit into its call."""
        first = self._queue.popleft()
        taken, count = [first], len(first.images)
        if self._traits.scope == "group":
            return taken
        left: deque[_Piece] = deque()
        for piece in self._queue:
            fits = self._traits.batch_size is None or count + len(piece.images) <= self._traits.batch_size
            if fits and piece.images.shape[1:] == first.images.shape[1:]:
                taken.append(piece)
                count += len(piece.images)
            else:
                left.append(piece)
        self._queue = left
        return taken

    def _answer(self, pieces: Sequence[_Piece]) -> None:
        images = np.concatenate([piece.images for piece in pieces])
        prompts = [prompt for piece in pieces for prompt in piece.prompts]
        try:
            self._on_call(len(images))
            scores = score(self._reward, images, prompts)
        except (Exception, SystemExit) as error:  # Whatever a reward raises, the others' images go on.
            self._fail(pieces, error)
            return
        stops = np.cumsum([len(piece.images) for piece in pieces]).tolist()
        for piece, stop in zip(pieces, stops, strict=True):
            piece.answer.set_result(_part(scores, stop - len(piece.images), stop))

    def _fail(self, pieces: Sequence[_Piece], error: BaseException) -> None:
        if len(pieces) > 1:
            logger.warning("a call for %d requests failed (%r); they are scored apart", len(pieces), error)
            for piece in pieces:
                self._answer([piece])
            return
        failed = RewardFailed(f"{reward_name(self._reward)} raised {type(error).__name__}")
        failed.__cause__ = error
        pieces[0].answer.set_exception(failed)


def _part(scores: Scores, start: int, stop: int) -> Scores:
    """Some scores of many, the opposite of :func:`rewards.scoring.join_scores`."""
    return Scores(
        scores.total[start:stop],
        {name: values[start:stop] for name, values in scores.components.items()},
        {index - start: reason for index, reason in scores.reasons.items() if start <= index < stop},
    )
