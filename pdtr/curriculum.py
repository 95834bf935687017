"""What is practised at each iteration: the curriculum's contract, and the curricula made of stages.

Progressive Dual-Task Reinforcement (UniPic 2.0, arXiv:2509.04548) trains image editing first and text-to-image second;
:func:`pdtr_curriculum` is that. The reversed order, a joint mixture, alternation and a single task are what it has to
be compared with, and share its contract.

A curriculum is a dataclass: the fields that it is made with are command-line flags, its running state is not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, final

from pdtr.stages import Stage, StageProgress, nearest_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from envs.prompts import PromptPool
    from rewards.base import Prompt


@dataclass(frozen=True)
class TaskBatch:
    """The prompts of one task in one iteration."""

    task: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Plan:
    """What one iteration practises, and what has to be done before it.

    Attributes:
        stage: index of the stage, from 0.
        stage_name: its name.
        parts: one batch a task, none of them empty.
        reward_weights: by reward component, added to the total (itself weighed 1 unless "total" is named); where each
            is normalised first, what is named is all.
        starts_stage: whether this is the first iteration of the stage.
        reset_reference: whether the reference policy becomes the current one now; false unless a stage starts.
        keep_optimizer: whether the optimiser keeps its state; true unless a stage starts.
        learning_rate_scale: the learning rate over the configured one.
        algorithm: numbers among the algorithm's fields that are others than configured.
    """

    stage: int
    stage_name: str
    parts: tuple[TaskBatch, ...]
    reward_weights: Mapping[str, float]
    starts_stage: bool
    reset_reference: bool
    keep_optimizer: bool
    learning_rate_scale: float = 1.0
    algorithm: Mapping[str, float] = field(default_factory=dict)


class Curriculum(Protocol):
    """Which tasks and prompts are practised when. Anything with these five methods is one.

    ``propose`` is called once an iteration, in order, and depends on nothing but the state and the generator: from the
    same ``state_dict`` and generator it proposes the same plan, which is what lets a run resume exactly.
    """

    def propose(self, pools: Mapping[str, PromptPool], num_prompts: int, rng: np.random.Generator) -> Plan | None:
        """The next iteration's plan, with ``num_prompts`` prompts in all; None once the curriculum is finished."""
        ...

    def observe(self, plan: Plan, rewards: Mapping[str, NDArray[np.float32]]) -> None:
        """Take note of the training rewards by task, float32 [P prompts, G samples], NaN where not available."""
        ...

    def observe_evaluation(self, scores: Mapping[str, float]) -> None:
        """Take note of held-out scores by task."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not in the constructor, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on from a state. Raises ValueError where it belongs to another curriculum."""
        ...


