"""Functions in several processes, by torchrun's own launcher, with its store and its watch over them."""

from __future__ import annotations

import multiprocessing
import signal
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.launcher import LaunchConfig, elastic_launch

# Forked where the imports are done already, see test_resume.py.
_IMPORTS = ("agents.algorithms", "pdtr.trainer", "pdtr.launch", "agents.policies.scenes", "peft")
multiprocessing.get_context("forkserver").set_forkserver_preload([*_IMPORTS, "torch.utils.tensorboard"])


def launch(function: Callable[[Any], None], argument: Any, num_processes: int) -> None:
    """Have ``function(argument)``, of a module that can be imported, run in so many processes that know each other."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
    )
    # It leaves its handlers behind.
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        elastic_launch(config, function)(argument)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
