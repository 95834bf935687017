"""Checkpoints of the real classes with random weights, small enough to be made and saved in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewards.base import Images, Prompt

SIDE = 32
CONTEXT = 24


def pictures(count: int = 3, side: int = 40, seed: int = 0) -> Images:
    """Random images whose colours differ from one to the next."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (count, 1, 1, 3))
    return np.clip(base + rng.integers(-60, 61, (count, side, side, 3)), 0, 255).astype(np.uint8)


def written(*lines: str, side: int = 256, size: int = 36) -> Images:
    """Lines of black text on white, as a user's printer would set them."""
    canvas = Image.new("RGB", (side, side), "white")
    for index, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((16, 20 + 70 * index), line, fill="black", font=ImageFont.load_default(size=size))
    return np.asarray(canvas)


PROMPTS = [Prompt("a red cat"), Prompt("two blue dogs"), Prompt("a photo of a bench")]


def randomised(model: PreTrainedModel | torch.nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Weights large enough that outputs differ between inputs; freshly made models hardly look at them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        width = parameter.shape[-1] if parameter.ndim else 1
        parameter.data += scale * torch.randn(parameter.shape, generator=generator) / width**0.5
    model.eval()


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer without merges: one token a byte."""
    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={entry: index for index, entry in enumerate(entries)}, merges=[], model_max_length=CONTEXT
    )


def clip_config(dim: int = 16) -> CLIPConfig:
    vocabulary = len(clip_tokenizer())
    text = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, projection_dim=dim, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=8, projection_dim=dim,
    )  # fmt: skip
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=dim)


def save_clip(folder: Path, dim: int = 16, with_processor: bool = True) -> CLIPModel:
    """A CLIPModel as it lies on the hub: weights, configuration, tokenizer, image processor."""
    model = CLIPModel(clip_config(dim))
    randomised(model)
    model.save_pretrained(folder)
    if with_processor:
        save_clip_processor(folder)
    return model


def save_clip_processor(folder: Path) -> None:
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )


def bert_tokenizer() -> BertTokenizer:
    """BERT's own tokenizer over letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'\""
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={entry: index for index, entry in enumerate(entries)})


def head_tensors(width: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """LAION's head, and ImageReward's, by the names of the published files."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    tensors = {}
    for layer, (below, above) in sizes.items():
        tensors[f"layers.{layer}.weight"] = torch.randn(above, below, generator=generator) / below**0.5
        tensors[f"layers.{layer}.bias"] = torch.randn(above, generator=generator)
    return tensors
