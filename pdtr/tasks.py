"""What a run practises and is measured on: each task's environment, prompts, reward and held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from envs.prompts import PromptPool
    from envs.scenes.grammar import Split
    from rewards.base import Prompt, Reward

TRAINED = "trained"
ENV_IDS = {"t2i": "pdtr/TextToImage-v0", "edit": "pdtr/ImageEditing-v0"}
# How many times as many prompts are drawn where some repeat: a third of them at worst, single objects apart.
_SPARE = 4
# Prompts of seeds 2 and 4 were looked at while settings of the recipes were chosen.
_TUNE_SEED, _FINAL_SEED = 1, 3


@dataclass(frozen=True)
class Task:
    """One task of a run.

    Attributes:
        name: "t2i" or "edit"; it chooses the environment.
        pool: where training prompts come from.
        reward: what is trained on.
        tune: held-out prompts for the curves and for the ends of stages.
        final: held-out prompts for the table, other than ``tune``'s and never used for choosing.
        image_size: (height, width) in pixels.
        success: the reward's component that counts as success in evaluations; where the reward has none of that name
            its total is shown instead.
        held_out_reward: scores evaluations in place of ``reward``; it is never trained on. What the trained reward says
            of the same images is kept beside it, as the component ``TRAINED``.
        weighed: components of ``reward`` that stages weigh by name, which evaluations keep too.
        is_ground_truth: whether ``reward`` is what is wanted itself, so that nothing need be held against it.
    """

    name: str
    pool: PromptPool
    reward: Reward
    tune: Sequence[Prompt]
    final: Sequence[Prompt]
    image_size: tuple[int, int]
    success: str = "strict"
    held_out_reward: Reward | None = None
    weighed: tuple[str, ...] = ()
    is_ground_truth: bool = False

    def __post_init__(self) -> None:
        from rewards.base import reward_name, reward_traits

        measured = self.held_out_reward or self.reward
        if reward_traits(measured).scope == "group":
            raise ValueError(
                f"task {self.name!r}: expected a held_out_reward that scores every image by itself, as evaluations "
                f"draw one image a prompt, got {reward_name(measured)}, which compares the images of a group"
            )

    @property
    def held_out_members(self) -> tuple[str, ...]:
        """Members of the trained reward that are scored and not weighed, by the names of their components."""
        from rewards.cache import Cached
        from rewards.compose import WeightedSum

        reward = self.reward.reward if isinstance(self.reward, Cached) else self.reward
        return tuple(reward.held_out) if isinstance(reward, WeightedSum) else ()

    def make_envs(self, num_envs: int, is_evaluation: bool = False) -> list[VectorEnv[Any, Any, Any]]:
        """Two equal vector environments, so that one can score while the other is drawn for."""
        import gymnasium

        import envs  # noqa: F401  (registers the environments)

        reward = self.reward
        if is_evaluation and self.held_out_reward is not None:
            reward = _measured(self.held_out_reward, self)
        kwargs: dict[str, Any] = {"reward": reward, "prompts": self.pool, "image_size": self.image_size}
        mode = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
        return [
            gymnasium.make_vec(ENV_IDS[self.name], num_envs=num_envs, vectorization_mode=mode, **kwargs)
            for _ in range(2)
        ]


def check_groups(tasks: Mapping[str, Task], group_size: int, chunk_size: int) -> None:
    """Check that rewards that compare a group get it whole.

    Raises:
        ValueError: a chunk of samples would cut the groups of such a reward.
    """
    from rewards.base import reward_name, reward_traits

    for name, task in tasks.items():
        if reward_traits(task.reward).scope == "group" and chunk_size % group_size:
            raise ValueError(
                f"chunk_size: expected a multiple of group_size {group_size}, for {reward_name(task.reward)} "
                f"(task {name!r}) compares whole groups, got {chunk_size}; "
                f"{group_size * max(1, chunk_size // group_size)} would do"
            )


def check_held_out(tasks: Mapping[str, Task], weights: Mapping[str, float]) -> None:
    """Check that what is held out is not trained on by the way of a stage's weights.

    Raises:
        ValueError: a member of a task's reward that is only logged, or a component of one, has a weight other than 0.
    """
    for task in tasks.values():
        for name in (name for name, weight in weights.items() if weight):
            if any(name == member or name.startswith(f"{member}/") for member in task.held_out_members):
                raise ValueError(
                    f"reward_weights: expected no weight of {name!r}, which is held out of the reward of task "
                    f"{task.name!r}, got {weights[name]:g}; leave it out, or make it a member that is trained on"
                )


def unwatched(task: Task) -> str:
    """Why nothing will warn of a task's reward being hacked; empty where something may."""
    from rewards.base import reward_name, reward_traits

    if reward_traits(task.reward).scope != "group":
        if task.held_out_reward is not None or task.held_out_members or task.is_ground_truth:
            return ""
        return (
            f"{task.name}: no alarm of reward hacking, for nothing is held out: name another reward that is only "
            "measured (--tasks.t2i-held-out-reward, --tasks.edit-held-out-reward, or WeightedSum(held_out=...))"
        )
    return (
        f"{task.name}: no alarm of reward hacking, for {reward_name(task.reward)} compares the images of a group and "
        "evaluations draw one image a prompt; watch the held-out reward's own curve"
    )


