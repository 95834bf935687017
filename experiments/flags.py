"""Command-line flags made from dataclasses, with their docstrings as help (tyro does the work).

Two things are added: a field whose declared type is a protocol gets the flags of the value that it holds, and what is
wrong with the flags is one line.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import Any, TypeVar, cast, get_type_hints

T = TypeVar("T")
_RESUME = "resume: go on from the last checkpoint of the output directory.\n        "
# As wide as any message, so that no path in one is broken over lines.
_WIDE = "4000"


@dataclass(frozen=True)
class Usage:
    """How a command shows itself.

    Attributes:
        prog: as it is typed, e.g. ``pdtr train smoke``.
        description: shown above its flags; the dataclass's own docstring when empty.
    """

    prog: str
    description: str = ""


def parse(default: T, usage: Usage, arguments: Sequence[str]) -> T:
    """A dataclass with the fields that the flags name replaced; ``--help`` prints them and exits.

    Raises:
        ValueError: an unknown flag or a bad value.
    """
    options = _run_tyro(type(default), default, usage, arguments)
    return cast(T, options)


def parse_run(default: T, usage: Usage, arguments: Sequence[str]) -> tuple[T, bool]:
    """As :func:`parse`, for the configuration of a run that can be resumed: -> it, and whether ``--resume`` is given.

    Raises:
        ValueError: an unknown flag or a bad value.
    """
    options = _options(default, with_resume=True)
    chosen = _run_tyro(type(options), options, usage, arguments)
    return cast(T, _restored(chosen, default)), bool(chosen.resume)


def _options(config: Any, with_resume: bool = False) -> Any:
    """The init fields of a dataclass as a new one; a protocol's field takes the type of what it holds.

    A curriculum's running state is no field of the result, and so no flag.
    """
    hints = get_type_hints(type(config))
    types: list[tuple[str, Any]] = []
    values: dict[str, Any] = {}
    for entry in fields(config):
        if not entry.init:
            continue
        value = getattr(config, entry.name)
        if _is_narrowed(hints[entry.name], value):
            value = _options(value)
            hints[entry.name] = type(value)
        types.append((entry.name, hints[entry.name]))
        values[entry.name] = value
    help_text = type(config).__doc__ or ""
    if with_resume:
        types.append(("resume", bool))
        values["resume"] = False
        help_text = help_text.replace("Attributes:\n        ", f"Attributes:\n        {_RESUME}", 1)
    made = make_dataclass(type(config).__name__, types, frozen=True, namespace={"__doc__": help_text})
    return made(**values)


def _is_narrowed(hint: Any, value: Any) -> bool:
    return bool(getattr(hint, "_is_protocol", False)) and is_dataclass(value)


def _restored(options: Any, default: Any) -> Any:
    """The opposite of :func:`_options`, which checks every field anew."""
    hints = get_type_hints(type(default))
    values = {}
    for entry in fields(default):
        if entry.init:
            value, held = getattr(options, entry.name), getattr(default, entry.name)
            values[entry.name] = _restored(value, held) if _is_narrowed(hints[entry.name], held) else value
    return type(default)(**values)


def _run_tyro(kind: Any, default: Any, usage: Usage, arguments: Sequence[str]) -> Any:
    import tyro

    def run() -> Any:
        return tyro.cli(
            kind,
            prog=usage.prog,
            description=usage.description or None,
            args=list(arguments),
            default=default,
            # Alternatives (a window, adapters) are a recipe's choice; the chosen one's fields are flags.
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        )

    if {"-h", "--help"} & set(arguments):
        return run()
    said = io.StringIO()
    try:
        with _wide_terminal(), contextlib.redirect_stderr(said):
            chosen = run()
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(said.getvalue(), usage.prog)) from None
    # Warnings, where there are any.
    sys.stderr.write(said.getvalue())
    return chosen


def _one_line(box: str, prog: str) -> str:
    """The message of tyro as one line: what is wrong, the nearest flag, where the flags are listed."""
    lines = [line.strip("│ \t") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = [section.strip() for section in re.split(r"\n?─{3,}\n?", "\n".join(lines))]
    what = " ".join(sections[0].split()).rstrip(".")
    meant = next((section for section in sections if section.startswith("Perhaps you meant")), "")
    nearest = re.search(r"^\s*(--[\w.-]+)", meant, re.MULTILINE)
    hint = f"did you mean {nearest.group(1)}? " if nearest else ""
    return f"{what}; {hint}see {prog} --help"


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDE
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
