"""``pdtr judge serve`` and ``pdtr judge check``: a judge behind vLLM, started and tried out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.flags import Usage, parse

KEY_VARIABLE = "PDTR_JUDGE_KEY"
_STEPS = ("serve", "check")


def judge(arguments: Sequence[str]) -> None:
    """``pdtr judge serve MODEL [--flags] [-- --VLLM-FLAGS]`` or ``pdtr judge check URL [--flags]``.

    Raises:
        ValueError: a bad flag or value, no environment, a server that does not start, ends, or does not answer.
        KeyboardInterrupt: stopped with Ctrl-C.
        SystemExit: stopped with SIGTERM or SIGHUP, with 128 and the signal's number.
    """
    step = arguments[0] if arguments else ""
    if step in ("-h", "--help"):
        print("pdtr judge serve MODEL [--flags] [-- --VLLM-FLAGS]  start vLLM as a judge")
        print("pdtr judge check URL [--flags]                      what a judge can do, and how fast it is")
        return
    if step == "serve":
        from experiments.judge_serve import JudgeServeOptions, serve

        own, vllm = _split(arguments[1:])
        serve(parse(JudgeServeOptions(tyro.MISSING), Usage("pdtr judge serve"), own), vllm)
    elif step == "check":
        from experiments.judge_check import JudgeCheckOptions, check

        check(parse(JudgeCheckOptions(tyro.MISSING), Usage("pdtr judge check"), arguments[1:]))
    else:
        raise ValueError(
            f"judge: expected what to do, {' or '.join(_STEPS)}, got {step or 'none'}; "
            "type: pdtr judge serve MODEL, or pdtr judge check URL"
        )


def read_key(path: Path | None) -> str:
    """The key of a file, or of the environment's ``PDTR_JUDGE_KEY``; empty where there is neither.

    A command line would show it to every user of the machine.

    Raises:
        ValueError: the file is empty.
        OSError: the file cannot be read.
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE, "").strip()
    key = path.read_text("utf-8", "replace").strip()
    if not key:
        raise ValueError(f"{path}: expected a key, got an empty file")
    return key


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
    """Our flags and, behind ``--``, vLLM's."""
    if "--" not in arguments:
        return arguments, ()
    index = list(arguments).index("--")
    return arguments[:index], tuple(arguments[index + 1 :])
