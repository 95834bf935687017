"""A real vLLM that serves a tiny judge, started the way that a user starts it; `make test-judge` runs these tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.judges.tiny import make_tiny_vlm
from rewards.judges.vllm_environment import find_python

START_SECONDS = 420.0
"""Half a minute on two idle cores, and three beside a training run."""
NAME = "tiny"


class Serving:
    """`pdtr judge serve` as a process; its port stays the same over restarts."""

    def __init__(self, checkpoint: Path, folder: Path, port: int) -> None:
        self.checkpoint = checkpoint
        self.url = f"http://127.0.0.1:{port}/v1"
        self.log, self._out = folder / "vllm.log", folder / "out.txt"
        self._port = port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        flags = ["--name", NAME, "--port", str(self._port), "--max-model-len", "4096", "--max-pixels", "4096"]
        flags += ["--threads", "1", "--cpu-cache-gib", "1", "--log", str(self.log)]
        command = [sys.executable, "-m", "experiments.cli", "judge", "serve", str(self.checkpoint), *flags, *more]
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    def said(self) -> str:
        return self._out.read_text("utf-8", "replace")

    def wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while f"serving {NAME} at {self.url}" not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.5)

    def ensure(self) -> None:
        """Start it where it does not run: a test may have stopped it."""
        if self.process is None or self.process.poll() is not None:
            self.start("--", "--max-num-seqs", "16")
            self.wait_until_ready()

    def wait(self, seconds: float = 60.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def workers(self) -> list[int]:
        """The processes of vLLM's group: the one that listens, its engine, and what they have started."""
        return [pid for pid, group in _groups() if group in self._leaders()]

    def _leaders(self) -> list[int]:
        mark = f"--port={self._port}".encode()
        return [pid for pid, group in _groups() if pid == group and mark in _command(pid).split(b"\0")]

    def engine(self) -> int:
        return next(pid for pid in self.workers() if b"EngineCore" in _command(pid))

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)


def _groups() -> list[tuple[int, int]]:
    """(process, its group) of all processes that run and are no zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if state != "Z":
                found.append((int(entry.name), int(group)))
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="session")
def judge_python() -> Path:
    return find_python()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vlm(tmp_path_factory.mktemp("checkpoint") / "tiny", ["make the red circle blue"])


@pytest.fixture(scope="session")
def serving_process(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    # A port below those that the system hands out, so that it is still free after a restart.
    serving = Serving(checkpoint, tmp_path_factory.mktemp("serving"), 20_000 + os.getpid() % 10_000)
    yield serving
    serving.stop()


@pytest.fixture
def serving(serving_process: Serving) -> Serving:
    serving_process.ensure()
    return serving_process
