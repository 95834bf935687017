"""A curriculum that adapts: any other curriculum, with prompts of the difficulty that teaches most right now.

Difficulty is cut into bins. In each bin the success of the policy is followed by a running mean, and bins are drawn by
one of two signals: how close the success is to a band where both successes and failures occur, or how fast it changes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import numpy as np
from numpy.typing import NDArray

from pdtr.curriculum import Curriculum, Plan, TaskBatch, check_rewards, check_state
from pdtr.stages import nearest_name

if TYPE_CHECKING:
    from envs.prompts import PromptPool
    from rewards.base import Prompt

Signal = Literal["success_band", "learning_progress"]


@final
@dataclass
class Adaptive:
    """Chooses the difficulty of the prompts that another curriculum proposes.

    A bin's success is a running mean over iterations, ``fast += rate (success - fast)``, and ``slow`` follows ``fast``
    by the same rule. The signals:

    - ``success_band``: the bins whose ``fast`` is nearest to the band, alike; within the band the distance is 0. Groups
      in which every sample succeeds, or none, have no advantage to learn from (online difficulty filtering,
      arXiv:2504.03380).
    - ``learning_progress``: in proportion to ``|fast - slow|`` (arXiv:2106.14876); forgetting counts as much as
      learning, so that what is being lost is practised again (arXiv:1707.00183).

    Either way a share ``exploration`` is spread evenly over the bins, and a bin never tried counts as the best.

    Attributes:
        inner: the curriculum whose tasks, stages and reward weights are kept.
        signal: what makes a bin worth practising.
        edges: limits of the bins, rising, within [0, 1]; pools must have prompts in every bin. What lies on a limit
            counts towards the bin above.
        band: the success rates of ``success_band``.
        rate: how much of a new success rate enters the running mean, in (0, 1].
        exploration: in (0, 1].
        success_threshold: a sample succeeds where its reward is at least this.

    Raises:
        ValueError: at construction, for values outside of these; by ``observe``, for prompts whose
            ``metadata["difficulty"]`` is missing.
    """

    inner: Curriculum
    signal: Signal = "success_band"
    edges: tuple[float, ...] = (0.0, 0.3, 0.6, 1.0)
    band: tuple[float, float] = (0.2, 0.8)
    rate: float = 0.3
    exploration: float = 0.1
    success_threshold: float = 0.5
    _fast: dict[str, list[float | None]] = field(default_factory=dict, init=False, repr=False)
    _slow: dict[str, list[float | None]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.signal not in get_args(Signal):
            near = nearest_name(self.signal, get_args(Signal))
            raise ValueError(f"signal: expected one of {get_args(Signal)}, got {self.signal!r}; did you mean {near!r}?")
        rising = all(low < high for low, high in itertools.pairwise(self.edges))
        if len(self.edges) < 3 or not rising or self.edges[0] < 0 or self.edges[-1] > 1:
            raise ValueError(f"edges: expected at least three that rise within [0, 1], got {self.edges}")
        if not 0 <= self.band[0] <= self.band[1] <= 1:
            raise ValueError(f"band: expected (low, high) with 0 <= low <= high <= 1, got {self.band}")
        for name, value in {"rate": self.rate, "exploration": self.exploration}.items():
            if not 0 < value <= 1:
                raise ValueError(f"{name}: expected a number in (0, 1], got {value}")
        if not math.isfinite(self.success_threshold):
            raise ValueError(f"success_threshold: expected a finite number, got {self.success_threshold}")

    def bin_probabilities(self, task: str) -> NDArray[np.float64]:
        """How likely each bin of a task is to be drawn from, [num_bins]; they sum to 1."""
        num_bins = len(self.edges) - 1
        fast, slow = self._fast.get(task, [None] * num_bins), self._slow.get(task, [None] * num_bins)
        weights = _band_weights(fast, self.band) if self.signal == "success_band" else _progress_weights(fast, slow)
        probabilities: NDArray[np.float64] = (1 - self.exploration) * weights / weights.sum()
        return probabilities + self.exploration / num_bins

    def propose(self, pools: Mapping[str, PromptPool], num_prompts: int, rng: np.random.Generator) -> Plan | None:
        """The inner curriculum's plan, its prompts drawn from the bins."""
        binned = {task: _BinnedPool(pool, self.edges, self.bin_probabilities(task)) for task, pool in pools.items()}
        return self.inner.propose(binned, num_prompts, rng)

    def observe(self, plan: Plan, rewards: Mapping[str, NDArray[np.float32]]) -> None:
        """Update the running success of the bins that were practised; NaN rewards do not count."""
        check_rewards(plan, rewards)
        for part in plan.parts:
            self._observe_task(part, rewards[part.task])
        self.inner.observe(plan, rewards)

    def _observe_task(self, part: TaskBatch, rewards: NDArray[np.float32]) -> None:
        num_bins = len(self.edges) - 1
        fast = self._fast.setdefault(part.task, [None] * num_bins)
        slow = self._slow.setdefault(part.task, [None] * num_bins)
        bins = np.array([_bin_of(prompt, self.edges) for prompt in part.prompts])
        for index in np.unique(bins):
            values = rewards[bins == index]
            values = values[np.isfinite(values)]
            if values.size == 0:
                continue
            success = float(np.mean(values >= self.success_threshold))
            fast[index] = new = _follow(fast[index], success, self.rate)
            slow[index] = _follow(slow[index], new, self.rate)

    def observe_evaluation(self, scores: Mapping[str, float]) -> None:
        """Hand held-out scores on to the inner curriculum, whose stages end by them."""
        self.inner.observe_evaluation(scores)

    def state_dict(self) -> dict[str, Any]:
        """The running successes and the inner curriculum's state."""
        copies = {name: {task: list(row) for task, row in table.items()} for name, table in self._tables().items()}
        return {**self._identity(), **copies, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state with the same signal and bins.

        Raises:
            ValueError: the state is another curriculum's, or the inner one's is.
        """
        check_state(state, self._identity(), {*self._tables(), "inner"})
        for name in self._tables():
            for task, row in state[name].items():
                if len(row) != len(self.edges) - 1:
                    raise ValueError(f"Adaptive: expected {len(self.edges) - 1} bins of {task!r}, got {len(row)}")
        self.inner.load_state_dict(state["inner"])
        self._fast, self._slow = ({task: list(row) for task, row in state[name].items()} for name in self._tables())

    def _tables(self) -> dict[str, dict[str, list[float | None]]]:
        return {"fast": self._fast, "slow": self._slow}

    def _identity(self) -> dict[str, Any]:
        return {"curriculum": "Adaptive", "signal": self.signal, "edges": list(self.edges)}


@dataclass(frozen=True)
class _BinnedPool:
    """A pool whose prompts come from difficulty bins, each drawn with its probability."""

    pool: PromptPool
    edges: tuple[float, ...]
    probabilities: NDArray[np.float64]

    def draw(self, rng: np.random.Generator, count: int, difficulty: tuple[float, float] = (0.0, 1.0)) -> list[Prompt]:
        """Draw ``count`` prompts from the bins, as far as they lie within ``difficulty``."""
        edges = np.clip(self.edges, *difficulty)
        reachable = np.where(np.diff(edges) > 0, self.probabilities, 0.0)
        if reachable.sum() == 0:
            raise ValueError(f"difficulty: expected a range that meets the bins {self.edges}, got {difficulty}")
        counts = rng.multinomial(count, reachable / reachable.sum())
        limits = [(float(low), float(high)) for low, high in itertools.pairwise(edges)]
        drawn = [self.pool.draw(rng, int(n), limit) for n, limit in zip(counts, limits, strict=True) if n]
        return [prompt for prompts in drawn for prompt in prompts]


def _band_weights(fast: list[float | None], band: tuple[float, float]) -> NDArray[np.float64]:
    distances = np.array([0.0 if value is None else max(band[0] - value, value - band[1], 0.0) for value in fast])
    weights: NDArray[np.float64] = (distances <= distances.min() + 1e-9).astype(np.float64)
    return weights


def _progress_weights(fast: list[float | None], slow: list[float | None]) -> NDArray[np.float64]:
    progress = np.array([np.nan if f is None or s is None else abs(f - s) for f, s in zip(fast, slow, strict=True)])
    best = np.nanmax(progress) if np.isfinite(progress).any() else 0.0
    if best == 0:
        # Where nothing moves, only what was never tried can be worth more than the rest.
        return np.isnan(progress).astype(np.float64) if np.isnan(progress).any() else np.ones(len(progress))
    return np.where(np.isnan(progress), best, progress)


def _follow(old: float | None, new: float, rate: float) -> float:
    return new if old is None else old + rate * (new - old)


def _bin_of(prompt: Prompt, edges: tuple[float, ...]) -> int:
    difficulty = prompt.metadata.get("difficulty")
    if not isinstance(difficulty, int | float):
        raise ValueError(
            f"prompt {prompt.id!r}: Adaptive expects metadata['difficulty'] in [0, 1], got {difficulty!r};"
            " give the pool's prompts one, or use a curriculum that does not adapt"
        )
    return int(np.clip(np.searchsorted(edges, difficulty, side="right") - 1, 0, len(edges) - 2))
