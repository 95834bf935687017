"""What a measurement ran on: a figure without its machine says nothing."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
# What a unit of ru_maxrss is, in bytes: Linux counts in KiB, macOS in bytes.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def describe_machine() -> str:
    """Processor, cores, memory, versions of Python and torch, and how busy the machine is, in one line."""
    load = f"load {os.getloadavg()[0]:.1f}"
    versions = f"Python {platform.python_version()}, torch {version('torch')}"
    return f"{_processor()}, {num_cores()} cores, {_memory_gib():.1f} GiB, {versions}, {load}"


def num_cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    else:
        return os.cpu_count() or 1


def maxrss_mib(maxrss: int) -> float:
    """``ru_maxrss`` in MiB."""
    return maxrss * _MAXRSS_UNIT / 2**20


def own_peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB.

    Linux has ``ru_maxrss`` begin at what the process that started this one held at its most, which would be the answer
    wherever a large process measures small ones; its own count begins with the program.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "VmHWM":
                return int(value.split()[0]) / 1024
    return maxrss_mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _processor() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
