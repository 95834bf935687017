"""An event loop in a thread of its own: connections outlive the loops that rewards are called from.

:func:`rewards.scoring.score` starts an event loop for every batch and closes it after; a connection belongs to the loop
that opened it, so it would be made anew each time.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_JOIN_SECONDS = 10.0


class BackgroundLoop:
    """Runs coroutines in another thread, which starts with the first one.

    The thread ends with :meth:`close`, when the object is collected, or with the interpreter.

    Args:
        on_close: awaited in the thread before its loop ends. It must not hold the object, or nothing is collected.
    """

    def __init__(self, on_close: Callable[[], Awaitable[None]]) -> None:
        self._on_close = on_close
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._end: weakref.finalize[[asyncio.AbstractEventLoop, asyncio.Event, threading.Thread], Any] | None = None
        self._is_closed = False

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the thread; cancelling the future cancels it there.

        Raises:
            RuntimeError: the loop is closed, or its thread was left behind by a fork.
        """
        with self._lock:
            if self._is_closed:
                work.close()
                raise RuntimeError("the client is closed; make a new one")
            loop = self._loop or self._start()
            if self._thread is None or not self._thread.is_alive():
                # The future would never be done.
                work.close()
                raise RuntimeError("the client's thread is gone, as after a fork; make a client in each process")
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
        thread = threading.Thread(target=_run, args=arguments, name="judge-client", daemon=True)
        thread.start()
        self._thread = thread
        self._loop, stop = started.result()
        self._end = weakref.finalize(self, _stop, self._loop, stop, thread)
        return self._loop


def _run(
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]], on_close: Callable[[], Awaitable[None]]
) -> None:
    async def main() -> None:
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await on_close()

    asyncio.run(main())


def _stop(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, thread: threading.Thread) -> None:
    if not thread.is_alive():
        return
    loop.call_soon_threadsafe(stop.set)
    # The last reference may go in the thread itself, which cannot wait for its own end.
    if threading.current_thread() is not thread:
        thread.join(_JOIN_SECONDS)