def split_prompts(num_prompts: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split prompts over tasks by the largest remainder, so that the counts sum to ``num_prompts``.

    ``q_i = num_prompts share_i / sum_j share_j``; each task gets floor(q_i), and what is left goes one by one to the
    largest ``q_i - floor(q_i)``, in the mapping's order where they tie.

    Raises:
        ValueError: a task would get no prompts: ``num_prompts`` is too small for its share.
    """
    total = sum(shares.values())
    quotas = {task: num_prompts * share / total for task, share in shares.items()}
    # Rounded first: 0.7 * 10 must not lose a prompt to its last binary digit.
    counts = {task: math.floor(round(quota, 9)) for task, quota in quotas.items()}
    by_remainder = sorted(shares, key=lambda task: round(counts[task] - quotas[task], 9))
    for task in by_remainder[: num_prompts - sum(counts.values())]:
        counts[task] += 1
    for task, count in counts.items():
        if count == 0:
            raise ValueError(
                f"num_prompts: expected enough for every task, but of {num_prompts} task {task!r} with the share"
                f" {shares[task] / total:.3g} gets none; {math.ceil(total / shares[task])} are enough"
            )
    return counts


@dataclass
class StageCurriculum(ABC):
    """Goes through the stages that a subclass names, one after another; ``propose`` moves on when one is over."""

    _stage: int = field(default=0, init=False, repr=False)
    _progress: StageProgress = field(default_factory=StageProgress, init=False, repr=False)
    _scores: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def as_stages(self) -> tuple[Stage, ...]:
        """The stages, in order."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.as_stages()]
        if not names:
            raise ValueError(f"{type(self).__name__}: expected at least one stage, got none")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"{type(self).__name__}: expected each stage to have its own name, got {twice[0]!r} twice")

    def propose(self, pools: Mapping[str, PromptPool], num_prompts: int, rng: np.random.Generator) -> Plan | None:
        """The next plan of the running stage, or the first of the one that follows.

        Raises:
            ValueError: a stage, be it a later one, names a task that has no pool or would get no prompts of it.
        """
        stages = self.as_stages()
        _check_stages(stages, pools, num_prompts)
        while self._stage < len(stages) and stages[self._stage].ended(self._progress):
            self._stage += 1
            self._progress = stages[self._stage].start(self._scores) if self._stage < len(stages) else StageProgress()
        if self._stage == len(stages):
            return None
        stage, iteration = stages[self._stage], self._progress.iterations
        self._progress = replace(self._progress, iterations=iteration + 1)
        return Plan(
            stage=self._stage,
            stage_name=stage.name,
            parts=_draw(pools, split_prompts(num_prompts, stage.shares(iteration)), rng),
            reward_weights=stage.weights(iteration),
            starts_stage=iteration == 0,
            reset_reference=iteration == 0 and stage.reset_reference,
            keep_optimizer=iteration > 0 or stage.keep_optimizer,
            learning_rate_scale=stage.learning_rate(iteration),
            algorithm=stage.algorithm,
        )

    def observe(self, plan: Plan, rewards: Mapping[str, NDArray[np.float32]]) -> None:
        """Check the rewards and learn nothing from them: stages end by iterations and held-out scores."""
        check_rewards(plan, rewards)

    def observe_evaluation(self, scores: Mapping[str, float]) -> None:
        """Test the running stage's end rules; the next ``propose`` acts on them. NaN scores count as not evaluated."""
        stages = self.as_stages()
        if self._stage < len(stages):
            self._progress = stages[self._stage].evaluated(self._progress, scores)
        self._scores.update({task: float(score) for task, score in scores.items() if math.isfinite(score)})

    def state_dict(self) -> dict[str, Any]:
        """The position, the progress of the running stage and the last scores; and whose they are."""
        position = {"stage": self._stage, "progress": asdict(self._progress), "scores": dict(self._scores)}
        return {**self._identity(), **position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same kind of curriculum, with stages of the same names.

        Their lengths and rules may have changed: a finished run may be made longer.

        Raises:
            ValueError: the state is another curriculum's, or incomplete.
        """
        check_state(state, self._identity(), {"stage", "progress", "scores"})
        stage, count = state["stage"], len(self.as_stages())
        if not isinstance(stage, int) or not 0 <= stage <= count:
            raise ValueError(f"{type(self).__name__}: expected a state with stage in 0..{count}, got {stage!r}")
        names, found = sorted(entry.name for entry in fields(StageProgress)), sorted(state["progress"])
        if found != names:
            raise ValueError(f"{type(self).__name__}: expected a state with progress {names}, got {found}")
        self._stage, self._progress = stage, StageProgress(**state["progress"])
        self._scores = {str(task): float(score) for task, score in state["scores"].items()}

    def _identity(self) -> dict[str, Any]:
        return {"curriculum": type(self).__name__, "stages": [stage.name for stage in self.as_stages()]}


@final
@dataclass
class Staged(StageCurriculum):
    """Any stages, one after another; see :func:`pdtr_curriculum`."""

    stages: tuple[Stage, ...]

    def as_stages(self) -> tuple[Stage, ...]:
        """The stages as given."""
        return tuple(self.stages)


@final
@dataclass
class Joint(StageCurriculum):
    """Every task in every iteration, by a mixture: what PDTR is argued to be better than."""

    num_iterations: int
    mixture: Mapping[str, float] = field(default_factory=lambda: {"edit": 0.5, "t2i": 0.5})

    def as_stages(self) -> tuple[Stage, ...]:
        """One stage with the mixture."""
        return (Stage("joint", self.mixture, self.num_iterations),)


@final
@dataclass
class Alternating(StageCurriculum):
    """One task an iteration, in a cycle; a task that is named twice gets two turns."""

    num_iterations: int
    cycle: tuple[str, ...] = ("edit", "t2i")

    def as_stages(self) -> tuple[Stage, ...]:
        """One stage with the cycle."""
        return (Stage("alternating", Counter(self.cycle), self.num_iterations, cycle=tuple(self.cycle)),)


@final
@dataclass
class SingleTask(StageCurriculum):
    """One task throughout, until its iterations are used up, its target is met or it improves no more."""

    task: str
    num_iterations: int
    target: float | None = None
    plateau: int | None = None

    def as_stages(self) -> tuple[Stage, ...]:
        """One stage, named after the task."""
        return (Stage(self.task, {self.task: 1.0}, self.num_iterations, target=self.target, plateau=self.plateau),)


def pdtr_curriculum(
    num_edit_iterations: int, num_t2i_iterations: int, rehearsal: float = 0.0, keep_optimizer: bool = False
) -> Staged:
    """Progressive Dual-Task Reinforcement (arXiv:2509.04548): editing first, then text-to-image.

    Args:
        num_edit_iterations: length of the first stage.
        num_t2i_iterations: length of the second.
        rehearsal: the first task's share of the second stage, in [0, 1); the paper has none.
        keep_optimizer: whether the second stage goes on with the first one's optimiser state.
    """
    return _in_order({"edit": num_edit_iterations, "t2i": num_t2i_iterations}, rehearsal, keep_optimizer)


def reversed_order(
    num_t2i_iterations: int, num_edit_iterations: int, rehearsal: float = 0.0, keep_optimizer: bool = False
) -> Staged:
    """Text-to-image first, then editing; otherwise :func:`pdtr_curriculum`."""
    return _in_order({"t2i": num_t2i_iterations, "edit": num_edit_iterations}, rehearsal, keep_optimizer)


def _in_order(num_iterations: Mapping[str, int], rehearsal: float, keep_optimizer: bool) -> Staged:
    if not 0 <= rehearsal < 1:
        raise ValueError(f"rehearsal: expected a share of the second stage in [0, 1), got {rehearsal}")
    first, second = num_iterations
    mixture = {second: 1 - rehearsal, first: rehearsal} if rehearsal else {second: 1.0}
    return Staged(
        (
            Stage(first, {first: 1.0}, num_iterations[first]),
            Stage(second, mixture, num_iterations[second], keep_optimizer=keep_optimizer),
        )
    )


def check_rewards(plan: Plan, rewards: Mapping[str, NDArray[np.float32]]) -> None:
    """Check that there is one row of rewards a prompt of the plan.

    Raises:
        ValueError: a task is missing or superfluous, or its rewards are not [P, G].
    """
    if set(rewards) != {part.task for part in plan.parts}:
        raise ValueError(f"rewards: expected those of {[part.task for part in plan.parts]}, got {sorted(rewards)}")
    for part in plan.parts:
        shape = rewards[part.task].shape
        if len(shape) != 2 or shape[0] != len(part.prompts):
            raise ValueError(
                f"rewards of {part.task!r}: expected shape [{len(part.prompts)} prompts, samples], got {list(shape)}"
            )


def check_state(state: Mapping[str, Any], identity: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Check that a state names the curriculum that loads it, and is complete.

    Raises:
        ValueError: it is another one's, or a key is missing; the message names both sides.
    """
    name = identity["curriculum"]
    for key, expected in identity.items():
        if state.get(key) != expected:
            raise ValueError(
                f"{name}: expected a state with {key} {expected!r}, got {state.get(key)!r};"
                " resume with the curriculum that the checkpoint was made with"
            )
    missing = sorted(set(keys) - set(state))
    if missing:
        raise ValueError(f"{name}: expected a state with {missing[0]!r}, got only {sorted(state)}")


def _check_stages(stages: Sequence[Stage], pools: Mapping[str, PromptPool], num_prompts: int) -> None:
    # Every stage at every call: a misspelt task of the last stage must not wait hours to be found.
    for stage in stages:
        for task in stage.mixture:
            if task not in pools:
                near = nearest_name(task, pools)
                raise ValueError(
                    f"stage {stage.name!r}: expected tasks among {sorted(pools)}, got {task!r}; did you mean {near!r}?"
                )
        split_prompts(num_prompts, stage.shares(0))


def _draw(
    pools: Mapping[str, PromptPool], counts: Mapping[str, int], rng: np.random.Generator
) -> tuple[TaskBatch, ...]:
    parts = tuple(TaskBatch(task, tuple(pools[task].draw(rng, count))) for task, count in counts.items())
    for part in parts:
        if len(part.prompts) != counts[part.task]:
            raise ValueError(
                f"pool of {part.task!r}: expected {counts[part.task]} prompts as asked, got {len(part.prompts)}"
            )
    return parts
