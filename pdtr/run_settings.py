"""What a run was started with, as JSON, and whether it may go on with other settings or rewards.

A field of a configuration whose metadata is ``MAY_CHANGE`` says how a run goes on and not what comes of it: an address,
a number of threads. Any configuration may have such fields, those of users' own rewards too. One that has fields that
its other fields leave unused names them in an attribute ``unused_settings``; they are not compared.

What is at an address is compared by the rewards themselves: by their names, and by their fingerprints, which name no
address.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtr.processes import launcher

if TYPE_CHECKING:
    from pdtr.config import TrainConfig
    from pdtr.tasks import Task

Identity = Mapping[str, str]
FILE = "config.json"
MAY_CHANGE = {"may_change": True}
_PACKAGES = ("pdtr", "torch", "diffusers", "transformers", "gymnasium", "peft", "accelerate", "numpy", "safetensors")
# A task's rewards, as messages call them.
_ROLES = {"reward": "reward", "held_out_reward": "held-out reward"}
# Of a fingerprint, so many of the parts that differ are told.
_TOLD = 3


def write_settings(config: TrainConfig, recipe: str, tasks: Mapping[str, Task], goes_on: bool = False) -> None:
    """Record what the run is, for its report and for whoever resumes it; atomically.

    Args:
        config: of the run.
        recipe: the name that the report shows.
        tasks: with the rewards of the run.
        goes_on: the run goes on from a checkpoint: how it was started stays, what may change is as it is now.
    """
    path = config.output_dir / FILE
    content = {
        "recipe": recipe,
        "command": _command(),
        "config": plain(config),
        "rewards": identities(tasks),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": sys.version.split()[0]},
        "seed": config.seed,
        "started": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
    }
    if goes_on:
        started = json.loads(path.read_text())
        # A run from before rewards were recorded is held to today's from now on.
        rewards = {**content["rewards"], **started.get("rewards", {})}
        content = {**started, "config": content["config"], "rewards": rewards}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def check_settings(config: TrainConfig, tasks: Mapping[str, Task]) -> None:
    """Whether the run of ``config.output_dir`` may be resumed so.

    Raises:
        ValueError: a setting that the run's results depend on has another value than the run was started with, or a
            task has another reward.
    """
    path = config.output_dir / FILE
    recorded = json.loads(path.read_text())
    check_same(recorded["config"], config)
    _check_rewards(recorded.get("rewards", {}), identities(tasks), path)


def identities(tasks: Mapping[str, Task]) -> dict[str, dict[str, Identity]]:
    """What the rewards of each task are known by, wherever they are."""
    from rewards.base import reward_name, reward_traits

    return {
        name: {
            role: {"name": reward_name(reward), "fingerprint": reward_traits(reward).fingerprint}
            for role in _ROLES
            if (reward := getattr(task, role)) is not None
        }
        for name, task in tasks.items()
    }


def _check_rewards(
    recorded: Mapping[str, Mapping[str, Identity]], now: Mapping[str, Mapping[str, Identity]], path: Path
) -> None:
    """Compare rewards by task, as far as both sides say what they are.

    Raises:
        ValueError: one is another.
    """
    for task, role in [(task, role) for task, roles in now.items() for role in roles]:
        before, after = recorded.get(task, {}).get(role), now[task][role]
        if before is not None and not _is_same(before, after):
            raise ValueError(
                f"--resume: expected the {_ROLES[role]} of task {task!r} that the run was started with, "
                f"{_told(before, after)}, got {_told(after, before)}; give the address or the files of the run's own, "
                "or start another run (where it is the same all the same, as after a copy that gave files new dates, "
                f'delete "rewards" from {path})'
            )


def _is_same(before: Identity, after: Identity) -> bool:
    """Whether two rewards are known by the same; of one without a fingerprint nothing but the name is known."""
    prints = before["fingerprint"], after["fingerprint"]
    return before["name"] == after["name"] and (not all(prints) or prints[0] == prints[1])


def _told(reward: Identity, other: Identity) -> str:
    """A reward's name with whatever tells its fingerprint from another reward's, where both have one."""
    if not (reward["fingerprint"] and other["fingerprint"]):
        return reward["name"]
    differences = _differences(_parsed(reward["fingerprint"]), _parsed(other["fingerprint"]))
    told = [f"{name} = {_shown(own):.100}".removeprefix(" = ") for name, own, _ in islice(differences, _TOLD)]
    return f"{reward['name']} ({', '.join(told)})" if told else reward["name"]


def _parsed(value: Any) -> Any:
    """A fingerprint with the JSON that it has within itself, as those of rewards made of rewards have."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        return {name: _parsed(entry) for name, entry in value.items()}
    return [_parsed(entry) for entry in value] if isinstance(value, list) else value


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
    """What was recorded, with the defaults of newer settings, and today's values where nobody compares."""
    if isinstance(value, list | tuple) and isinstance(recorded, list) and len(recorded) == len(value):
        return [_comparable(*pair) for pair in zip(recorded, value, strict=True)]
    if isinstance(value, Mapping) and isinstance(recorded, Mapping):
        entries = {str(key): entry for key, entry in value.items()}
        return {key: _comparable(was, entries[key]) if key in entries else was for key, was in recorded.items()}
    if not (is_dataclass(value) and isinstance(recorded, Mapping) and recorded.get("class") == type(value).__name__):
        return recorded
    found, unused = {"class": recorded["class"]}, getattr(value, "unused_settings", ())
    for entry in (entry for entry in fields(value) if entry.init):
        now = getattr(value, entry.name)
        if entry.metadata.get("may_change") or entry.name in unused:
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
    elif _are_of_parts(before) and _are_of_parts(now) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{name}[{index}]")
    elif before != now:
        yield name, before, now


def _are_of_parts(value: Any) -> bool:
    """Whether a value is a list of what has settings of its own; one of plain values is given whole, and told whole."""
    return isinstance(value, list) and any(isinstance(entry, Mapping | list) for entry in value)


def _shown(value: Any) -> str:
    """As a message has it: of another class its name, for that is what to look at."""
    return str(value["class"]) if isinstance(value, Mapping) and "class" in value else repr(value)


def _command() -> str:
    """The command line that started this process, as one would type it."""
    program = Path(sys.argv[0]).name
    return shlex.join([*(launcher() if program in ("pdtr", "cli.py", "__main__.py") else [program]), *sys.argv[1:]])
