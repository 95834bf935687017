"""Tasks of published runs: files of prompts at agreed places, and what to do where one is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pdtr.task_source import PromptFileTasks

if TYPE_CHECKING:
    from envs.data.prompts import RecordPool
    from pdtr.config import EvaluationConfig
    from pdtr.tasks import Task
    from rewards.base import Prompt, Reward

_EDITS = "rows of {prompt, image} as Edit-R1's train_metadata.jsonl has them (docs/data.md), or any file of edits"
# Of rows that cannot be used, so many are named.
_MOST_NAMED = 5
_FLOW_GRPO = "copy Flow-GRPO's file (github.com/yifan123/flow_grpo, dataset/{name}) to it"


@dataclass(frozen=True)
class PublishedTasks(PromptFileTasks):
    """:class:`pdtr.task_source.PromptFileTasks` that says of a missing file how to get it."""

    how: ClassVar[Mapping[str, str]] = {"edit": f"put there {_EDITS}"}
    """How to get the prompts of a task."""

    def make_tasks(
        self, evaluation: EvaluationConfig, rewards: Mapping[str, Reward] | None = None, /
    ) -> dict[str, Task]:
        """See :class:`pdtr.task_source.PromptFileTasks`.

        Raises:
            ValueError: a file is not there; how to get it is said.
        """
        for task in ("edit", "t2i"):
            for field in (f"{task}_prompts", f"{task}_held_out"):
                path: Path | None = getattr(self, field)
                # A pattern of several files is left to whoever reads them.
                if path is not None and not any(mark in str(path) for mark in "*?[") and not path.exists():
                    raise ValueError(
                        f"tasks.{field}: expected a file of prompts at {path}, found none; {self.how[task]}, or name "
                        f"another: --tasks.{field.replace('_', '-')} FILE"
                    )
        return super().make_tasks(evaluation, rewards)


@dataclass(frozen=True)
class GenEvalTasks(PublishedTasks):
    """Text-to-image from prompts of GenEval's form, and editing where it has a file."""

    how: ClassVar[Mapping[str, str]] = {
        **PublishedTasks.how,
        "t2i": "write it with: pdtr prompts geneval --output FILE --without GENEVALS_TEST_FILE",
    }


@dataclass(frozen=True)
class OCRTasks(PublishedTasks):
    """Text-to-image from prompts with a text to render in straight quotation marks; others are refused at load."""

    how: ClassVar[Mapping[str, str]] = {**PublishedTasks.how, "t2i": _FLOW_GRPO.format(name="ocr")}

    def _pool(self, task: str, path: Path) -> RecordPool:
        """The prompts of a file; unless ``t2i_reward`` names another reward, each has to name a text.

        Raises:
            ValueError: a prompt has no text to render; the file, the rows and what to write are said.
        """
        pool = super()._pool(task, path)
        if task == "t2i" and not self.t2i_reward:
            _check_targets(path, pool.first(len(pool)))
        return pool


@dataclass(frozen=True)
class PickScoreTasks(PublishedTasks):
    """Text-to-image from captions of Pick-a-Pic."""

    how: ClassVar[Mapping[str, str]] = {**PublishedTasks.how, "t2i": _FLOW_GRPO.format(name="pickscore")}


def _check_targets(path: Path, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts of which the OCR reward would say nothing: with them whole groups would have no reward.

    Raises:
        ValueError: a prompt has no text to render.
    """
    from rewards.ocr import Unread, ocr_target

    refused: list[tuple[str, Unread]] = []
    for prompt in prompts:
        try:
            ocr_target(prompt.text)
        except Unread as unread:
            refused.append((prompt.id, unread))
    if not refused:
        return
    refused.sort(key=lambda row: row[0])
    named = ", ".join(name for name, _ in refused[:_MOST_NAMED]) + ", ..." * (len(refused) > _MOST_NAMED)
    raise ValueError(
        f"{path}: expected a text to render in every prompt, got none in {len(refused)} of {len(prompts)}; correct or "
        f"remove rows {named} (counted from 0, or a row's own id); the first: {refused[0][1]}"
    )
