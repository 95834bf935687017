"""A CLIP of the real class with random weights, small enough to be made and saved in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig, PreTrainedModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE = 32
"""Side in pixels of what the vision tower sees."""
CONTEXT = 24
"""Tokens of a text."""


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
    """A configuration whose features have ``dim`` dimensions."""
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(clip_config(dim))
    randomised(model)
    model.save_pretrained(folder)
    if with_processor:
        save_clip_processor(folder)
    return model


def save_clip_processor(folder: Path) -> None:
    """The tokenizer and the image processor alone."""
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
