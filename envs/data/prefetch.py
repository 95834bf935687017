"""One thread that makes the next items while the last one is used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Full, Queue
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1


class Prefetch(Generic[T]):
    """Items in the order in which they are made; an error comes where its item would have.

    Args:
        make: makes the next item. While the thread runs nobody else may call it.
        depth: items that wait at most; 0 makes each where it is asked for, without a thread.
    """

    def __init__(self, make: Callable[[], T], depth: int) -> None:
        self._make, self._depth = make, depth
        self._waiting: Queue[T | Exception] = Queue(max(1, depth))
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self) -> T:
        """The next item; the first call starts the thread.

        Raises:
            Exception: what making it raised.
        """
        if not self._depth:
            return self._make()
        if self._thread is None:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()
        item = self._waiting.get()
        if isinstance(item, Exception):
            self._thread.join()
            self._thread = None
            raise item
        return item

    def stop(self) -> None:
        """End the thread and drop what waits; :meth:`next` may start it again."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while not self._waiting.empty():
            self._waiting.get_nowait()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                item: T | Exception = self._make()
            except Exception as error:  # It is raised where the item is asked for.
                item = error
            self._put(item)
            if isinstance(item, Exception):
                return

    def _put(self, item: T | Exception) -> None:
        while not self._stopping.is_set():
            try:
                self._waiting.put(item, timeout=_POLL_SECONDS)
                return
            except Full:
                continue
