"""Where a run's tasks come from: the embedded world, or files of prompts with rewards of one's own.

A source is a frozen dataclass, as a ``RewardSource`` is: its fields are flags of ``pdtr train`` and stand in the run's
``config.json``. Files are read, and rewards are made, once the run starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from envs.data.prompts import RecordPool
    from pdtr.config import EvaluationConfig
    from pdtr.tasks import Task
    from rewards.base import Prompt, Reward

logger = logging.getLogger(__name__)


class TaskSource(Protocol):
    """Makes the tasks of a run."""

    def make_tasks(
        self, evaluation: EvaluationConfig, rewards: Mapping[str, Reward] | None = None, /
    ) -> dict[str, Task]:
        """The tasks by name.

        Args:
            evaluation: says how many held-out prompts a task has.
            rewards: what a ``RewardSource`` made: by task, trained on in place of the task's own reward, which is
                measured all the same.

        Raises:
            ValueError: they cannot be made; what to do about it is said.
        """
        ...


@dataclass(frozen=True)
class ScenesTasks:
    """Both tasks of the embedded world, measured by its ground truth."""

    def make_tasks(
        self, evaluation: EvaluationConfig, rewards: Mapping[str, Reward] | None = None, /
    ) -> dict[str, Task]:
        """See :class:`TaskSource`."""
        from pdtr.tasks import scenes_tasks

        return scenes_tasks(evaluation.num_prompts, evaluation.num_final_prompts, rewards)


@dataclass(frozen=True)
class PromptFileTasks:
    """Text-to-image and editing from files of prompts: txt, jsonl, json, csv, tsv, parquet, tars, or globs of them.

    Attributes:
        t2i_prompts: texts; no text-to-image when empty.
        edit_prompts: instructions with the pictures to edit; no editing when empty.
        t2i_held_out: texts that evaluations ask for; taken out of t2i_prompts when empty, together with their repeats.
        edit_held_out: instructions that evaluations ask for; taken out of edit_prompts when empty, together with all
            instructions for the same pictures.
        t2i_reward: MODULE:REWARD of text-to-image, such as my_rewards:geneval, or MODULE:CLASS=ARGUMENT.
        edit_reward: that of editing.
        image_root: folder that pictures' paths start from; each file's own when empty.
        image_size: height and width in pixels; sources are cropped in the middle and resized.
        success: the reward's component that evaluations count as success; its total where it has none of the name.
        seed: of the choice of held-out prompts.
    """

    t2i_prompts: Path | None = None
    edit_prompts: Path | None = None
    t2i_held_out: Path | None = None
    edit_held_out: Path | None = None
    t2i_reward: str = ""
    edit_reward: str = ""
    image_root: Path | None = None
    image_size: tuple[int, int] = (512, 512)
    success: str = "strict"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.image_size) < 1 or self.seed < 0:
            raise ValueError(f"expected image_size and seed of 1 and 0 or more, got {self.image_size} and {self.seed}")

    def make_tasks(
        self, evaluation: EvaluationConfig, rewards: Mapping[str, Reward] | None = None, /
    ) -> dict[str, Task]:
        """See :class:`TaskSource`; a task without a file is left out.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: there is no file at all, a task has no reward or too few prompts, or a file no good row.
        """
        from pdtr.named_reward import load_reward
        from pdtr.tasks import Task

        rewards = rewards or {}
        tasks = {}
        for name, (path, held_out_path, reward) in self._given(rewards).items():
            own = load_reward(reward) if reward else None
            trained = rewards.get(name, own)
            if trained is None:
                raise ValueError(
                    f"{name}_reward: expected a reward for {path}, got none; name one as MODULE:REWARD, or give "
                    "the run rewards"
                )
            tune, final, pool = self._prompts(name, path, held_out_path, evaluation)
            measured = None if own is trained else own
            tasks[name] = Task(name, pool, trained, tune, final, self.image_size, self.success, measured)
        return tasks

    def _given(self, rewards: Mapping[str, Reward]) -> dict[str, tuple[Path, Path | None, str]]:
        """(prompts, held-out prompts, reward) of each task that has a file."""
        given = {}
        if self.t2i_prompts is not None:
            given["t2i"] = (self.t2i_prompts, self.t2i_held_out, self.t2i_reward)
        if self.edit_prompts is not None:
            given["edit"] = (self.edit_prompts, self.edit_held_out, self.edit_reward)
        if not given:
            raise ValueError("expected t2i_prompts, edit_prompts or both, got neither; name a file of prompts")
        unknown = sorted(set(rewards) - set(given))
        if unknown:
            raise ValueError(f"rewards: expected rewards for {sorted(given)}, got one for {unknown[0]!r}")
        return given

    def _prompts(
        self, name: str, path: Path, held_out_path: Path | None, evaluation: EvaluationConfig
    ) -> tuple[list[Prompt], list[Prompt], RecordPool]:
        """Held-out prompts for the curves and for the table, and the pool to train on."""
        num_tune, num_final = evaluation.num_prompts, evaluation.num_final_prompts
        pool = self._pool(name, path)
        if held_out_path is None:
            held_out, pool = pool.split(num_tune + num_final, self.seed)
        else:
            held_out = self._pool(name, held_out_path)
        prompts = held_out.first(num_tune + num_final)
        if len(prompts) < num_tune + num_final:
            raise ValueError(
                f"{held_out_path or path}: expected {num_tune} + {num_final} held-out prompts, got {len(prompts)}; "
                "lower evaluation.num_prompts or evaluation.num_final_prompts"
            )
        return prompts[:num_tune], prompts[num_tune:], pool

    def _pool(self, name: str, path: Path) -> RecordPool:
        from envs.data.prompts import prompts_from_records
        from envs.data.records import RecordSet

        kind: Literal["t2i_prompt", "edit_prompt"] = "t2i_prompt" if name == "t2i" else "edit_prompt"
        pool = prompts_from_records(RecordSet((str(path),), image_root=self.image_root), kind, self.image_size)
        if pool.problems.num_bad:
            counts = f"{pool.problems.num_bad} of {pool.problems.num_rows} rows"
            logger.warning("%s: %s are left out; the first: %s", path, counts, pool.problems.first[0])
        return pool
