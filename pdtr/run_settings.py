"""What a run was started with, as JSON, and whether it may go on with other settings.

A field of a configuration whose metadata is ``MAY_CHANGE`` says how a run goes on and not what comes of it: an address,
a number of threads. Any configuration may have such fields, those of users' own rewards too.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtr.processes import launcher

if TYPE_CHECKING:
    from pdtr.config import TrainConfig

FILE = "config.json"
MAY_CHANGE = {"may_change": True}
_PACKAGES = ("pdtr", "torch", "diffusers", "transformers", "gymnasium", "peft", "accelerate", "numpy", "safetensors")


def write_settings(config: TrainConfig, recipe: str) -> None:
    """What the run is, for the report; written once, atomically. A resumed run has to be the same one.

    Raises:
        ValueError: a setting that the run's results depend on has another value than the run was started with.
    """
    path = config.output_dir / FILE
    if path.exists():
        check_same(json.loads(path.read_text())["config"], config)
        return
    content = {
        "recipe": recipe,
        "command": _command(),
        "config": plain(config),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": sys.version.split()[0]},
        "seed": config.seed,
        "started": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def check_same(recorded: Mapping[str, Any], config: Any) -> None:
    """Whether a run that was recorded may go on with a configuration.

    Settings that there were not yet when it was recorded are taken to have had their defaults.

    Raises:
        ValueError: it may not; the message names the first setting that differs.
    """
    for name, before, now in _differences(_comparable(recorded, config), plain(config)):
        raise ValueError(
            f"--resume: expected the settings that the run was started with, got {name} = {_shown(now)} where the run "
            f"has {_shown(before)}; give its own value, or start another run"
        )


def plain(config: Any) -> Any:
    """A configuration as JSON: dataclasses with their class's name, paths as text."""
    return json.loads(json.dumps(_named(config), default=str))


def _named(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: _named(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"class": type(value).__name__, **named}
    if isinstance(value, Mapping):
        return {str(key): _named(entry) for key, entry in value.items()}
    return [_named(entry) for entry in value] if isinstance(value, list | tuple) else value


def _comparable(recorded: Any, value: Any) -> Any:
    """What was recorded, with the defaults of newer settings, and today's values of those that may change."""
    if isinstance(value, list | tuple) and isinstance(recorded, list) and len(recorded) == len(value):
        return [_comparable(*pair) for pair in zip(recorded, value, strict=True)]
    if not (is_dataclass(value) and isinstance(recorded, Mapping) and recorded.get("class") == type(value).__name__):
        return recorded
    found = {"class": recorded["class"]}
    for entry in (entry for entry in fields(value) if entry.init):
        now = getattr(value, entry.name)
        if entry.metadata.get("may_change"):
            found[entry.name] = plain(now)
        elif entry.name in recorded:
            found[entry.name] = _comparable(recorded[entry.name], now)
        elif _has_default(entry):
            found[entry.name] = plain(_default(entry))
    return found


def _has_default(entry: Field[Any]) -> bool:
    return entry.default is not MISSING or entry.default_factory is not MISSING


def _default(entry: Field[Any]) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The innermost settings that differ: name, as it was, as it is."""
    if isinstance(before, Mapping) and isinstance(now, Mapping) and before.get("class") == now.get("class"):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif before != now:
        yield name, before, now


def _shown(value: Any) -> str:
    """As a message has it: of another class its name, for that is what to look at."""
    return str(value["class"]) if isinstance(value, Mapping) and "class" in value else repr(value)


def _command() -> str:
    """The command line that started this process, as one would type it."""
    program = Path(sys.argv[0]).name
    return shlex.join([*(launcher() if program in ("pdtr", "cli.py", "__main__.py") else [program]), *sys.argv[1:]])
