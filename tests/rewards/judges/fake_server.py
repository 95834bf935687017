"""A real HTTP server on loopback, in a thread, that answers as it is told to: also late, in halves, or not at all."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from rewards.base import Images

FOREVER = 3600.0


@dataclass(frozen=True)
class Reply:
    """What goes out: ``sent`` is the share of the body that does before the connection is cut; 1 sends it whole."""

    status: int = 200
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    sent: float = 1.0


@dataclass(frozen=True)
class Request:
    """What came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


Handler = Callable[[Request], Reply]


class FakeServer:
    """Serves a handler on a port of its own, which it keeps when it is stopped and started again."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[Request] = []
        self.connections = 0
        self.port = 0
        self.busy = self.busiest = 0
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> FakeServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        self._ready.clear()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        """Cut every connection and refuse new ones."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)
            self._thread = None

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        # A judge's body is one line of a megabyte at times; asyncio's reader holds no more than its limit.
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**22)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = first.split(" ")
        request = Request(method, path, headers, json.loads(content) if content else None)
        self.requests.append(request)
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            reply = self.handler(request)
            await asyncio.sleep(reply.seconds)
        finally:
            self.busy -= 1
        fields = {"Content-Length": str(len(reply.body)), "Content-Type": "application/json", **reply.headers}
        lines = [f"HTTP/1.1 {reply.status} X", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + reply.body[: int(reply.sent * len(reply.body))])
        await writer.drain()
        return reply.sent == 1.0


def as_json(body: object, status: int = 200, **headers: str) -> Reply:
    return Reply(status, json.dumps(body).encode(), headers)


def completion(text: str = "", tokens: Mapping[str, float] | None = None) -> dict[str, Any]:
    """A chat completion; ``tokens`` are the probabilities at its first token, the most likely of which it says."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if tokens is not None:
        top = [
            {"token": token, "logprob": math.log(p) if p > 0 else -9999.0, "bytes": None}
            for token, p in sorted(tokens.items(), key=lambda item: -item[1])
        ]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        choice["message"]["content"] = text or top[0]["token"]
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


def says(tokens: Mapping[str, float]) -> Reply:
    return as_json(completion(tokens=tokens))


def parts(request: Request) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = request.body["messages"][0]["content"]
    return found


def pictures(request: Request) -> list[Images]:
    """The images of a request, in order."""
    urls = [part["image_url"]["url"] for part in parts(request) if part["type"] == "image_url"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def numbered(numbers: Sequence[int], side: int = 4) -> Images:
    """Images of one colour each, which is their number: [B, side, side, 3]."""
    values = np.array([[number & 255, number >> 8 & 255, number >> 16] for number in numbers], np.uint8)
    return np.broadcast_to(values[:, None, None], (len(values), side, side, 3)).copy()


def number(image: Images) -> int:
    """The number of a numbered image."""
    red, green, blue = (int(value) for value in image[0, 0])
    return red + 256 * green + 65536 * blue
