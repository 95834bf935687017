"""A stage of a curriculum: its tasks, when it ends, and the schedules of its reward weights.

A stage ends after a number of iterations, at a target or at a plateau, whichever comes first. Targets and plateaus are
tested on a held-out measure, never on the training reward: a reward that is being optimised is no judge of itself.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The name that is spelt most like ``name``, for error messages; empty where there are no names."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)), "")


class Schedule(Protocol):
    """A number that changes with training."""

    def at(self, iteration: int, /) -> float:
        """The value at an iteration, counted from 0 within the stage."""
        ...


@dataclass(frozen=True)
class Constant:
    """``value`` at every iteration."""

    value: float

    def __post_init__(self) -> None:
        _check_finite("Constant", value=self.value)

    def at(self, iteration: int) -> float:
        """``value``."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line: ``start + (end - start) min(iteration / num_iterations, 1)``, and ``end`` from then on."""

    start: float
    end: float
    num_iterations: int

    def __post_init__(self) -> None:
        _check_finite("Linear", start=self.start, end=self.end)
        _check_at_least("Linear", num_iterations=(self.num_iterations, 1))

    def at(self, iteration: int) -> float:
        """The value on the line; exactly ``end`` at and after ``num_iterations``."""
        if iteration >= self.num_iterations:
            return self.end
        return self.start + (self.end - self.start) * iteration / self.num_iterations


@dataclass(frozen=True)
class Step:
    """A staircase: ``values[0]`` before ``boundaries[0]``, ``values[k]`` from ``boundaries[k - 1]`` on."""

    values: tuple[float, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_finite("Step", **{f"values[{k}]": value for k, value in enumerate(self.values)})
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"Step: expected one value more than boundaries, got {len(self.values)} values"
                f" and {len(self.boundaries)} boundaries"
            )
        if any(low >= high for low, high in zip((0, *self.boundaries), self.boundaries, strict=False)):
            raise ValueError(f"Step: expected boundaries that rise from above 0, got {self.boundaries}")

    def at(self, iteration: int) -> float:
        """The value of the stair that the iteration stands on."""
        return self.values[sum(boundary <= iteration for boundary in self.boundaries)]


@dataclass(frozen=True)
class StageProgress:
    """How far a stage has come; all that its end depends on.

    Attributes:
        iterations: how many were proposed.
        best: the best held-out measure so far, the last one from before the stage included.
        evaluations_since_best: evaluations in this stage that brought no improvement, since the last that did.
        at_target: whether an evaluation in this stage reached the target.
    """

    iterations: int = 0
    best: float | None = None
    evaluations_since_best: int = 0
    at_target: bool = False


