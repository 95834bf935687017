"""Event loops in threads of their own: connections, locks and queues outlive the batch that they were made for.

Whatever of asyncio a reward keeps from one call to the next belongs to the loop that it was made in, and fails or waits
for ever in another. :func:`rewards.scoring.score` has one loop for all asynchronous rewards, a judge's client its own.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
_JOIN_SECONDS = 10.0


class BackgroundLoop:
    """Runs coroutines in another thread, which starts with the first one.

    The thread ends with :meth:`close`, when the object is collected, or with the interpreter.

    Args:
        name: of whom it is, for messages and the thread.
        on_close: awaited in the thread before its loop ends. It must not hold the object, or nothing is collected.
    """

    def __init__(self, name: str, on_close: Callable[[], Awaitable[None]] | None = None) -> None:
        self._name, self._on_close = name, on_close
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._end: weakref.finalize[[asyncio.AbstractEventLoop, asyncio.Event, threading.Thread], Any] | None = None
        self._is_closed = False

    @property
    def is_current(self) -> bool:
        """Whether this is called in its thread."""
        return threading.current_thread() is self._thread

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the thread; cancelling the future cancels it there.

        Raises:
            RuntimeError: the loop is closed, or its thread was left behind by a fork.
        """
        with self._lock:
            if self._is_closed:
                work.close()
                raise RuntimeError(f"the {self._name} is closed; make a new one")
            loop = self._loop or self._start()
            if self._thread is None or not self._thread.is_alive():
                # The future would never be done.
                work.close()
                raise RuntimeError(f"the thread of the {self._name} is gone, as after a fork; make one in each process")
            return asyncio.run_coroutine_threadsafe(work, loop)

    def close(self) -> None:
        """Cancel what runs, wait for the thread to end; a second call does nothing."""
        with self._lock:
            self._is_closed = True
            end = self._end
        if end is not None:
            end()

    def _start(self) -> asyncio.AbstractEventLoop:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        arguments = (started, self._on_close)
        # A daemon, so that an interpreter that ends for another reason does not wait for a server.
        thread = threading.Thread(target=_run, args=arguments, name=self._name, daemon=True)
        thread.start()
        self._thread = thread
        self._loop, stop = started.result()
        self._end = weakref.finalize(self, _stop, self._loop, stop, thread)
        return self._loop


def _run(
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]], on_close: Callable[[], Awaitable[None]] | None
) -> None:
    async def main() -> None:
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if on_close is not None:
            await on_close()

    asyncio.run(main())


def _stop(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, thread: threading.Thread) -> None:
    if not thread.is_alive():
        return
    loop.call_soon_threadsafe(stop.set)
    # The last reference may go in the thread itself, which cannot wait for its own end.
    if threading.current_thread() is not thread:
        thread.join(_JOIN_SECONDS)


def same_device() -> Callable[[], None]:
    """What a thread has to call to use the GPU that this thread uses.

    CUDA's current device is a thread's own and the first one at the start: a reward that says "cuda" in another thread
    would be on the first GPU in every process of a run.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return _nothing
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def _nothing() -> None:
    pass


_lock = threading.Lock()
_shared: BackgroundLoop | None = None


def shared_loop() -> BackgroundLoop:
    """The loop that all asynchronous rewards of this process run in."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = BackgroundLoop("loop of the rewards")
        return _shared


def _forget() -> None:
    # A thread does not come along to a forked process, and its lock may have been held.
    global _lock, _shared
    _lock, _shared = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)
