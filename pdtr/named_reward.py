"""Rewards by their names on a command line: ``MODULE:REWARD``, or ``MODULE:CLASS=ARGUMENT``."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from inspect import isclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewards.base import Reward

_FORM = "expected MODULE:REWARD such as rewards.pixel:redness, or MODULE:CLASS=ARGUMENT"


def load_reward(name: str) -> Reward:
    """The reward that ``MODULE:REWARD`` names; the reward may be an attribute of one, as in ``a.b:c.d``.

    ``MODULE:CLASS=ARGUMENT`` makes the reward of a text, such as a checkpoint's folder:
    ``rewards.edit_reward:EditReward=runs/edit_reward/model``.

    Raises:
        ValueError: there is none, it is not callable, or the module cannot be imported.
    """
    module_name, colon, rest = name.partition(":")
    path, equals, argument = rest.partition("=")
    if not colon or not module_name or not path or (equals and not argument):
        raise ValueError(f"{_FORM}, got {name!r}")
    found: Any = _imported(module_name)
    for part in path.split("."):
        names = [known for known in dir(found) if not known.startswith("_")]
        if part not in dir(found):
            near = get_close_matches(part, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}: {_FORM}, got a module without {part!r}{hint}")
        found = getattr(found, part)
    if equals and callable(found):
        found = found(argument)
    elif isclass(found):
        raise ValueError(
            f"{name}: expected a reward, got a class; make one in the module and name that, or {name}=ARGUMENT"
        )
    if not callable(found):
        raise ValueError(f"{name}: expected a reward, which is callable, got {type(found).__name__} {found!r:.80}")
    reward: Reward = found
    return reward


def _imported(name: str) -> Any:
    # The console script, unlike `python -m`, does not look there by itself.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return import_module(name)
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"{name}: expected a module that can be imported from here, got {type(error).__name__}: {error} "
            "(PDTR_TRACEBACK=1 shows where)"
        ) from error
