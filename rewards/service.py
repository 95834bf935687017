"""What a reward server answers: the three paths, and who is refused why."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.base import Reward, Scores, reward_name, reward_traits
from rewards.batching import Batcher, QueueFull, RewardFailed
from rewards.scoring import join_scores
from rewards.server_metrics import CONTENT_TYPE, ServerMetrics
from rewards.wire import check_token, encode_answer, parse_request
from rewards.wire_json import Limits, RequestError, too_large

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)

_FAILED = "the reward failed; the server's log says why"
_BUSY = 503
_GONE = 499  # Not sent, for nobody listens: how proxies count a client that went away.


@dataclass(frozen=True)
class ServiceSettings:
    """Who may ask a reward server for what.

    Attributes:
        token: whoever asks has to send it (``Authorization: Bearer TOKEN``); everyone may ask where it is empty.
        limits: of one request.
        max_waiting_images: most images that wait for a call; more get 503.
        max_requests: most requests that are read, wait or are scored at a time; more get 503.
        body_seconds: most time for a body to arrive, after which the client gets 408.

    Raises:
        ValueError: a number is out of range, or the token is no word of visible ASCII.
    """

    token: str = field(default="", repr=False)
    limits: Limits = field(default_factory=Limits)
    max_waiting_images: int = 4096
    max_requests: int = 64
    body_seconds: float = 60.0

    def __post_init__(self) -> None:
        check_token(self.token)
        for name in ("max_waiting_images", "max_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 < self.body_seconds < float("inf"):
            raise ValueError(f"body_seconds: expected a number above 0, got {self.body_seconds}")


class RewardService:
    """Answers ``POST /score``, ``GET /health`` and ``GET /metrics`` for one reward.

    Args:
        reward: the reward.
        settings: who may ask for what.
    """

    def __init__(self, reward: Reward, settings: ServiceSettings) -> None:
        self.settings = settings
        self.metrics = ServerMetrics()
        self.batcher = Batcher(reward, settings.max_waiting_images, self.metrics.called)
        self._name = reward_name(reward)
        self._traits = reward_traits(reward)
        self._num_requests = 0

    def app(self) -> Starlette:
        """The application, for a server that speaks ASGI."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        async def refuse(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            return _json_error(error.status_code, f"{request.method} {request.url.path:.80}: {error.detail}")

        routes = [
            Route("/score", self._score, methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics_page, methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: refuse})

    async def _score(self, request: Request) -> Response:
        started = time.perf_counter()
        response = await self._answer(request)
        self.metrics.answered(response.status_code, time.perf_counter() - started)
        return response

    async def _answer(self, request: Request) -> Response:
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        try:
            self._check_token(request)
            with self._place():
                scores = await self._scores(request)
            self.metrics.scored(len(scores.total), int(np.isnan(scores.total).sum()))
            return Response(encode_answer(scores, self._traits.fingerprint), media_type="application/json")
        except RequestError as error:
            return _json_error(error.status, str(error))
        except QueueFull as error:
            return _json_error(_BUSY, f"the server is busy: {error}")
        except ClientDisconnect:
            return _json_error(_GONE, "the client went away")
        except RewardFailed as error:
            logger.error("%s failed", self._name, exc_info=error.__cause__)
        except Exception:  # A defect of ours, or an answer that cannot be encoded; the server goes on.
            logger.exception("a request for %s failed", self._name)
        return _json_error(500, _FAILED)

    async def _scores(self, request: Request) -> Scores:
        # Browsers send no such type to another site without asking it first, and it is never told yes.
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise RequestError(f"Content-Type: expected application/json, got {kind or 'none':.80}", 415)
        body = await _body(request, self.settings)
        # Unpacking takes a while, in which others are read and answered.
        images, prompts = await asyncio.to_thread(parse_request, body, self.settings.limits)
        del body
        return join_scores(await _while_connected(request, self.batcher.submit(images, prompts)))

    async def _health(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        # Whatever watches over processes need not know the token to see that this one is alive.
        if self.settings.token and "authorization" not in request.headers:
            return JSONResponse({"status": "ok"})

        async def state() -> Response:
            # All of them, so that a client cuts its requests by them and is refused none.
            limits = asdict(self.settings.limits)
            return JSONResponse(
                {"status": "ok", "reward": self._name, "traits": asdict(self._traits), "limits": limits}
            )

        return await self._authorized(request, state)

    async def _metrics_page(self, request: Request) -> Response:
        from starlette.responses import Response

        async def page() -> Response:
            return Response(self.metrics.page(self.batcher.waiting), headers={"Content-Type": CONTENT_TYPE})

        return await self._authorized(request, page)

    async def _authorized(self, request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
        try:
            self._check_token(request)
        except RequestError as error:
            return _json_error(error.status, str(error))
        return await answer()

    def _check_token(self, request: Request) -> None:
        if not self.settings.token:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        # In a time that does not tell how much of it was right.
        is_right = hmac.compare_digest(token.strip().encode(), self.settings.token.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise RequestError("Authorization: expected 'Bearer TOKEN' with this server's token", 401)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places for requests; they run in one event loop, so that counting needs no lock."""
        if self._num_requests >= self.settings.max_requests:
            raise RequestError(f"the server is busy: it has {self._num_requests} requests", _BUSY)
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1


async def _body(request: Request, settings: ServiceSettings) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > settings.limits.max_body_bytes:
        raise too_large(int(length), settings.limits)
    try:
        async with asyncio.timeout(settings.body_seconds):
            return await _streamed(request, settings.limits)
    except TimeoutError as error:
        raise RequestError(f"body: expected it within {settings.body_seconds:g} s, got a part of it", 408) from error


async def _streamed(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limits.max_body_bytes:
            raise too_large(len(body), limits)
    return bytes(body)


async def _while_connected(request: Request, futures: Sequence[Future[Scores]]) -> list[Scores]:
    """Wait for scores; where the client goes away first, what still waits is not scored."""
    from starlette.requests import ClientDisconnect

    answers: asyncio.Future[list[Scores]] = asyncio.gather(*map(asyncio.wrap_future, futures))
    # After the body nothing comes but the message that the client is gone.
    gone = asyncio.create_task(_received(request))
    try:
        either: list[asyncio.Future[Any]] = [answers, gone]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise ClientDisconnect
        return answers.result()
    finally:
        answers.cancel()
        gone.cancel()
        for future in futures:
            future.cancel()


async def _received(request: Request) -> None:
    await request.receive()


def _json_error(status: int, reason: str) -> Response:
    from starlette.responses import Response

    headers = {"Retry-After": "1"} if status == _BUSY else {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Response(json.dumps({"error": reason}), status, headers, media_type="application/json")
