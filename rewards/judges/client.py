"""Chat completions from one or several OpenAI-compatible servers: every call ends in an answer or in a reason.

Balancing, failover, retries and deadlines are here and not in a library's client, because what is tried again decides
whether a reward is lost, and what is not tried again decides how soon a wrong model name is noticed.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from rewards.background import BackgroundLoop
from rewards.judges.calls import Body, Calls, Outcome
from rewards.judges.counters import Counters, Statistics
from rewards.judges.servers import Server, checked_urls
from rewards.judges.settings import ClientSettings
from rewards.judges.transport import Transport


class JudgeClient:
    """Asks servers that all serve the same model; several judges may share one.

    Connections are kept in a thread of the client's own and reused over batches; the thread starts with the first call.
    Close it, or use it in a ``with`` statement; else it ends with the interpreter.

    Args:
        base_urls: one or several, such as ``http://127.0.0.1:8000/v1``.
        settings: how calls are made.

    Raises:
        ValueError: a base URL is none.
        ModuleNotFoundError: aiohttp, of the extra ``judge``, is not installed.
    """

    def __init__(self, base_urls: str | Sequence[str], settings: ClientSettings | None = None) -> None:
        if importlib.util.find_spec("aiohttp") is None:
            raise ModuleNotFoundError("a judge needs aiohttp: pip install 'pdtr[judge]'")
        self.settings = settings or ClientSettings()
        self._servers = [Server(url) for url in checked_urls(base_urls)]
        settings = self.settings
        self._transport = Transport(
            settings.attempt_seconds,
            settings.max_answer_bytes,
            settings.api_key,
            settings.use_environment_proxies,
        )
        self._background = BackgroundLoop("client of the judge", self._transport.close)
        self._counters = Counters()
        self._calls = Calls(self._servers, self._transport, settings, self._counters)

    @property
    def base_urls(self) -> tuple[str, ...]:
        """The servers, in the order given."""
        return tuple(server.url for server in self._servers)

    async def ask(self, requests: Sequence[Callable[[], Body]]) -> list[Outcome]:
        """Ask for one chat completion a request; from any event loop.

        Args:
            requests: functions that make the JSON bodies. Each is called in a worker thread when its turn comes near,
                so that images are encoded while others are judged; as many as are in flight lie ready, and no more.

        Returns:
            One outcome a request, in order.

        Raises:
            JudgeConfigurationError: a server refuses such requests; the others are cancelled.
            RuntimeError: the client is closed.
        """
        return await asyncio.wrap_future(self._background.submit(self._batch(requests)))

    async def ask_path(self, path: str, body: Body, attempts: int | None = None) -> dict[str, Any]:
        """POST a body to a path of some server and return the object it answers; tried again as calls are.

        Args:
            path: behind the base URL; a path that starts with ``//`` is behind the host, as vLLM's ``//tokenize``.
            body: JSON.
            attempts: most attempts; those of a call unless given.

        Raises:
            Fault: no answer within the attempts and the deadline of a call.
            JudgeConfigurationError: the server refuses the request.
        """
        most = attempts or self.settings.retry.attempts
        return await asyncio.wrap_future(self._background.submit(self._calls.path(path, body, most)))

    async def warm_up(self, body: Body) -> dict[str, Body | str]:
        """Send one real request to every server: /health may say yes before the first request compiles for seconds.

        Returns:
            By base URL: the answer, or the reason why there is none.

        Raises:
            JudgeConfigurationError: a server refuses such requests.
        """
        return await asyncio.wrap_future(self._background.submit(self._calls.warm_up(body)))

    async def served_models(self) -> dict[str, list[str] | str]:
        """Ask every server, once, what it serves.

        Returns:
            By base URL: the names of its models, or the reason why there are none.

        Raises:
            JudgeConfigurationError: a server refuses the request, as where the base URL or the key is wrong.
        """
        return await asyncio.wrap_future(self._background.submit(self._calls.served_models()))

    def statistics(self) -> Statistics:
        """The counts since the client was made."""
        return self._counters.snapshot()

    def close(self) -> None:
        """Cancel what runs, close the connections and end the thread."""
        self._background.close()

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def _batch(self, requests: Sequence[Callable[[], Body]]) -> list[Outcome]:
        deadline = asyncio.get_running_loop().time() + self.settings.batch_seconds
        calls = [asyncio.create_task(self._calls.complete(request, deadline)) for request in requests]
        try:
            return list(await asyncio.gather(*calls))
        finally:
            # After an error of one, or where the caller was cancelled, the others are of no use.
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
