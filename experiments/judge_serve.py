"""``pdtr judge serve MODEL``: vLLM with a judge's flags, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.judge import read_key

if TYPE_CHECKING:
    from rewards.judges.readouts import Reading
    from rewards.judges.vllm_server import VLLMServer

_REPORT_SECONDS = 30.0
_EXIT_STATUS = 128
"""Plus a signal's number: how shells name a process that a signal has ended."""


@dataclass(frozen=True)
class JudgeServeOptions:
    """Serve a judge with vLLM, in vLLM's own environment, until Ctrl-C or SIGTERM.

    `make judge-env` makes the environment. It is ready once a real judgement has come back. Flags behind a lone -- are
    handed to vLLM as they are, such as: -- --tensor-parallel-size 2. A key of PDTR_JUDGE_KEY in the environment, or of
    a file, is asked of every caller.

    Attributes:
        model: a name on the hub, or a checkpoint's folder.
        name: what clients call the model; its own name, or its folder's, unless given.
        env: folder of vLLM's environment; else PDTR_JUDGE_ENV's, else .venv-judge.
        host: address to listen at; 0.0.0.0 is all of this machine's, and needs a key.
        port: 0 takes a free one.
        max_model_len: most tokens of a prompt and its answer.
        max_images: most images of a prompt: source and two candidates.
        max_pixels: larger images are reduced by the server; for models of Qwen2-VL's kind.
        max_logprobs: most log-probabilities a token that a call may ask for.
        threads: of torch on a CPU, bound to no core; vLLM chooses unless given.
        cpu_cache_gib: GiB of attention cache on a CPU.
        key_file: file with the key.
        log: file for what vLLM says; runs/judge/PORT.log unless given.
        ready_seconds: how long the start may take, a download included.
        shutdown_seconds: how long calls under way may take to end.
    """

    model: Annotated[str, tyro.conf.Positional]
    name: str = ""
    env: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_model_len: int = 8192
    max_images: int = 3
    max_pixels: int | None = None
    max_logprobs: int = 20
    threads: int | None = None
    cpu_cache_gib: int = 2
    key_file: Path | None = None
    log: Path | None = None
    ready_seconds: float = 1800.0
    shutdown_seconds: float = 30.0


def serve(options: JudgeServeOptions, vllm_flags: tuple[str, ...] = ()) -> None:
    """Start vLLM, wait until it judges, say how to reach it, and stop it at the end, whatever ends it.

    Raises:
        ValueError: a bad value, no environment, or vLLM did not start, or ended; the message has the end of its log.
        SystemExit: stopped with SIGTERM or SIGHUP, with 128 and the signal's number.
    """
    server = _server(options, vllm_flags)
    with _signals_as_exits():
        try:
            server.start()
            print(f"starting vLLM for {options.model}; its log: {server.log}", flush=True)
            started = time.monotonic()
            reading = server.wait_until_ready(options.ready_seconds, _waiting_line())
            print(_ready_lines(server, reading, time.monotonic() - started), flush=True)
            server.wait()
        finally:
            server.stop(options.shutdown_seconds)


def _server(options: JudgeServeOptions, vllm_flags: tuple[str, ...]) -> VLLMServer:
    from rewards.judges.vllm_environment import find_python
    from rewards.judges.vllm_flags import VLLMSettings
    from rewards.judges.vllm_server import VLLMServer

    settings = VLLMSettings(
        model=options.model,
        name=options.name,
        host=options.host,
        port=options.port,
        max_model_len=options.max_model_len,
        max_images=options.max_images,
        max_pixels=options.max_pixels,
        max_logprobs=options.max_logprobs,
        threads=options.threads,
        cpu_cache_gib=options.cpu_cache_gib,
        api_key=read_key(options.key_file),
        extra=vllm_flags,
    )
    try:
        return VLLMServer(settings, options.log, find_python(options.env))
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error


def _ready_lines(server: VLLMServer, reading: Reading, seconds: float) -> str:
    name, mass = server.settings.served_name, reading.components["label_mass"]
    lines = [
        f"serving {name} at {server.url}, ready after {seconds:.0f} s; label mass of the first judgement {mass:.2f}",
        f"  to try it out:  pdtr judge check {server.url}",
        f'  as a reward:    VLMJudge(JudgeClient("{server.url}"), "{name}", "edit_following.v1")',
        "Ctrl-C stops it",
    ]
    return "\n".join(lines)


def _waiting_line() -> Callable[[float], None]:
    """Says now and then that the start still goes on."""
    told = 0.0

    def waiting(seconds: float) -> None:
        nonlocal told
        if seconds - told >= _REPORT_SECONDS:
            told = seconds
            print(f"  not ready after {seconds:.0f} s", flush=True)

    return waiting


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """Lets SIGTERM, and SIGHUP of a terminal that is closed, end the program the way that stops vLLM too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(_EXIT_STATUS + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
