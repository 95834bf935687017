"""Several processes in one run: how they find each other, how many a run can be shared by, and who speaks of an error.

A launcher (``torchrun``, ``accelerate launch``) starts them with RANK, WORLD_SIZE and where to meet in the environment;
what is here reads it. Nothing heavy is imported before it is used: the command line asks this module who speaks.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from threading import current_thread, main_thread
from types import FrameType
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

    from agents.processes import Processes
    from pdtr.config import TrainConfig

Sharding = Literal["none", "fsdp2"]
WAY_ON = "the run goes on with --resume from its last checkpoint"
# How long it may take to ask the launcher's store, when an error is about to be printed.
_STORE_SECONDS = 10


@dataclass(frozen=True)
class ProcessSettings:
    """How several processes share a run; to a single one nothing of it matters.

    Attributes:
        sharding: "none": every process has all weights; "fsdp2": networks and, with full training, the optimiser's
            state are cut up over the processes, for models that do not fit on one device.
        timeout: seconds that a process waits for the others before it gives the run up: more than a chunk takes to be
            drawn and judged, and than the first process takes to write a checkpoint.
    """

    sharding: Sharding = "none"
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if self.sharding not in get_args(Sharding):
            raise ValueError(f"sharding: expected one of {list(get_args(Sharding))}, got {self.sharding!r}")
        if not self.timeout > 0:
            raise ValueError(f"timeout: expected more than 0 seconds, got {self.timeout}")


class ProcessLost(ConnectionError):
    """Another process of the run ended, or was silent for too long."""


def num_processes() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"


def launcher() -> list[str]:
    """What starts as many processes as this run has, as one would type it before ``train``."""
    count = num_processes()
    if count == 1:
        return ["pdtr"]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(count)))
    nodes = [] if local == count else ["--nnodes", str(count // local)]
    return ["torchrun", *nodes, "--nproc-per-node", str(local), "-m", "pdtr"]


def start(settings: ProcessSettings) -> tuple[Processes, torch.device]:
    """Meet the other processes, once in a process's life. -> all of them, and this one's device.

    Messages between CPUs go over gloo and those between GPUs over NCCL, whichever the devices are.
    """
    import torch
    from accelerate import Accelerator
    from torch import distributed

    from agents.processes import Processes

    count = num_processes()
    if count > 1 and not distributed.is_initialized():
        distributed.init_process_group(timeout=timedelta(seconds=settings.timeout))
    # Without a GPU accelerate takes several processes for so many single ones, unless it is told.
    device = Accelerator(cpu=count > 1 and not torch.cuda.is_available()).device
    if count == 1:
        return Processes(), device
    rank = distributed.get_rank()
    return Processes(rank, count, is_sharded=settings.sharding != "none"), device


def finish() -> None:
    """Leave the other processes, at the end of the program."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def check_shares(num_chunks: int, config: TrainConfig, processes: Processes) -> None:
    """Every process gets as many chunks of each minibatch.

    Raises:
        ValueError: it does not; the message has a chunk size, or a number of prompts, with which it would.
    """
    steps, count = config.learner.num_minibatches, processes.count
    if count == 1 or num_chunks % (steps * count) == 0:
        return
    total, each = num_chunks * config.chunk_size, config.chunk_size * steps * count
    multiple = each // gcd(each, config.group_size)
    fixes = [f"--num-prompts {multiple * max(1, round(config.num_prompts / multiple))}"]
    if total % (steps * count) == 0:
        fixes.insert(0, f"--chunk-size {gcd(total // (steps * count), config.chunk_size)}")
    raise ValueError(
        f"{count} processes: expected the iteration's chunks to be a multiple of num_minibatches x processes = "
        f"{steps} x {count} = {steps * count}, so that nobody waits, got {num_chunks}; {' or '.join(fixes)} would do"
    )


@contextmanager
def losses_explained(processes: Processes, settings: ProcessSettings, way_on: str = WAY_ON) -> Iterator[None]:
    """Turn what is noticed when another process is gone into :class:`ProcessLost`.

    That is an error of a collective operation, or the SIGTERM by which a launcher ends the processes that are left.

    Args:
        processes: all of them.
        settings: how long they wait for each other.
        way_on: how to go on, for the message.
    """
    if processes.count == 1:
        yield
        return
    lost = ProcessLost(
        f"expected all {processes.count} processes to go on, but one has ended or was silent for "
        f"{settings.timeout:g} s; what it said is above, {way_on}"
    )
    try:
        with _terminated_by(lost):
            yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise lost from error


@contextmanager
def _terminated_by(error: Exception) -> Iterator[None]:
    """Raise an error in place of dying silently of SIGTERM; a handler of somebody else's is left alone."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise error

    is_ours = current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_loss(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    # gloo's are plain RuntimeErrors, which name the line of its source.
    return isinstance(error, DistError) or "gloo" in str(error).lower()


def speaks(error: BaseException) -> bool:
    """Whether this process is the one to print a user's mistake: each is said once, by whoever has it first.

    That a process was lost is said only where no process had anything to say. The processes ask the store that their
    launcher keeps; where there is none, all of them speak.
    """
    if num_processes() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    attempt = f"pdtr/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    kind = hashlib.sha256(f"{type(error).__name__}: {error}".encode()).hexdigest()
    try:
        host, port, timeout = (
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timedelta(seconds=_STORE_SECONDS),
        )
        store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        is_first_of_all = store.add(f"{attempt}/any", 1) == 1
        is_first_of_kind = store.add(f"{attempt}/{kind}", 1) == 1
    except RuntimeError:
        # The launcher is gone, and its store with it.
        return True
    return is_first_of_all if isinstance(error, ProcessLost) else is_first_of_kind
