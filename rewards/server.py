"""Any reward behind HTTP: ``POST /score``, ``GET /health``, ``GET /metrics``; :mod:`rewards.remote` asks it."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import signal
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from rewards.base import Reward
from rewards.foreign import check_callable
from rewards.service import RewardService, ServiceSettings
from rewards.wire import check_token

if TYPE_CHECKING:
    import uvicorn

TOKEN_VARIABLE = "PDTR_REWARD_TOKEN"
_KEEP_SECONDS = 30
# By then uvicorn has waited for every answer that it could wait for.
_JOIN_SECONDS = 1.0
_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class ServerSettings:
    """Where a reward server listens, and to whom.

    Attributes:
        host: address or name; others than this machine's own need a token.
        port: 0 takes a free one.
        service: who may ask for what.
        shutdown_seconds: how long requests may take to end once the server stops.

    Raises:
        ValueError: a number is out of range, or other machines could ask without a token.
    """

    host: str = "127.0.0.1"
    port: int = 0
    service: ServiceSettings = field(default_factory=ServiceSettings)
    shutdown_seconds: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port: expected 0 to 65535, got {self.port}")
        if self.shutdown_seconds < 1:
            raise ValueError(f"shutdown_seconds: expected 1 or more, got {self.shutdown_seconds}")
        if not self.service.token and not _is_loopback(self.host):
            raise ValueError(
                f"host: expected this machine's own address without a token, got {self.host!r}; give a token "
                f"(--token-file, or {TOKEN_VARIABLE} in the environment), or leave the host at 127.0.0.1"
            )


class RewardServer:
    """A reward behind HTTP, on a port that is taken when this is made.

    :meth:`run` serves in the main thread until a signal comes; in a ``with`` statement it is served from a thread.

    Args:
        reward: the reward; it is called from threads, as many at a time as its ``concurrency``.
        settings: where it listens, and to whom.

    Attributes:
        url: where to ask, such as ``http://127.0.0.1:8765``.

    Raises:
        ValueError: the reward cannot be called as one, or the port cannot be taken.
        ModuleNotFoundError: starlette or uvicorn, of the extra ``reward-server``, is not installed.
    """

    def __init__(self, reward: Reward, settings: ServerSettings | None = None) -> None:
        missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(f"a reward server needs {missing[0]}: pip install 'pdtr[reward-server]'")
        check_callable(reward, "images", "prompts")
        self._settings = settings or ServerSettings()
        self._socket = _listening(self._settings.host, self._settings.port)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._service = RewardService(reward, self._settings.service)
        self._server = self._made()
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; then no more is taken, and what was taken is answered.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM, with 143, the code that a shell has for it.
        """
        # uvicorn stops at both, and raises them again once it has.
        before = signal.signal(signal.SIGTERM, _exit)
        try:
            self._serve()
        finally:
            signal.signal(signal.SIGTERM, before)

    def __enter__(self) -> RewardServer:
        self._thread = threading.Thread(target=self._serve, name="reward-server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        try:
            self._server.run([self._socket])
        finally:
            self._socket.close()
            self._service.batcher.close(_JOIN_SECONDS)

    def _made(self) -> uvicorn.Server:
        import uvicorn

        config = uvicorn.Config(
            self._service.app(),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_SECONDS,
            timeout_graceful_shutdown=self._settings.shutdown_seconds,
        )
        return uvicorn.Server(config)


def read_token(path: Path | None = None) -> str:
    """The token of a file, or of the environment's ``PDTR_REWARD_TOKEN``; empty where there is neither.

    A command line would show it to every user of the machine.

    Raises:
        ValueError: the file is empty or not one word of visible ASCII.
        OSError: the file cannot be read.
    """
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        check_token(token)
        return token
    try:
        token = path.read_text("ascii").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a token, one word of visible ASCII, got other bytes") from error
    if not token:
        raise ValueError(f"{path}: expected a token, one word of visible ASCII, got an empty file")
    check_token(token)
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        # Python adds the address to the text of some errors; the number alone gives the system's own words.
        number = error.errno if isinstance(error, OSError) else None
        said = os.strerror(number) if number is not None and number > 0 else str(error)
        raise ValueError(
            f"host and port: expected an address that is free, got {host!r} and {port}: {said}; choose another port"
        ) from error
    # asyncio does so only where a socket names its protocol, and what is accepted here does not: an answer's body would
    # wait 40 ms for the acknowledgement of its headers.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_TERMINATED)
