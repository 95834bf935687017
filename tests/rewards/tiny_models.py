"""Pictures, prompts, and what tests of scorers need beside ``rewards.tiny``."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import BertTokenizer

from rewards.base import Images, Prompt


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
