"""What a run shows while it goes on: a live display on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pdtr.measures import STRICT, Measure

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from pdtr.config import TrainConfig
    from pdtr.curriculum import Curriculum

_MEMORY = 0.9
_KL_NAMES = ("kl_loss", "approx_kl")


@dataclass
class Reading:
    """What the display shows, followed from row to row.

    Attributes:
        total: iterations in all, at the most; None where the curriculum does not say.
        stage_totals: iterations of each stage, at the most.
        images_per_iteration: rollouts of an iteration.
        iteration: done so far.
        stage_name: the stage of the last iteration.
        stage_iteration: done so far in the stage.
        reward: exponential mean of the training reward, by task.
        kl: of the last iteration that reports one.
        grad_norm: of the last iteration, before clipping.
        held_out: latest held-out success, by task.
        change: its change since the base, on the same prompts, by task.
        measures: what counts as success, by task.
        images_per_second: over the last iteration, updates included.
        seconds_left: estimate; None where it cannot be told.
    """

    total: int | None = None
    stage_totals: Mapping[str, int] = field(default_factory=dict)
    images_per_iteration: int = 0
    iteration: int = 0
    stage_name: str = ""
    stage_iteration: int = 0
    reward: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    grad_norm: float | None = None
    held_out: dict[str, float] = field(default_factory=dict)
    change: dict[str, float] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)
    images_per_second: float | None = None
    seconds_left: float | None = None
    _base: dict[tuple[str, str], float] = field(default_factory=dict)
    _stage_starts: dict[str, int] = field(default_factory=dict)
    _first: tuple[int, float] | None = None

    def iterate(self, row: Mapping[str, Any], now: float) -> None:
        """Take in one iteration's metrics; ``now`` is a clock in seconds."""
        self.iteration = int(row["iteration"])
        self.stage_name = str(row.get("stage_name", ""))
        self.stage_iteration = self.iteration - self.starts(self.stage_name, self.iteration) + 1
        for task in row.get("tasks", ()):
            value = _number(row.get(f"reward/{task}"))
            if value is not None:
                self.reward[task] = _MEMORY * self.reward.get(task, value) + (1 - _MEMORY) * value
        self.kl = next((value for name in _KL_NAMES if (value := _number(row.get(name))) is not None), self.kl)
        self.grad_norm = _number(row.get("grad_norm"))
        spent = (_number(row.get("seconds_rollout")) or 0.0) + (_number(row.get("seconds_update")) or 0.0)
        self.images_per_second = self.images_per_iteration / spent if spent > 0 else None
        self._estimate(spent, now)

    def starts(self, stage_name: str, iteration: int) -> int:
        """The iteration that a stage starts with: the first one that it was ever seen at."""
        return self._stage_starts.setdefault(stage_name, iteration)

    def _estimate(self, spent: float, now: float) -> None:
        """Time left at the mean pace of this sitting, evaluations included."""
        if self._first is None:
            self._first = (self.iteration - 1, now - spent)
        done, elapsed = self.iteration - self._first[0], now - self._first[1]
        if self.total is not None and done > 0:
            self.seconds_left = max(self.total - self.iteration, 0) * elapsed / done

    def evaluate(self, row: Mapping[str, Any]) -> None:
        """Take in one evaluation; the first on a set of prompts is the base of its changes."""
        task, strict = str(row["task"]), _number(row.get("strict"))
        if strict is None:
            return
        base = self._base.setdefault((task, str(row.get("set", ""))), strict)
        self.held_out[task], self.change[task] = strict, strict - base
        self.measures[task] = Measure(str(row.get("success") or STRICT))

    def line(self) -> str:
        """One line of plain text."""
        count = f"{self.iteration}" if self.total is None else f"{self.iteration}/{self.total}"
        parts = [f"iteration {count}", self.stage_name]
        parts += [f"reward {task} {value:.3f}" for task, value in self.reward.items()]
        parts += [f"held-out {score}" for score in self.scores()]
        parts += [] if self.kl is None else [f"KL {self.kl:.2e}"]
        parts += [] if self.grad_norm is None else [f"grad {self.grad_norm:.3g}"]
        parts += [] if self.images_per_second is None else [f"{self.images_per_second:.1f} images/s"]
        parts += [] if self.seconds_left is None else [f"{duration(self.seconds_left)} left"]
        return "  ".join(part for part in parts if part)

    def scores(self) -> list[str]:
        """Each task's held-out success with its change since the base: shares in percent and points."""
        told = {task: self.told(task) for task in self.held_out}
        return [f"{task} {score} ({change})" for task, (_, score, change) in told.items()]

    def told(self, task: str) -> tuple[Measure, str, str]:
        """What a task's evaluations count, the latest with its unit, and its change since the base."""
        measure = self.measures[task]
        unit = " %" if measure.is_share else ""
        return measure, measure.told(self.held_out[task]) + unit, measure.told(self.change[task], "+")


