"""The embedded world as prompts: endless pools for training and numbered sets for evaluation.

Every prompt follows from its own integers alone, so that a set is the same on every machine and the first n of a set
are the set of n. Metadata is plain JSON: the grammar's, and ``difficulty`` in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, get_args

import numpy as np

from envs.scenes.edits import DIFFICULTY, EDIT_SKILLS, EditTask, sample_edit
from envs.scenes.grammar import SKILLS, Split, sample_task
from envs.scenes.render import render
from envs.scenes.world import Scene
from rewards.base import Prompt

TASKS = ("t2i", "edit")
_SPLITS: tuple[Split, ...] = get_args(Split)
_SEED_SPACE = 2**63
_SLACK = 1e-9
# Draws without a prompt of the asked difficulty after which there is none: the rarest is one in eighteen.
_MAX_MISSES = 2000


@dataclass(frozen=True)
class ScenesPool:
    """An endless pool of one task and split; a ``PromptPool``.

    A prompt's id names the task, the split, the skill and the seed that it was drawn from.

    Args:
        task: ``"t2i"`` or ``"edit"``.
        split: ``"train"`` or ``"held_out"``.

    Raises:
        ValueError: an unknown task or split.
    """

    task: str
    split: Split = "train"

    def __post_init__(self) -> None:
        _check_name("task", self.task, TASKS)
        _check_name("split", self.split, _SPLITS)

    def draw(self, rng: np.random.Generator, count: int, difficulty: tuple[float, float] = (0.0, 1.0)) -> list[Prompt]:
        """Draw ``count`` prompts, skills uniformly, whose difficulty lies in the closed range.

        Raises:
            ValueError: no prompt has such a difficulty.
        """
        low, high = difficulty[0] - _SLACK, difficulty[1] + _SLACK
        skills = SKILLS if self.task == "t2i" else [s for s in EDIT_SKILLS if low <= DIFFICULTY[s] <= high]
        drafts: list[_Draft] = []
        misses = 0
        while len(drafts) < count:
            if not skills or misses > _MAX_MISSES:
                raise ValueError(f"difficulty: expected a range that some {self.task} prompt is in, got {difficulty}")
            skill = skills[int(rng.integers(len(skills)))]
            number = int(rng.integers(_SEED_SPACE))
            name = f"{self.task}/{self.split}/{skill}/{number:016x}"
            draft = _draft(np.random.default_rng(number), self.task, self.split, skill, name)
            fits = low <= draft.prompt.metadata["difficulty"] <= high
            drafts += [draft] if fits else []
            misses = 0 if fits else misses + 1
        return _finish(drafts)


def t2i_prompts(split: Split, count: int, seed: int) -> list[Prompt]:
    """``count`` text-to-image prompts of a split, the six skills in turn, with ids such as ``t2i/held_out/7/00012``."""
    return _numbered("t2i", split, count, seed)


def edit_prompts(split: Split, count: int, seed: int) -> list[Prompt]:
    """``count`` edit prompts of a split, the six skills in turn, with their rendered sources; ids as for t2i."""
    return _numbered("edit", split, count, seed)


@dataclass(frozen=True)
class _Draft:
    """A prompt whose source is not rendered yet: rendering a batch at once is several times faster."""

    prompt: Prompt
    source: Scene | None


def _numbered(task: str, split: Split, count: int, seed: int) -> list[Prompt]:
    _check_name("split", split, _SPLITS)
    if count < 0 or seed < 0:
        raise ValueError(f"count, seed: expected integers of at least 0, got {count} and {seed}")
    skills = SKILLS if task == "t2i" else EDIT_SKILLS
    stream = (TASKS.index(task), _SPLITS.index(split))
    drafts = [
        _draft(
            np.random.default_rng((seed, index, *stream)),
            task,
            split,
            skills[index % len(skills)],
            f"{task}/{split}/{seed}/{index:05d}",
        )
        for index in range(count)
    ]
    return _finish(drafts)


def _draft(rng: np.random.Generator, task: str, split: Split, skill: str, name: str) -> _Draft:
    drawn = sample_task(rng, split, skill) if task == "t2i" else sample_edit(rng, split, skill)
    # The text is the prompt's own; files keep it under the key "prompt".
    metadata: dict[str, Any] = {key: value for key, value in drawn.metadata.items() if key != "prompt"}
    # Steps of a tenth are added up in binary: 0.6000000000000001 is no number to show.
    metadata["difficulty"] = round(drawn.difficulty, 6)
    prompt = Prompt(drawn.text, (), metadata, name)
    return _Draft(prompt, drawn.source if isinstance(drawn, EditTask) else None)


def _finish(drafts: Sequence[_Draft]) -> list[Prompt]:
    scenes = [draft.source for draft in drafts if draft.source is not None]
    if not scenes:
        return [draft.prompt for draft in drafts]
    pictures = render(scenes)
    return [replace(draft.prompt, source_images=(picture,)) for draft, picture in zip(drafts, pictures, strict=True)]


def _check_name(what: str, name: object, names: Sequence[str]) -> None:
    if name not in names:
        nearest = get_close_matches(str(name), names, 1, cutoff=0)[0]
        raise ValueError(f"{what}: expected one of {', '.join(names)}, got {name!r}; did you mean {nearest!r}?")
