"""Where a run's tasks come from: the embedded world, or files of prompts with rewards of one's own.

A source is a frozen dataclass, as a ``RewardSource`` is: its fields are flags of ``pdtr train`` and stand in the run's
``config.json``. Files are read, and rewards are made, once the run starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
            rewards: what a ``RewardSource`` makes, by task: trained on, where the source names no other reward to
                train on.

        Raises:
            ValueError: they cannot be made; what to do about it is said.
        """
        ...


@dataclass(frozen=True)
class ScenesTasks:
    """Both tasks of the embedded world, measured by its ground truth, and trained on it unless the run has rewards."""

    def make_tasks(
        self, evaluation: EvaluationConfig, rewards: Mapping[str, Reward] | None = None, /
    ) -> dict[str, Task]:
        """See :class:`TaskSource`."""
        from pdtr.tasks import scenes_tasks

        return scenes_tasks(evaluation.num_prompts, evaluation.num_final_prompts, rewards)


@dataclass(frozen=True)
class _Files:
    """What is named for one task: its files of prompts, and rewards as MODULE:REWARD."""

    task: str
    prompts: Path
    held_out: Path | None
    reward: str
    held_out_reward: str


@dataclass(frozen=True)
class PromptFileTasks:
    """Text-to-image and editing from files of prompts: txt, jsonl, json, csv, tsv, parquet, tars, or globs of them.

    Attributes:
        t2i_prompts: texts; no text-to-image when empty.
        edit_prompts: instructions with the pictures to edit; no editing when empty.
        t2i_held_out: texts that evaluations ask for; taken out of t2i_prompts when empty, together with their repeats.
        edit_held_out: instructions that evaluations ask for; taken out of edit_prompts when empty, together with all
            instructions for the same pictures.
        t2i_reward: MODULE:REWARD of text-to-image, such as my_rewards:geneval, or MODULE:CLASS=ARGUMENT; trained on in
            place of the run's rewards, which are not used then.
        edit_reward: that of editing.
        t2i_held_out_reward: the same kind of name; measures text-to-image in evaluations, and is never trained on.
        edit_held_out_reward: that of editing.
        image_root: folder that pictures' paths start from; each file's own when empty.
        image_size: height and width in pixels; sources are cropped in the middle and resized.
        edit_sources: pictures of an instruction, for models that take several; rows with another number are left out,
            and a judge has to take so many and the edited one in a request (pdtr judge serve --max-images).
        success: the reward's component that evaluations count as success; its total where it has none of the name.
        seed: of the choice of held-out prompts.
    """

    t2i_prompts: Path | None = None
    edit_prompts: Path | None = None
    t2i_held_out: Path | None = None
    edit_held_out: Path | None = None
    t2i_reward: str = ""
    edit_reward: str = ""
    t2i_held_out_reward: str = ""
    edit_held_out_reward: str = ""
    image_root: Path | None = None
    image_size: tuple[int, int] = (512, 512)
    edit_sources: int = 1
    success: str = "strict"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(*self.image_size, self.edit_sources) < 1 or self.seed < 0:
            raise ValueError(
                "expected image_size, edit_sources and seed of 1, 1 and 0 or more, got "
                f"{self.image_size}, {self.edit_sources} and {self.seed}"
            )

    def make_tasks(
        self, evaluation: EvaluationConfig, rewards: Mapping[str, Reward] | None = None, /
    ) -> dict[str, Task]:
        """See :class:`TaskSource`; a task without a file is left out.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: there is no file at all, a task has no reward or too few prompts, a file no good row, or a judge
                does not take so many pictures.
        """
        from pdtr.tasks import Task

        rewards = rewards or {}
        given = self._given(rewards)
        # A reward that cannot be had is said before files are read.
        chosen = {files.task: (self._trained(files, rewards), self._measured(files)) for files in given}
        self._check_judges(chosen.get("edit", ()))
        tasks = {}
        for files in given:
            name, (trained, measured) = files.task, chosen[files.task]
            tune, final, pool = self._prompts(files, evaluation)
            tasks[name] = Task(name, pool, trained, tune, final, self.image_size, self.success, measured)
        return tasks

    def _given(self, rewards: Mapping[str, Reward]) -> list[_Files]:
        """The tasks that have a file."""
        given = []
        if self.t2i_prompts is not None:
            names = (self.t2i_reward, self.t2i_held_out_reward)
            given.append(_Files("t2i", self.t2i_prompts, self.t2i_held_out, *names))
        if self.edit_prompts is not None:
            names = (self.edit_reward, self.edit_held_out_reward)
            given.append(_Files("edit", self.edit_prompts, self.edit_held_out, *names))
        if not given:
            raise ValueError("expected t2i_prompts, edit_prompts or both, got neither; name a file of prompts")
        known = sorted(files.task for files in given)
        unknown = sorted(set(rewards) - set(known))
        if unknown:
            raise ValueError(f"rewards: expected rewards for {known}, got one for {unknown[0]!r}")
        return given

    def _trained(self, files: _Files, rewards: Mapping[str, Reward]) -> Reward:
        """The reward that the task names, or else the run's."""
        from pdtr.named_reward import load_reward

        name = files.task
        if files.reward:
            if name in rewards:
                logger.warning(
                    "%s is trained on tasks.%s_reward, %s, and not on the run's rewards", name, name, files.reward
                )
            return load_reward(files.reward)
        if name not in rewards:
            raise ValueError(
                f"{name}_reward: expected a reward for {files.prompts}, got none; name one as MODULE:REWARD, or give "
                "the run rewards"
            )
        return rewards[name]

    def _measured(self, files: _Files) -> Reward | None:
        """The reward that measures a task; None where that is the one that it is trained on."""
        from pdtr.named_reward import load_reward

        if not files.held_out_reward or files.held_out_reward == files.reward:
            return None
        return load_reward(files.held_out_reward)

    def _check_judges(self, chosen: Sequence[Reward | None]) -> None:
        """Have the judges of edits show that they take as many pictures, where a request has more than were tried."""
        if self.edit_sources == 1:
            return
        from rewards.judges.check import judges_of, try_out

        for judge in (judge for reward in chosen if reward is not None for judge in judges_of(reward)):
            if "source" in judge.template.placeholders:
                try_out(judge, self.edit_sources)

    def _prompts(self, files: _Files, evaluation: EvaluationConfig) -> tuple[list[Prompt], list[Prompt], RecordPool]:
        """Held-out prompts for the curves and for the table, and the pool to train on."""
        num_tune, num_final = evaluation.num_prompts, evaluation.num_final_prompts
        pool = self._pool(files.task, files.prompts)
        if files.held_out is None:
            held_out, pool = pool.split(num_tune + num_final, self.seed)
        else:
            held_out = self._pool(files.task, files.held_out)
        prompts = held_out.first(num_tune + num_final)
        if len(prompts) < num_tune + num_final:
            raise ValueError(
                f"{files.held_out or files.prompts}: expected {num_tune} + {num_final} held-out prompts, got "
                f"{len(prompts)}; lower evaluation.num_prompts or evaluation.num_final_prompts"
            )
        return prompts[:num_tune], prompts[num_tune:], pool

    def _pool(self, task: str, path: Path) -> RecordPool:
        """The prompts of a file; what a source asks of every row is asked here."""
        from envs.data.prompts import OtherSourcesError, prompts_from_records
        from envs.data.records import RecordSet

        kind: Literal["t2i_prompt", "edit_prompt"] = "t2i_prompt" if task == "t2i" else "edit_prompt"
        count = self.edit_sources if task == "edit" else None
        records = RecordSet((str(path),), image_root=self.image_root)
        try:
            pool = prompts_from_records(records, kind, self.image_size, num_sources=count)
        except OtherSourcesError as error:
            fix = f"--tasks.edit-sources {error.found} takes those, or name another file"
            raise ValueError(f"{error}; {fix}") from error
        if pool.problems.num_bad:
            counts = f"{pool.problems.num_bad} of {pool.problems.num_rows} rows"
            logger.warning("%s: %s are left out; the first: %s", path, counts, pool.problems.first[0])
        return pool
