"""How often a process takes part in a sum of gradients of cut weights, and runs that are counted so."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from experiments.benchmarks import world_size_runs


@contextmanager
def sums_counted(folder: Path) -> Iterator[None]:
    """Write the number of this process's sums into a folder, which there has to be at the end."""
    # FSDP2 has no public place to watch: this is what sums a block's gradients, after a backward pass that has to.
    with patch.object(_fsdp_param_group, "foreach_reduce", wraps=_fsdp_param_group.foreach_reduce) as watched:
        yield
    (folder / f"sums-{os.environ['RANK']}.json").write_text(str(watched.call_count))


def sums(folder: Path, num_processes: int = 2) -> list[int]:
    """What the processes have written."""
    return [int((folder / f"sums-{rank}.json").read_text()) for rank in range(num_processes)]


def counted_run(job: str) -> None:
    """Do one job of ``world_size_runs``, told as JSON, and count."""
    (entry,) = json.loads(job)
    with sums_counted(Path(entry["folder"])):
        world_size_runs.main([job])
