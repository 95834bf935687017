"""vLLM as a process of its own, in an environment of its own: started, waited for with a real judgement, stopped."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import urlsplit

from rewards.judges.client import JudgeClient
from rewards.judges.judge import VLMJudge
from rewards.judges.readouts import Reading
from rewards.judges.settings import ClientSettings, JudgeSettings
from rewards.judges.vllm_environment import ServingError, find_python, is_cpu_build, log_tail
from rewards.judges.vllm_flags import VLLMSettings, arguments, environment

PROBE_TEMPLATE = "t2i_following.v1"
_LOOK_AGAIN_SECONDS = 0.5
_PROBE_SECONDS = 300.0
"""The first judgement compiles, on a busy machine for minutes; the time allowed for the start bounds it as well."""
_START_GRACE_SECONDS = 2.0


class VLLMServer:
    """One vLLM process group; a context manager that starts it and stops it.

    Args:
        settings: what is served; a port of 0 becomes a free one here and stays the same over restarts.
        log: file that takes all that vLLM says, written anew at each start; ``runs/judge/PORT.log`` unless given.
        python: the interpreter of its environment; :func:`find_python`'s unless given.

    Raises:
        ServingError: there is no such environment.
    """

    def __init__(self, settings: VLLMSettings, log: Path | None = None, python: Path | None = None) -> None:
        self._python = python or find_python()
        self._is_cpu = is_cpu_build(self._python)
        self.settings = settings if settings.port else replace(settings, port=_free_port(settings.host))
        self.log = log or Path("runs") / "judge" / f"{self.settings.port}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    @property
    def url(self) -> str:
        """The base URL for clients on this machine."""
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = everywhere.get(self.settings.host, self.settings.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}/v1"

    @property
    def pid(self) -> int:
        """Of the process, which leads its group; 0 while there is none."""
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """Start the process; it answers some time later.

        Raises:
            ServingError: the port is taken, or it is started already.
        """
        if self._process is not None and self._process.poll() is None:
            raise ServingError(f"{self.url}: expected a server that is not running, got one with pid {self.pid}")
        lock = _claim(self.settings.host, self.settings.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as said, lock:
            self._is_ready = False
            # A group of its own: a Ctrl-C is for us, who then stop vLLM and every process that it has started.
            self._process = subprocess.Popen(
                [str(self._python), *arguments(self.settings, self._is_cpu)],
                env=environment(self.settings, self._python, self._is_cpu, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )

    def wait_until_ready(self, seconds: float = 1800.0, waiting: Callable[[float], None] | None = None) -> Reading:
        """Wait until a real judgement comes back, by the path that rewards take; /health says yes long before.

        Args:
            seconds: most time to wait.
            waiting: called with the seconds so far, about twice a second.

        Returns:
            What was read, or NaN with a reason where the model does not answer in labels.

        Raises:
            ServingError: vLLM has ended, or did not answer in time.
            JudgeConfigurationError: it refuses what judges ask.
        """
        started = time.monotonic()
        reason = "it was not asked"
        while (elapsed := time.monotonic() - started) < seconds:
            self.check_running()
            if waiting is not None:
                waiting(elapsed)
            # Connections are refused until vLLM listens; only then is there somebody to ask.
            if self._listens():
                reading = asyncio.run(_probe(self.url, self.settings, min(seconds - elapsed, _PROBE_SECONDS)))
                if reading.components:
                    self._is_ready = True
                    return reading
                reason = reading.reason
            time.sleep(_LOOK_AGAIN_SECONDS)
        raise ServingError(
            f"{self.url}: expected an answer within {seconds:g} s, got none ({reason}); the log: {self.log}"
        )

    def _listens(self) -> bool:
        parts = urlsplit(self.url)
        try:
            with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=_LOOK_AGAIN_SECONDS):
                return True
        except OSError:
            return False

    def check_running(self) -> None:
        """Let a process that runs pass.

        Raises:
            ServingError: it has ended; the message has the end of its log.
        """
        status = self._process.poll() if self._process else None
        if self._process is None or status is not None:
            how = f"by signal {-status}" if status is not None and status < 0 else f"with exit status {status}"
            raise ServingError(f"vLLM ended {how}: {log_tail(self.log)}; its whole log: {self.log}")

    def wait(self) -> None:
        """Wait while it serves.

        Raises:
            ServingError: it has ended, which it never does by itself.
        """
        if self._process is not None:
            self._process.wait()
        self.check_running()

    def stop(self, seconds: float = 30.0) -> None:
        """Ask the process to end, then end its whole group; nothing of it is left. A second call does nothing.

        Args:
            seconds: how long calls under way may take to end. While it starts there are none, and vLLM would finish
                its start before it ends: it gets a moment.
        """
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            process.wait(seconds if self._is_ready else min(seconds, _START_GRACE_SECONDS))
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also where the process is gone: its workers may be left, and hold the memory.
            _kill_group(process.pid)
            process.wait()

    def __enter__(self) -> VLLMServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


async def _probe(url: str, settings: VLLMSettings, seconds: float) -> Reading:
    client_settings = ClientSettings(attempt_seconds=seconds, call_seconds=seconds, api_key=settings.api_key)
    # The least label mass is 0, and no label's tokens are checked: a model that says something else is served as well.
    judge_settings = JudgeSettings(min_label_mass=0.0, top_logprobs=min(settings.max_logprobs, 20))
    client = JudgeClient(url, client_settings)
    try:
        judge = VLMJudge(client, settings.served_name, PROBE_TEMPLATE, judge_settings)
        return (await judge.warm_up(check_tokens=False))[client.base_urls[0]]
    finally:
        client.close()


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def _claim(host: str, port: int) -> IO[bytes]:
    """A lock on a port that lasts as long as a process that has it open, so that of two servers only one starts.

    Whether the port is free does not say it: vLLM shares its port with any other process of the user's that asks to,
    and for a minute of its start is not seen to listen.

    Raises:
        ServingError: the port is taken.
    """
    lock = (Path(tempfile.gettempdir()) / f"pdtr-judge-{os.getuid()}-{port}.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except BlockingIOError:
        is_ours = False
    if is_ours and _is_free(host, port):
        return lock
    lock.close()
    raise ServingError(
        f"port {port} of {host}: expected a free one, got one that {'is taken' if is_ours else 'another judge has'}; "
        "choose another with --port, or 0 for any"
    )


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        # As vLLM does: connections of a server that has just ended do not keep the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True
