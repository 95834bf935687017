"""A tiny vision-language model of Qwen2.5-VL's class that reads the embedded world: what an edit reward starts from.

A real edit reward starts from a model that has seen the world (Qwen2.5-VL-7B). This one is given what that has by a
short training on pictures of the renderer, see ``experiments.edit_reward_pretraining``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.edit_reward_inputs import (
    IMAGE_PAD,
    VISION_END,
    VISION_START,
    EditInputs,
    EditTemplate,
    ImageSettings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig

    from rewards.edit_reward_model import EditRewardModel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE_PAD, "<|video_pad|>")
UNKNOWN = "<|unknown|>"
_MERGE = _FRAMES = 2
_TEMPLATE = "edit_reward_frames.v1"


@dataclass(frozen=True)
class TinyConfig:
    """Make a tiny Qwen2.5-VL that reads the embedded world, for an edit reward to start from.

    Attributes:
        output_dir: folder of the checkpoint.
        width: of the language model.
        num_layers: of the language model.
        vision_width: of the vision tower.
        vision_layers: of the vision tower.
        patch_size: side of a patch in pixels; two by two are one token, so 48 has to be a multiple of twice as much.
        vision_steps: of the vision tower alone; 0 leaves it random.
        num_steps: of the whole model, on edits; 0 leaves it random.
        batch_size: edits of a step, and half of its pictures in the vision tower's own.
        learning_rate: peak, of Muon for the matrices.
        other_learning_rate: peak, of AdamW for embeddings, norms and biases.
        seed: of weights and data.
        num_threads: torch threads.
    """

    output_dir: Path = Path("runs/edit_reward/base")
    width: int = 128
    num_layers: int = 4
    vision_width: int = 64
    vision_layers: int = 3
    patch_size: int = 6
    vision_steps: int = 400
    num_steps: int = 1200
    batch_size: int = 48
    learning_rate: float = 8e-3
    other_learning_rate: float = 2e-3
    seed: int = 0
    num_threads: int = 1

    def __post_init__(self) -> None:
        if self.width % 32 or self.vision_width % 32:
            raise ValueError(f"width and vision_width: expected multiples of 32, got {self.width}, {self.vision_width}")
        if self.num_steps < 0 or self.vision_steps < 0 or self.batch_size < 2:
            raise ValueError("vision_steps, num_steps and batch_size: expected at least 0, 0 and 2")


def tiny_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerBase:
    """A tokenizer of whole words, lower case, with Qwen2-VL's special tokens; other words are one unknown token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, UNKNOWN, *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    build: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerBase = build(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=list(SPECIAL[1:]),
    )
    return made


def tiny_config(config: TinyConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    """The configuration of a tiny Qwen2.5-VL.

    The rotary base is 4 where Qwen has a million: the cells of a grid of four by four are told apart by fast rotations
    only.
    """
    from transformers import Qwen2_5_VLConfig

    head = 32
    ids: Any = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.width,
        "intermediate_size": 2 * config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.width // head,
        "num_key_value_heads": config.width // head,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 4.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids(SPECIAL[0]),
        "eos_token_id": ids(SPECIAL[2]),
        "pad_token_id": ids(SPECIAL[0]),
    }
    vision = {
        "depth": config.vision_layers,
        "hidden_size": config.vision_width,
        "intermediate_size": 2 * config.vision_width,
        "num_heads": config.vision_width // head,
        "patch_size": config.patch_size,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": _FRAMES,
        "window_size": 1024,
        "fullatt_block_indexes": list(range(config.vision_layers)),
        "out_hidden_size": config.width,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids(IMAGE_PAD),
        video_token_id=ids(SPECIAL[-1]),
        vision_start_token_id=ids(VISION_START),
        vision_end_token_id=ids(VISION_END),
        tie_word_embeddings=False,
    )


def tiny_inputs(config: TinyConfig) -> EditInputs:
    """The tiny model's tokenizer and picture settings."""
    from envs.scenes.pretraining import vocabulary

    template = EditTemplate.load(_TEMPLATE)
    framing = [word.strip(":,").lower() for part in template.parts[::2] for word in part.split() if "<" not in word]
    words = [*vocabulary(), *framing, ":", "user", "assistant"]
    half = (0.5, 0.5, 0.5)
    settings = ImageSettings(config.patch_size, _MERGE, _FRAMES, (_MERGE * config.patch_size) ** 2, 48 * 48, half, half)
    return EditInputs(tiny_tokenizer(words), settings, template)


def save_base(model: EditRewardModel, inputs: EditInputs, folder: Path) -> None:
    """Write a checkpoint as any other Qwen2.5-VL has it: weights, tokenizer, picture settings."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.edit_reward_template = inputs.template.name
    model.save_pretrained(str(folder))
    inputs.tokenizer.save_pretrained(str(folder))
    inputs.settings.save(folder)


def make_base(config: TinyConfig, say: Callable[[str], None] = print) -> Path:
    """Make, pre-train and save the tiny model; -> its folder."""
    import torch

    from experiments.edit_reward_pretraining import train_edits, train_vision
    from rewards.edit_reward_model import EditRewardModel

    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    inputs = tiny_inputs(config)
    model = EditRewardModel(tiny_config(config, inputs.tokenizer)).train()
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")
    for train in (train_vision, train_edits):
        train(model, inputs, config, say)
        save_base(model, inputs, config.output_dir)
    return config.output_dir
