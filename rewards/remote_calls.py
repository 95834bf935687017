"""One HTTP exchange with a reward server, tried again until it succeeds, is refused for good, or the time is over."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rewards.base import Unavailable
from rewards.wire import check_token

if TYPE_CHECKING:
    import httpx

_MOST_BYTES = 64 * 2**20
_MOST_PAUSE = 10.0
# Less than the server keeps a connection, so that hardly one is used that it is about to close.
_KEEP_SECONDS = 20.0
# The server or a proxy before it is slow, busy or about to be started anew.
_PASSING = (408, 425, 429, 502, 503, 504)


@dataclass(frozen=True)
class RemoteSettings:
    """How a reward server is asked.

    Attributes:
        token: sent as a bearer token; none where empty.
        deadline_seconds: most time of a request with all its tries, after which its images have no reward.
        connect_seconds: most time for a connection to be made, in each try.
        backoff_seconds: pause before the second try; it doubles up to 10 s, and is drawn from its upper half.
        use_environment_proxies: whether HTTP_PROXY and its like are followed.

    Raises:
        ValueError: a time is not above 0.
    """

    token: str = field(default="", repr=False)
    deadline_seconds: float = 120.0
    connect_seconds: float = 5.0
    backoff_seconds: float = 0.2
    use_environment_proxies: bool = False

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "connect_seconds", "backoff_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number of seconds above 0, got {getattr(self, name)}")
        check_token(self.token)


class _PassingError(Exception):
    """A try that failed and may be tried again, after some seconds where the server says so."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class RemoteCalls:
    """Exchanges with one server over connections that are kept; from any thread.

    Args:
        url: where it is, without a path of its own.
        settings: how it is asked.

    Raises:
        ValueError: the URL is none that can be asked.
    """

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        self.url = _checked_url(url)
        self._settings = settings
        self._lock = threading.Lock()
        self._http: httpx.Client | None = None

    def exchange(self, method: str, path: str, content: bytes | None = None) -> bytes:
        """Ask for a path; -> the body of the answer.

        Raises:
            Unavailable: no answer in time; the message has the last reason.
            ValueError: the server refuses this request, and would again.
            RuntimeError: the reward raised an exception on the server.
        """
        seconds = self._settings.deadline_seconds
        deadline = time.monotonic() + seconds
        pause = self._settings.backoff_seconds
        tries = 0
        while True:
            tries += 1
            try:
                return self._attempt(method, path, content, deadline)
            except _PassingError as error:
                wait = max(pause * random.uniform(0.5, 1.0), error.retry_after)
                if time.monotonic() + wait >= deadline:
                    said = f"{tries} {'try' if tries == 1 else 'tries'}, the last: {error}"
                    raise Unavailable(f"{self.url}: no answer within {seconds:g} s ({said})") from error
            time.sleep(wait)
            pause = min(2 * pause, _MOST_PAUSE)

    def close(self) -> None:
        """Close the connections; the next exchange opens new ones."""
        with self._lock:
            if self._http is not None:
                self._http.close()
            self._http = None

    def _attempt(self, method: str, path: str, content: bytes | None, deadline: float) -> bytes:
        import httpx

        http = self._connected()
        left = max(deadline - time.monotonic(), 0.001)
        timeout = httpx.Timeout(left, connect=min(left, self._settings.connect_seconds))
        try:
            with http.stream(method, self.url + path, content=content, timeout=timeout) as response:
                body = _read(response, deadline)
        except httpx.TimeoutException as error:
            raise _PassingError(f"{_said(error)} while waiting") from error
        except httpx.RequestError as error:
            raise _PassingError(_said(error)) from error
        self._check(response, body)
        return body

    def _check(self, response: httpx.Response, body: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        reason = f"{status}: {_reason(body)}"
        if status in _PASSING:
            raise _PassingError(reason, _seconds(response.headers.get("retry-after", "")))
        if status >= 500:
            raise RuntimeError(f"{self.url}: {reason}")
        if status < 400:
            raise ValueError(f"{self.url}: expected a reward server, got an answer with status {reason}; name its URL")
        hint = "; give RemoteSettings(token=...)" if status == 401 else ""
        raise ValueError(f"{self.url}: the server refuses the request, {reason}{hint}")

    def _connected(self) -> httpx.Client:
        import httpx

        with self._lock:
            if self._http is None:
                headers = {"Content-Type": "application/json", "Accept": "application/json"}
                if self._settings.token:
                    headers["Authorization"] = f"Bearer {self._settings.token}"
                self._http = httpx.Client(
                    headers=headers,
                    # Whoever calls bounds how many there are at a time.
                    limits=httpx.Limits(keepalive_expiry=_KEEP_SECONDS),
                    trust_env=self._settings.use_environment_proxies,
                )
            return self._http


def _read(response: httpx.Response, deadline: float) -> bytes:
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) > _MOST_BYTES:
            raise ValueError(f"{response.url}: expected an answer of at most {_MOST_BYTES} bytes, got more")
        # httpx bounds the time between two reads; a server that trickles would never run into that.
        if time.monotonic() > deadline:
            raise _PassingError("half an answer")
    return bytes(body)


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            f"url: expected one such as http://127.0.0.1:8765, without a user or a query, got {_without_user(url)!r}"
        )
    return url.rstrip("/")


def _without_user(url: str) -> str:
    # What stands before the @ may be a password.
    return url.rpartition("@")[2]


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return " ".join(body.decode(errors="replace").split())[:200] or "no reason given"


def _seconds(header: str) -> float:
    return float(header) if header.isdecimal() and header.isascii() else 0.0


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
