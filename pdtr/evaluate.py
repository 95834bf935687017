"""Held-out evaluation: fixed prompts, fixed seeds, so that any two evaluations of a task are paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pdtr.measures import REWARD, STRICT
from pdtr.tasks import TRAINED

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from agents.policies.base import FlowPolicy
    from agents.rollout import Draw
    from agents.samplers import Sampler
    from agents.types import Rollout
    from rewards.base import Prompt

# One seed for every run: two runs, or two moments of one, see the same noise on the same prompt.
EVALUATION_SEED = 20_250_904
HELD_OUT = "held_out"
"""Scores behind it and a slash are of members of the trained reward that are only logged."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found, a row a prompt.

    Attributes:
        ids: of the prompts.
        skills: each prompt's skill ("" where its metadata names none).
        strict: success, 1 or 0 where it is the strict one, NaN where not available, [N].
        reward: [N].
        images: uint8 [N, H, W, 3]; with several processes the first ones, in the first process alone.
        trained: what the run trains on, of the same images, [N]; None where that is the reward itself.
        success: the component that ``strict`` is, or ``REWARD``.
        held_out: members of the trained reward that are only logged, by name, [N] each.
        parts: components of the trained reward that stages weigh by name, [N] each.
    """

    ids: tuple[str, ...]
    skills: tuple[str, ...]
    strict: NDArray[np.float32]
    reward: NDArray[np.float32]
    images: NDArray[np.uint8]
    trained: NDArray[np.float32] | None = None
    success: str = STRICT
    held_out: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    parts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, NDArray[np.float32]]:
        """Everything that there is one number a prompt of, by name."""
        found = {"strict": self.strict, "reward": self.reward}
        found |= {f"{HELD_OUT}/{name}": values for name, values in self.held_out.items()}
        found |= {f"{TRAINED}/{name}": values for name, values in self.parts.items()}
        return found if self.trained is None else {**found, TRAINED: self.trained}

    @property
    def score(self) -> float:
        """Mean success over the available rows; NaN where none is."""
        return mean(self.strict)

    def by_skill(self) -> dict[str, float]:
        """Mean success of each skill, in order of first appearance."""
        skills = np.array(self.skills)
        return {skill: mean(self.strict[skills == skill]) for skill in dict.fromkeys(self.skills)}


def mean(values: NDArray[np.float32]) -> float:
    """Mean over what is not NaN; NaN where nothing is left."""
    available = values[~np.isnan(values)]
    return float(available.mean()) if len(available) else float("nan")


def evaluate(
    policy: FlowPolicy,
    envs: Sequence[VectorEnv[Any, Any, Any]],
    prompts: Sequence[Prompt],
    sampler: Sampler,
    *,
    kind: str = "final",
    success: str = STRICT,
) -> Evaluation:
    """Draw one image a prompt with the weights in use and score it.

    The last chunk is filled up with repeated prompts, whose rows are dropped. Evaluations of one ``kind`` see the same
    noise on the same prompt, those of two kinds do not: what was looked at while tuning is not drawn again at the end.
    """
    from agents.rollout import collect

    padded, draw = evaluation_draw(prompts, envs[0].num_envs, kind)
    return evaluation_of(collect(policy, envs, padded, draw, sampler), prompts, success)


def evaluation_draw(prompts: Sequence[Prompt], chunk_size: int, kind: str) -> tuple[list[Prompt], Draw]:
    """What is drawn for an evaluation: the prompts, filled up to whole chunks, and how.

    Raises:
        ValueError: there is no prompt.
    """
    from agents.rollout import Draw
    from agents.samplers import derive_seed

    if not prompts:
        raise ValueError("evaluate: expected at least one prompt, got none")
    padding = -len(prompts) % chunk_size
    padded = [*prompts, *(prompts[i % len(prompts)] for i in range(padding))]
    return padded, Draw(1, derive_seed(EVALUATION_SEED, kind), keep_images=True)


def evaluation_of(
    rollout: Rollout,
    prompts: Sequence[Prompt],
    success: str = STRICT,
    held_out: Sequence[str] = (),
    weighed: Sequence[str] = (),
) -> Evaluation:
    """Read what was drawn by :func:`evaluation_draw`; the rows that filled up are dropped.

    Args:
        rollout: one image a prompt, in the prompts' order.
        prompts: without those that filled up.
        success: the component that counts as success; the total where there is none of the name.
        held_out: components that the trained reward logs and does not weigh.
        weighed: components of the trained reward that stages weigh by name.
    """
    count = len(prompts)
    reward = rollout.rewards.numpy()[:count]
    components = rollout.components
    is_other = TRAINED in components
    # Where nothing is held out there is nothing to hold them against.
    trained = {name: f"{TRAINED}/{name}" if is_other else name for name in weighed if is_other or held_out}
    strict = components[success].numpy()[:count] if success in components else reward
    images = np.zeros((0, 1, 1, 3), np.uint8) if rollout.images is None else rollout.images[:count]
    return Evaluation(
        ids=tuple(prompt.id for prompt in prompts),
        skills=tuple(_skill(prompt.metadata) for prompt in prompts),
        strict=strict,
        reward=reward,
        images=images,
        trained=components[TRAINED].numpy()[:count] if TRAINED in components else None,
        success=success if success in components else REWARD,
        held_out={name: components[name].numpy()[:count] for name in held_out if name in components},
        parts={name: components[key].numpy()[:count] for name, key in trained.items() if key in components},
    )


def _skill(metadata: Any) -> str:
    return str(metadata.get("tag", ""))