class Progress:
    """Shows a run's progress; a context manager.

    Args:
        config: of the run; how long it is at most, and how many images an iteration draws.
        console: where to; standard output by default.
        every: iterations between the plain lines that take the display's place where there is no terminal.
    """

    def __init__(self, config: TrainConfig, console: Console | None = None, every: int = 10) -> None:
        from rich.console import Console

        if every < 1:
            raise ValueError(f"every: expected at least 1 iteration between lines, got {every}")
        self.console = Console() if console is None else console
        self.every = every
        self.folder = config.output_dir
        stages = stage_lengths(config.curriculum)
        total = None if stages is None else sum(stages.values())
        self.reading = Reading(total, stages or {}, config.num_prompts * config.group_size)
        self._live: Live | None = None
        self._lines = 0

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin to show; where a resumed run started from is read from its log."""
        from rich.live import Live

        from pdtr.logbook import read_evaluations, read_metrics

        for row in read_metrics(self.folder):
            self.reading.starts(str(row.get("stage_name", "")), int(row["iteration"]))
        for row in read_evaluations(self.folder):
            if int(row["iteration"]) == 0:
                self.reading.evaluate(row)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=4)
            self._live.start()
        else:
            self._print("measuring the base" if not self.reading.held_out else "resuming")

    def iteration(self, row: Mapping[str, Any]) -> None:
        """Show one iteration's metrics."""
        self.reading.iterate(row, time.monotonic())
        if self._live is None and (self._lines == 0 or self.reading.iteration % self.every == 0):
            self._lines += 1
            self._print(self.reading.line())

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Show one task's held-out evaluation."""
        self.reading.evaluate(row)
        task, strict = str(row["task"]), _number(row.get("strict"))
        if self._live is None and strict is not None:
            label = str(row.get("label") or f"iteration {row.get('iteration')}")
            measure, score, change = self.reading.told(task)
            # Strict success needs no name.
            what = task if measure.success == STRICT else f"{task} {measure.name}"
            self._print(f"{label}: held-out {what} {score} of {row.get('count')} ({change})")

    def warn(self, text: str) -> None:
        """Say something that has to be seen, above the display where there is one."""
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop showing; the last state stays on the screen."""
        if self._live is not None:
            self._live.stop()
        self._live = None

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        reading = self.reading
        head = Table.grid(padding=(0, 2))
        count = f"{reading.iteration}" if reading.total is None else f"{reading.iteration}/{reading.total}"
        left = "" if reading.seconds_left is None else f"{duration(reading.seconds_left)} left"
        bar = ProgressBar(total=reading.total, completed=reading.iteration, width=40, pulse=reading.total is None)
        head.add_row(Spinner("dots"), bar, Text(f"iteration {count}", style="bold"), Text(left, style="cyan"))
        facts = Table.grid(padding=(0, 2))
        for name, value in self._facts():
            facts.add_row(Text(name, style="dim"), value)
        return Group(head, facts)

    def _facts(self) -> list[tuple[str, RenderableType]]:
        from rich.text import Text

        reading = self.reading
        length = reading.stage_totals.get(reading.stage_name)
        within = f"iteration {reading.stage_iteration}" + ("" if length is None else f" of at most {length}")
        stage = f"{reading.stage_name}, {within}" if reading.stage_name else "measuring the base"
        held_out = Text()
        for score, change in zip(reading.scores(), reading.change.values(), strict=True):
            held_out.append(score + "   ", style="green" if change > 0 else "red" if change < 0 else "")
        rewards = "   ".join(f"{task} {value:.3f}" for task, value in reading.reward.items())
        numbers = [f"KL {reading.kl:.2e}"] if reading.kl is not None else []
        numbers += [f"gradient {reading.grad_norm:.3g}"] if reading.grad_norm is not None else []
        numbers += [f"{reading.images_per_second:.1f} images/s"] if reading.images_per_second is not None else []
        facts: list[tuple[str, RenderableType]] = [("stage", Text(stage)), ("held-out", held_out)]
        return [*facts, ("reward", Text(rewards)), ("training", Text("   ".join(numbers)))]


def stage_lengths(curriculum: Curriculum) -> dict[str, int] | None:
    """The most iterations that each stage of a curriculum takes, in order; None for one that does not say."""
    from pdtr.adaptive import Adaptive
    from pdtr.curriculum import StageCurriculum

    if isinstance(curriculum, StageCurriculum):
        return {stage.name: stage.num_iterations for stage in curriculum.as_stages()}
    return stage_lengths(curriculum.inner) if isinstance(curriculum, Adaptive) else None


def duration(seconds: float) -> str:
    """Seconds in words: "42 s", "3 min 05 s", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)