@dataclass(frozen=True)
class Stage:
    """A part of a curriculum in which the mixture of tasks stays the same.

    Attributes:
        name: unique within a curriculum; checkpoints and reports go by it.
        mixture: each task's share of the prompts, e.g. ``{"t2i": 0.8, "edit": 0.2}`` to rehearse editing; any positive
            numbers, for only their ratios count.
        num_iterations: the stage ends after this many at the latest.
        target: the stage ends once the held-out score of its main task (the largest share; the mean where several
            share it) reaches this; None: no target.
        plateau: the stage ends after this many evaluations in a row without improvement; None: never.
        reset_reference: whether the reference policy becomes the current one when the stage starts.
        keep_optimizer: whether the optimiser's state survives the start of the stage.
        learning_rate_scale: the learning rate in this stage over the configured one.
        decay_share: the last share of the stage's iterations, over which the learning rate falls linearly to 0: what
            the weights have gathered of the gradients' noise leaves them with it.
        reward_weights: schedules by reward component, counted in iterations of this stage.
        algorithm: numbers among the algorithm's fields that are others in this stage, such as ``{"num_sigmas": 2}``.
        cycle: where given, each iteration has one task, in this order, round and round; it must agree with the shares.
        min_improvement: how much better than the best an evaluation must be to count as an improvement.
    """

    name: str
    mixture: Mapping[str, float]
    num_iterations: int
    target: float | None = None
    plateau: int | None = None
    reset_reference: bool = True
    keep_optimizer: bool = False
    learning_rate_scale: float = 1.0
    decay_share: float = 0.0
    reward_weights: Mapping[str, Schedule] = field(default_factory=dict)
    algorithm: Mapping[str, float] = field(default_factory=dict)
    cycle: tuple[str, ...] = ()
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        if not self.name:
            raise ValueError("Stage: expected a name, got an empty one; checkpoints and reports go by it")
        if not self.mixture or not all(math.isfinite(share) and share > 0 for share in self.mixture.values()):
            raise ValueError(
                f"{where}: expected mixture to give each task a positive share, such as {{'edit': 1.0}},"
                f" got {dict(self.mixture)}; leave out the tasks that are not practised"
            )
        plateau = 1 if self.plateau is None else self.plateau
        _check_at_least(where, num_iterations=(self.num_iterations, 1), plateau=(plateau, 1))
        _check_finite(where, target=self.target or 0.0, learning_rate_scale=self.learning_rate_scale)
        _check_at_least(where, min_improvement=(self.min_improvement, 0))
        if self.learning_rate_scale <= 0:
            raise ValueError(f"{where}: expected learning_rate_scale above 0, got {self.learning_rate_scale}")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"{where}: expected decay_share between 0 and 1, got {self.decay_share}")
        self._check_cycle(where)

    def _check_cycle(self, where: str) -> None:
        for task in self.cycle:
            if task not in self.mixture:
                near = nearest_name(task, self.mixture)
                raise ValueError(f"{where}: cycle names {task!r}, which mixture does not; did you mean {near!r}?")
        counts = Counter(self.cycle)
        total = sum(self.mixture.values())
        for task, share in self.mixture.items() if self.cycle else ():
            if not math.isclose(counts[task] / len(self.cycle), share / total):
                raise ValueError(
                    f"{where}: mixture gives {task!r} the share {share / total:.3g} but cycle {self.cycle} gives it"
                    f" {counts[task] / len(self.cycle):.3g}; make them agree"
                )

    def shares(self, iteration: int) -> dict[str, float]:
        """Each task's share of the prompts at an iteration of this stage; they sum to 1."""
        if self.cycle:
            return {self.cycle[iteration % len(self.cycle)]: 1.0}
        total = sum(self.mixture.values())
        return {task: share / total for task, share in self.mixture.items()}

    def learning_rate(self, iteration: int) -> float:
        """The learning rate at an iteration of this stage over the configured one; above 0 at every iteration."""
        decay = (self.num_iterations - iteration) / max(self.decay_share * self.num_iterations, 1)
        return self.learning_rate_scale * min(1.0, decay)

    def weights(self, iteration: int) -> dict[str, float]:
        """The reward weights, by component, at an iteration of this stage."""
        return {name: float(schedule.at(iteration)) for name, schedule in self.reward_weights.items()}

    def measure(self, scores: Mapping[str, float]) -> float | None:
        """The held-out score of the main task; None where it is not needed or not available (NaN).

        Raises:
            ValueError: an end rule needs the score of a task that was not evaluated.
        """
        if self.target is None and self.plateau is None:
            return None
        largest = max(self.mixture.values())
        main = [task for task, share in self.mixture.items() if share == largest]
        for task in main:
            if task not in scores:
                raise ValueError(
                    f"stage {self.name!r}: its target or plateau needs the held-out score of {task!r}, got scores of"
                    f" {sorted(scores)}; evaluate {task!r} too"
                )
        value = sum(float(scores[task]) for task in main) / len(main)
        return value if math.isfinite(value) else None

    def start(self, scores: Mapping[str, float]) -> StageProgress:
        """Progress at the start; the last evaluation before the stage is what a plateau is measured from."""
        return StageProgress(best=self.measure(scores) if scores else None)

    def evaluated(self, progress: StageProgress, scores: Mapping[str, float]) -> StageProgress:
        """Progress after an evaluation. One before the first iteration is a start; it cannot end the stage."""
        if progress.iterations == 0:
            return self.start(scores)
        value = self.measure(scores)
        if value is None:
            return progress
        at_target = progress.at_target or (self.target is not None and value >= self.target)
        if progress.best is None or value > progress.best + self.min_improvement:
            return replace(progress, best=value, evaluations_since_best=0, at_target=at_target)
        return replace(progress, evaluations_since_best=progress.evaluations_since_best + 1, at_target=at_target)

    def ended(self, progress: StageProgress) -> bool:
        """Whether the stage is over: its iterations are used up, its target is met, or it improves no more."""
        stuck = self.plateau is not None and progress.evaluations_since_best >= self.plateau
        return progress.iterations >= self.num_iterations or progress.at_target or stuck


def _check_finite(where: str, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{where}: expected {name} to be a finite number, got {value}")


def _check_at_least(where: str, **limits: tuple[float, float]) -> None:
    for name, (value, least) in limits.items():
        if not value >= least:
            raise ValueError(f"{where}: expected {name} of at least {least}, got {value}")
