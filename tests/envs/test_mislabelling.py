"""Mislabelled pairs: the picture is another one's, and no held-out instruction is worded."""

from __future__ import annotations

import numpy as np
import pytest

from envs.scenes.edits import instruction, operation_combination, sample_edit, split_operations
from envs.scenes.grammar import SKILLS, sample_task, scene_for
from envs.scenes.mislabelling import wrong_metadata, wrong_operations
from envs.scenes.pretraining import supervised_batch
from envs.scenes.render import render
from envs.scenes.rewards import edit_reward, t2i_reward
from envs.scenes.world import COLORS, SHAPES
from rewards.base import Prompt


@pytest.mark.parametrize("skill", SKILLS)
def test_a_wrong_picture_is_not_what_the_prompt_asks_for(skill: str) -> None:
    rng = np.random.default_rng(0)
    tasks = [sample_task(rng, "train", skill) for _ in range(60)]
    images = render([scene_for(rng, wrong_metadata(rng, task.metadata)) for task in tasks])
    prompts = [Prompt(task.text, (), task.metadata) for task in tasks]
    assert t2i_reward(images, prompts).components["strict"].max() == 0


def test_metadata_is_left_as_it_was() -> None:
    metadata = sample_task(np.random.default_rng(0), "train", "position").metadata
    before = repr(metadata)
    assert wrong_metadata(np.random.default_rng(1), metadata) != metadata
    assert repr(metadata) == before


def test_a_wrong_instruction_is_not_what_was_done() -> None:
    rng = np.random.default_rng(0)
    edits = [sample_edit(rng) for _ in range(300)]
    wrong = [wrong_operations(rng, edit.metadata["ops"], edit.source) for edit in edits]
    sources = render([edit.source for edit in edits])
    prompts = [
        Prompt(instruction(rng, ops, edit.source), (source,), {**edit.metadata, "ops": ops})
        for edit, ops, source in zip(edits, wrong, sources, strict=True)
    ]
    strict = edit_reward(render([edit.target for edit in edits]), prompts).components["strict"]
    # What was moved to the left may be at the top as well, and a few changes find nothing that is not held out.
    assert np.nanmean(strict) < 0.1
    for edit, operations in zip(edits, wrong, strict=True):
        for operation in operations:
            assert operation_combination(operation, edit.source) in split_operations(operation["op"])["train"]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_their_share_among_supervised_pairs(share: float) -> None:
    """Counted by what words and pictures have in common: a colour that is named is in the picture, or it is wrong."""
    rng = np.random.default_rng(3)
    batch = supervised_batch("t2i", rng, 600, mislabelled=share)
    prompts = [Prompt(text, (), {"tag": "colors", "include": [_only(text)]}) for text in batch.texts if _is_plain(text)]
    images = batch.targets[[_is_plain(text) for text in batch.texts]]
    assert len(prompts) > 25
    right = t2i_reward(images, prompts).components["strict"].mean()
    assert abs(1 - right - share) < 0.2


def _is_plain(text: str) -> bool:
    """Whether a prompt asks for one coloured shape and nothing else."""
    words = text.split()
    return sum(word in SHAPES for word in words) == 1 and sum(word in COLORS for word in words) == 1


def _only(text: str) -> dict[str, object]:
    words = text.split()
    return {
        "class": next(word for word in words if word in SHAPES),
        "count": 1,
        "color": next(word for word in words if word in COLORS),
    }
