"""Held-out evaluation: fixed prompts, fixed seeds, so that any two evaluations of a task are paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pdtr.tasks import TRAINED

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from agents.policies.base import FlowPolicy
    from agents.samplers import Sampler
    from rewards.base import Prompt

# One seed for every run: two runs, or two moments of one, see the same noise on the same prompt.
EVALUATION_SEED = 20_250_904


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found, a row a prompt.

    Attributes:
        ids: of the prompts.
        skills: each prompt's skill ("" where its metadata names none).
        strict: success, 1 or 0, NaN where not available, [N].
        reward: [N].
        images: uint8 [N, H, W, 3].
        trained: what the run trains on, of the same images, [N]; None where that is the reward itself.
    """

    ids: tuple[str, ...]
    skills: tuple[str, ...]
    strict: NDArray[np.float32]
    reward: NDArray[np.float32]
    images: NDArray[np.uint8]
    trained: NDArray[np.float32] | None = None

    @property
    def scores(self) -> dict[str, NDArray[np.float32]]:
        """Everything that there is one number a prompt of, by name."""
        found = {"strict": self.strict, "reward": self.reward}
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
    success: str = "strict",
) -> Evaluation:
    """Draw one image a prompt with the weights in use and score it.

    The last chunk is filled up with repeated prompts, whose rows are dropped. Evaluations of one ``kind`` see the same
    noise on the same prompt, those of two kinds do not: what was looked at while tuning is not drawn again at the end.
    """
    from agents.rollout import Draw, collect
    from agents.samplers import derive_seed

    if not prompts:
        raise ValueError("evaluate: expected at least one prompt, got none")
    chunk_size = envs[0].num_envs
    padding = -len(prompts) % chunk_size
    padded = [*prompts, *(prompts[i % len(prompts)] for i in range(padding))]
    rollout = collect(policy, envs, padded, Draw(1, derive_seed(EVALUATION_SEED, kind), keep_images=True), sampler)
    assert rollout.images is not None
    count = len(prompts)
    reward = rollout.rewards.numpy()[:count]
    components = rollout.components
    strict = components[success].numpy()[:count] if success in components else reward
    return Evaluation(
        ids=tuple(prompt.id for prompt in prompts),
        skills=tuple(_skill(prompt.metadata) for prompt in prompts),
        strict=strict,
        reward=reward,
        images=rollout.images[:count],
        trained=components[TRAINED].numpy()[:count] if TRAINED in components else None,
    )


def _skill(metadata: Any) -> str:
    return str(metadata.get("tag", ""))
