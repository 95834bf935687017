"""What a run writes down and shows while it goes on. Of several processes only the first one does either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdtr.config import TrainConfig
from pdtr.evaluate import Evaluation
from pdtr.logbook import Logbook
from pdtr.panel import hacking_alarm
from pdtr.progress import Progress
from pdtr.report_data import read_run
from pdtr.stage_ends import drop_stage_ends
from pdtr.tasks import Task
from rewards.base import Prompt


class Records:
    """The log and the display of one run.

    Args:
        config: of the run.
        progress: where progress is shown.
        is_kept: whether this process keeps them; all methods do nothing where it does not.
    """

    def __init__(self, config: TrainConfig, progress: Progress, is_kept: bool = True) -> None:
        self._folder, self._num_grid, self._progress = config.output_dir, config.evaluation.num_grid, progress
        self._logbook = Logbook(config.output_dir) if is_kept else None

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Note one iteration's metrics."""
        if self._logbook is not None:
            self._logbook.metrics(row)
            self._progress.iteration(row)

    def evaluation(self, row: Mapping[str, Any], found: Evaluation) -> None:
        """Note one evaluation, and warn where it shows that the trained reward has left the held-out one."""
        if self._logbook is None:
            return
        self._logbook.evaluation(row, found.ids, found.skills, found.scores, found.images[: self._num_grid])
        self._progress.evaluation(row)
        if row["set"] == "tune":
            for name, history in read_run(self._folder).rivals(row["task"]).items():
                if alarm := hacking_alarm(history, name):
                    self._progress.warn(f"{row['task']}: {alarm}")

    def prompts(self, tasks: Mapping[str, Task]) -> None:
        """Note what the grids' images belong to."""
        if self._logbook is None:
            return
        for name, task in tasks.items():
            shown = task.final[: self._num_grid]
            self._logbook.prompts(name, [prompt.text for prompt in shown], _sources(shown))

    def warn(self, text: str) -> None:
        """Say something that has to be seen."""
        if self._logbook is not None:
            self._progress.warn(text)

    def truncate(self, iteration: int) -> None:
        """Drop what was noted after an iteration, and what was kept of stages that ended after it."""
        if self._logbook is not None:
            self._logbook.truncate(iteration)
            drop_stage_ends(self._folder / "checkpoints", iteration)


def _sources(prompts: Sequence[Prompt]) -> NDArray[np.uint8] | None:
    """The sources of each prompt side by side, uint8 [n, H, K W, 3], white where it has fewer; None without any."""
    rows = [np.concatenate(prompt.source_images, axis=1) for prompt in prompts if prompt.source_images]
    if not rows:
        return None
    widest = max(row.shape[1] for row in rows)
    margins = [((0, 0), (0, widest - row.shape[1]), (0, 0)) for row in rows]
    return np.stack([np.pad(row, margin, constant_values=255) for row, margin in zip(rows, margins, strict=True)])
