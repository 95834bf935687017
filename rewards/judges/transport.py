"""One HTTP exchange with a server: an object comes back, or a fault, or an error of configuration."""

from __future__ import annotations

import asyncio
import io
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rewards.judges.faults import Fault, check_status, parse_object, retry_after_seconds

if TYPE_CHECKING:
    import aiohttp

_KEEP_SECONDS = 60.0
"""How long an idle connection is kept; a server may close it before, which is noticed when it is next used."""
_CONNECT_SECONDS = 10.0
_CONNECT_SHARE = 0.8
"""Of an exchange's time, where that is short: a connection that never came is told from an answer that never came."""


class Transport:
    """Kept-alive connections; used from one event loop only.

    Args:
        seconds: most time of one exchange, to the last byte.
        max_bytes: most bytes of an answer.
        api_key: sent as a bearer token; none where empty.
        use_environment_proxies: whether HTTP_PROXY and its like are followed.
    """

    def __init__(self, seconds: float, max_bytes: int, api_key: str, use_environment_proxies: bool) -> None:
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._api_key = api_key
        self._use_environment_proxies = use_environment_proxies
        self._http: aiohttp.ClientSession | None = None

    async def post(self, base_url: str, path: str, content: bytes) -> dict[str, Any]:
        """POST JSON and return the object that comes back.

        Raises:
            Fault: it may be tried again.
            JudgeConfigurationError: it would be refused again.
        """
        return await self._exchange("POST", located(base_url, path), content)

    async def get(self, base_url: str, path: str) -> dict[str, Any]:
        """GET the object at a path; raises as :meth:`post` does."""
        return await self._exchange("GET", located(base_url, path), None)

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close()

    async def _exchange(self, method: str, url: str, content: bytes | None) -> dict[str, Any]:
        import aiohttp

        # The first call loads certificates for a while, which is not the server's time.
        http = self._connected()
        # As a stream: of bytes alone, a long body would be sent in one piece.
        data = None if content is None else io.BytesIO(content)
        try:
            # One bound for everything; a server that trickles would never run into one on the time between two reads.
            async with (
                asyncio.timeout(self._seconds),
                http.request(method, url, data=data, allow_redirects=False) as response,
            ):
                body = await self._read(response, url)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Fault("connection", f"cannot connect to {url}: {_said(error)}", is_unreachable=True) from error
        except TimeoutError as error:
            raise Fault("timeout", f"no whole answer from {url} within {self._seconds:g} s") from error
        except aiohttp.ClientError as error:
            if isinstance(error.__cause__, aiohttp.http_exceptions.ContentEncodingError):
                raise Fault("garbage", f"cannot decode the answer of {url}: {_said(error)}") from error
            raise Fault("connection", f"the connection to {url} broke: {_said(error)}") from error
        wait = retry_after_seconds(response.headers.get("Retry-After"), datetime.now(UTC))
        check_status(response.status, wait, body, url)
        return parse_object(body, url)

    async def _read(self, response: aiohttp.ClientResponse, url: str) -> bytes:
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > self._max_bytes:
                raise Fault("too_large", f"the answer of {url} has more than {self._max_bytes} bytes")
        return bytes(body)

    def _connected(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._http is None:
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            if self._api_key:
                headers["Authorization"] = f"Bearer {self._api_key}"
            connect_seconds = min(_CONNECT_SECONDS, _CONNECT_SHARE * self._seconds)
            self._http = aiohttp.ClientSession(
                headers=headers,
                # Whoever calls bounds how many there are; a bound here as well could only make a call wait twice.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS),
                # The whole exchange has a bound of its own; a call waits for its turn, not for a connection.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=self._use_environment_proxies,
            )
        return self._http


def located(base_url: str, path: str) -> str:
    """The URL of a path behind a base URL; ``//path`` is behind the base without its ``/v1``."""
    if path.startswith("//"):
        return base_url.removesuffix("/v1") + path[1:]
    return base_url + path


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
