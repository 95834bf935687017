"""What the commands that start a run do with their arguments: the name before the flags, and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pdtr.processes import launcher

_RESUME = "--resume"


def leading_name(arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
    """The first argument where it is no flag, and the others; ``--resume`` may stand before it."""
    others = [argument for argument in arguments if argument != _RESUME]
    resume = [_RESUME] * (len(others) < len(arguments))
    if others and not others[0].startswith("-"):
        return others[0], [*others[1:], *resume]
    return default, [*others, *resume]


def how_to_go_on(arguments: Sequence[str], started: bool) -> str:
    """The command that goes on with a run that was stopped; the same again where it had not started."""
    kept = [argument for argument in arguments if argument != _RESUME]
    return f"go on with: {shlex.join([*launcher(), *kept, *([_RESUME] if started else [])])}"
