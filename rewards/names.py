"""The nearest right name, for messages about a wrong one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that is most like the given one; empty where there is none at all."""
    return next(iter(get_close_matches(name, list(names), n=1, cutoff=0.0)), "")


def hint(name: str, names: Iterable[str]) -> str:
    """The nearest of some names, as the end of a message; empty where none is near."""
    near = get_close_matches(name, list(map(str, names)), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
