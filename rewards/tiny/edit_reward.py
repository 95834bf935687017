"""A learnt edit reward on a tiny Qwen2.5-VL, its head random and not trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rewards.edit_reward_inputs import EditInputs, EditTemplate
from rewards.edit_reward_model import load_model
from rewards.edit_reward_training import save_checkpoint
from rewards.judges.tiny import TinyVLM, save_tiny_vlm, tiny_tokenizer

SHAPE = TinyVLM(width=32, num_layers=1, vision_width=32, vision_layers=1, patch_size=6, min_pixels=12 * 12)


def make_tiny_edit_base(folder: Path, texts: Iterable[str] = ()) -> Path:
    """Write the Qwen2.5-VL that an edit reward starts from; -> the folder.

    Args:
        folder: made where it is missing.
        texts: whose words become single tokens.
    """
    return save_tiny_vlm(folder, SHAPE, tiny_tokenizer(texts))


def make_tiny_edit_reward(folder: Path, texts: Iterable[str] = (), seed: int = 0) -> Path:
    """Write a checkpoint that :class:`rewards.edit_reward.EditReward` loads; what it says means nothing.

    Args:
        folder: made where it is missing.
        texts: whose words become single tokens.
        seed: of the head.

    Returns:
        The folder.
    """
    with TemporaryDirectory() as made:
        base = make_tiny_edit_base(Path(made), texts)
        model = load_model(base)
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed))
        save_checkpoint(model, EditInputs.load(base, EditTemplate.load()), folder)
    return folder
