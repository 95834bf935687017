"""How torch's threads wait for each other; it has to be said before torch is imported."""

from __future__ import annotations

import os

_WAITING = {
    # libgomp's threads spin at every barrier: beside another busy process small operations take many times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Some microseconds of spinning all the same: to sleep at each barrier costs two threads a third of their speed.
    "GOMP_SPINCOUNT": "100000",
}


def set_waiting() -> None:
    """Let threads spin for a short while and then sleep, unless the environment says how they wait."""
    if not any(name in os.environ for name in _WAITING):
        os.environ.update(_WAITING)
