"""A tiny Qwen2.5-VL with random weights, for learnt edit rewards to start from."""

from __future__ import annotations

from pathlib import Path

from envs.scenes.pretraining import vocabulary
from rewards.edit_reward_inputs import EditInputs
from rewards.tiny.edit_reward import make_tiny_edit_base


def make_base(folder: Path) -> Path:
    """Write the checkpoint, its words those of the embedded world; -> its folder."""
    return make_tiny_edit_base(folder, vocabulary())


def base_inputs(folder: Path) -> EditInputs:
    """Its tokenizer and picture settings."""
    return EditInputs.load(make_base(folder))
