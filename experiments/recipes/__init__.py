"""Recipes: functions without arguments that return the configuration of a run.

A recipe is any public function of a recipe module; ``pdtr train NAME`` runs it, its flags change what it returns.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.recipes import editing, judge, scenes, sd3, twins, unipic2

if TYPE_CHECKING:
    from pdtr.config import TrainConfig

    Recipe = Callable[[], TrainConfig]

DEFAULT = "pdtr_scenes"
_MODULES = (scenes, judge, unipic2, sd3, editing, twins)


def recipes() -> dict[str, Recipe]:
    """Every recipe by name, in the order in which the modules define them."""
    return {
        name: function
        for module in _MODULES
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
    }


def find_recipe(name: str) -> Recipe:
    """The recipe of a name, with ``-`` for ``_`` allowed.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    known = recipes()
    wanted = name.replace("-", "_")
    if wanted not in known:
        nearest = difflib.get_close_matches(wanted, known, 1, cutoff=0.0)[0]
        raise ValueError(f"recipe: expected one of {', '.join(known)}, got {name!r}; did you mean {nearest!r}?")
    return known[wanted]


def summary(recipe: Recipe) -> str:
    """The first line of a recipe's docstring."""
    return (inspect.getdoc(recipe) or "").partition("\n")[0]
