"""Several processes in one ``pdtr eval``: each draws its share, the first one alone scores, writes and prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pdtr.processes import num_processes

if TYPE_CHECKING:
    from agents.processes import Processes

WAY_ON = "go on with the same command: what is done is kept"


@contextmanager
def shared() -> Iterator[tuple[Processes, str]]:
    """The processes that share an evaluation, and torch's name of this one's device: empty where it is alone.

    Raises:
        ProcessLost: another one has ended.
    """
    from agents.processes import ALONE
    from pdtr.processes import ProcessSettings, finish, losses_explained, start

    if num_processes() == 1:
        yield ALONE, ""
        return
    settings = ProcessSettings()
    processes, device = start(settings)
    with losses_explained(processes, settings, WAY_ON):
        yield processes, str(device)
    finish()


def check_alone(what: str) -> None:
    """Raise a ValueError where several processes were started for what one does.

    Args:
        what: the flag by which nothing is drawn.
    """
    if num_processes() > 1:
        raise ValueError(
            f"{what}: expected one process, for nothing is drawn that several could share, got {num_processes()}; "
            "leave the launcher out"
        )
