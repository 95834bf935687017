"""What a run practises and is measured on: each task's environment, prompts, reward and held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from envs.prompts import PromptPool
    from rewards.base import Prompt, Reward

ENV_IDS = {"t2i": "pdtr/TextToImage-v0", "edit": "pdtr/ImageEditing-v0"}


@dataclass(frozen=True)
class Task:
    """One task of a run.

    Attributes:
        name: "t2i" or "edit"; it chooses the environment.
        pool: where training prompts come from.
        reward: what is trained on.
        tune: held-out prompts for the curves and for the ends of stages.
        final: held-out prompts for the table, disjoint from ``tune`` and never used for choosing.
        image_size: (height, width) in pixels.
        success: the reward's component that counts as success in evaluations; where the reward has none of that name
            its total is shown instead.
        held_out_reward: scores evaluations in place of ``reward``; it is never trained on.
    """

    name: str
    pool: PromptPool
    reward: Reward
    tune: Sequence[Prompt]
    final: Sequence[Prompt]
    image_size: tuple[int, int]
    success: str = "strict"
    held_out_reward: Reward | None = None

    def make_envs(self, num_envs: int, is_evaluation: bool = False) -> list[VectorEnv[Any, Any, Any]]:
        """Two equal vector environments, so that one can score while the other is drawn for."""
        import gymnasium

        import envs  # noqa: F401  (registers the environments)

        reward = self.held_out_reward if is_evaluation and self.held_out_reward is not None else self.reward
        kwargs: dict[str, Any] = {"reward": reward, "prompts": self.pool, "image_size": self.image_size}
        mode = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
        return [
            gymnasium.make_vec(ENV_IDS[self.name], num_envs=num_envs, vectorization_mode=mode, **kwargs)
            for _ in range(2)
        ]


def scenes_tasks(num_tune: int, num_final: int, rewards: Mapping[str, Reward] | None = None) -> dict[str, Task]:
    """Both tasks of the embedded world, measured by their ground truth.

    Args:
        num_tune: held-out prompts a task for the curves.
        num_final: held-out prompts a task for the table; another draw, without the curves' prompts.
        rewards: trained on in place of the ground truth, by task; evaluation keeps the ground truth.
    """
    from envs.scenes.rewards import edit_reward, t2i_reward
    from envs.scenes.suite import ScenesPool, edit_prompts, t2i_prompts
    from envs.scenes.world import CANVAS

    truth: dict[str, Reward] = {"t2i": t2i_reward, "edit": edit_reward}
    unknown = sorted(set(rewards or {}) - set(truth))
    if unknown:
        raise ValueError(f"rewards: expected rewards for {sorted(truth)}, got one for {unknown[0]!r}")
    suites = {"t2i": t2i_prompts, "edit": edit_prompts}
    tasks = {}
    for name, suite in suites.items():
        tune = suite("held_out", num_tune, 1)
        final = _without(suite("held_out", num_final, 2), tune)
        pool = ScenesPool(name, "train")
        tasks[name] = Task(name, pool, truth[name], tune, final, (CANVAS, CANVAS))
        if rewards and name in rewards:
            tasks[name] = replace(tasks[name], reward=rewards[name], held_out_reward=truth[name])
    return tasks


def _without(prompts: Sequence[Prompt], others: Sequence[Prompt]) -> list[Prompt]:
    """The prompts whose text and source are not among the others'."""

    def key(prompt: Prompt) -> tuple[str, ...]:
        return (prompt.text, *(str(image.tobytes()) for image in prompt.source_images))

    seen = {key(prompt) for prompt in others}
    return [prompt for prompt in prompts if prompt.source_images == () or key(prompt) not in seen]