def _measured(held_out: Reward, task: Task) -> Reward:
    """The held-out reward with a task's trained one as components: its total, what is weighed, and what is only logged.

    Without them where the trained one compares groups: an evaluation draws one image a prompt.
    """
    from rewards.base import Images, Scores, reward_traits
    from rewards.scoring import score

    trained = task.reward
    if reward_traits(trained).scope == "group":
        return held_out

    def measured(images: Images, prompts: Sequence[Prompt]) -> Scores:
        found = score(held_out, images, prompts)
        proxy = score(trained, images, prompts)
        own = {TRAINED: proxy.total, **{name: proxy.components[name] for name in task.held_out_members}}
        own |= {f"{TRAINED}/{name}": proxy.components[name] for name in task.weighed if name in proxy.components}
        return Scores(found.total, {**found.components, **own}, found.reasons)

    return measured


def scenes_tasks(num_tune: int, num_final: int, rewards: Mapping[str, Reward] | None = None) -> dict[str, Task]:
    """Both tasks of the embedded world, measured by their ground truth.

    Args:
        num_tune: held-out prompts a task for the curves.
        num_final: held-out prompts a task for the table; another draw, without the curves' prompts as far as a
            skill's few texts allow.
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
        tune = suite("held_out", num_tune, _TUNE_SEED)
        final = _disjoint(suite, num_final, tune)
        pool = ScenesPool(name, "train")
        tasks[name] = Task(name, pool, truth[name], tune, final, (CANVAS, CANVAS), is_ground_truth=True)
        if rewards and name in rewards:
            own: dict[str, Any] = {"reward": rewards[name], "held_out_reward": truth[name], "is_ground_truth": False}
            tasks[name] = replace(tasks[name], **own)
    return tasks


def _disjoint(suite: Callable[[Split, int, int], list[Prompt]], count: int, tune: Sequence[Prompt]) -> list[Prompt]:
    """``count`` held-out prompts, the skills in turn, without the texts (in editing: with their sources) of ``tune``.

    Where ``tune`` has taken some, more are drawn. A skill with fewer texts than that needs (a single object held out
    has seven in all) repeats those of ``tune`` in the end: the table's skills stay balanced, and none is left out.
    """
    seen = {_key(prompt) for prompt in tune}
    found = suite("held_out", count, _FINAL_SEED)
    if not any(_key(prompt) in seen for prompt in found):
        return found
    by_skill: dict[str, list[Prompt]] = {}
    for prompt in suite("held_out", _SPARE * count, _FINAL_SEED):
        by_skill.setdefault(prompt.metadata["tag"], []).append(prompt)
    # Sorting is stable: the new ones come first, in the suite's order.
    queues = {skill: iter(sorted(of_skill, key=lambda p: _key(p) in seen)) for skill, of_skill in by_skill.items()}
    return [next(queues[prompt.metadata["tag"]]) for prompt in found]


def _key(prompt: Prompt) -> tuple[str | bytes, ...]:
    return (prompt.text, *(image.tobytes() for image in prompt.source_images))
