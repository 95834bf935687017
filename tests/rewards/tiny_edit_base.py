"""A tiny Qwen2.5-VL with random weights, for learnt edit rewards to start from."""

from __future__ import annotations

from pathlib import Path

from envs.scenes.pretraining import vocabulary
from rewards.edit_reward_inputs import EditInputs
from rewards.judges.tiny import TinyVLM, save_tiny_vlm, tiny_tokenizer

SHAPE = TinyVLM(width=32, num_layers=1, vision_width=32, vision_layers=1, patch_size=6, min_pixels=12 * 12)


def make_base(folder: Path) -> Path:
    """Write the checkpoint; -> its folder."""
    return save_tiny_vlm(folder, SHAPE, tiny_tokenizer(vocabulary()))


def base_inputs(folder: Path) -> EditInputs:
    """Its tokenizer and picture settings."""
    return EditInputs.load(make_base(folder))
