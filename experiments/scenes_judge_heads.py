"""A new judge: random weights, but for heads of the first layer that look from one picture to the other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from envs.scenes.world import CANVAS
from rewards.judges.tiny import tiny_model

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from experiments.scenes_judge_model import JudgeInputs

# Scores are q k / sqrt(32): so much a rotary frequency, and the wanted token has most of the attention.
_SHARPNESS = 3.0


def new_judge(inputs: JudgeInputs) -> Qwen2_5_VLForConditionalGeneration:
    """A judge with random weights that looks from one picture to the other, see :func:`look_across`."""
    model = tiny_model(inputs.shape, inputs.tokenizer)
    look_across(model, inputs)
    return model


def look_across(model: Qwen2_5_VLForConditionalGeneration, inputs: JudgeInputs) -> None:
    """Let heads of the first layer look, from the start, at the same place of the picture before, and one and two back.

    A rotary position turns the biases of queries and keys, so that ``q_i k_j`` of a head peaks where j is d before i
    if the query's bias is the key's turned by d: ``sum_f a cos(f (i - j - d))``. A tiny model finds by itself only
    slowly that two pictures are to be compared place by place; training is free to change all of it.
    """
    text: Any = model.config.text_config
    head = text.hidden_size // text.num_attention_heads
    frequencies = text.rope_parameters["rope_theta"] ** -(torch.arange(head // 2) * 2 / head)
    offsets = [_picture_offset(model, inputs), 1, 2][: text.num_attention_heads]
    layer = model.model.language_model.layers[0].self_attn
    size = math.sqrt(_SHARPNESS * math.sqrt(head))
    with torch.no_grad():
        for index, offset in enumerate(offsets):
            rows = slice(index * head, (index + 1) * head)
            turned = offset * frequencies
            # Pairs of a rotary embedding are (f, f + head / 2).
            layer.k_proj.bias[rows] = size * torch.cat([torch.cos(turned), torch.sin(turned)])
            layer.q_proj.bias[rows] = size * torch.cat([torch.ones_like(turned), torch.zeros_like(turned)])
            for projection in (layer.q_proj, layer.k_proj):
                projection.weight[rows] *= 0.1


def _picture_offset(model: Qwen2_5_VLForConditionalGeneration, inputs: JudgeInputs) -> int:
    """How far, in positions, the second picture is behind the first one."""
    blank = np.zeros((CANVAS, CANVAS, 3), np.uint8)
    batch = inputs(["a"], [blank], [blank])
    positions: Any = model.model.get_rope_index(
        input_ids=batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )[0]
    places = positions[:, 0, batch["mm_token_type_ids"][0] == 1]  # [3, 2 G G]: time, row, column
    count = places.shape[1] // 2
    return int(places[1, count] - places[1, 0])
