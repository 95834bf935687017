"""A whole StableDiffusion3Pipeline of some 0.2 million random parameters, saved as the published ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from agents.policies.backbone import BackboneSettings
from agents.policies.sd3 import SD3Policy
from agents.policies.tiny.text import clip_config, tiny_t5
from agents.policies.tiny.tokenizers import clip_tokenizer, t5_tokenizer
from agents.policies.tiny.vae import tiny_vae
from agents.policies.tiny.weights import randomise, seeded

_WIDTH = 32


def make_tiny_sd3(folder: Path, seed: int = 0) -> Path:
    """Write a tiny SD3.5 in diffusers' layout: for trial runs and tests, its images are noise.

    Its parts are of the published classes and in the published proportions where those matter: a dual-attention block
    and one without, RMS-normed queries and keys, a VAE with 16 channels and an eighth of the pixels' size, two CLIPs
    whose widths add up to less than T5's, static shift 3. It draws up to 256 pixels a side, and 64 where nothing else
    is said: settings lie beside it. What it draws depends on the text, the source and the noise, colours included.

    Args:
        folder: where the pipeline goes.
        seed: of the weights; the global generator is left as it was.

    Returns:
        The folder.
    """
    import diffusers

    library: Any = diffusers
    parts: dict[str, Any] = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer()}
    parts["tokenizer_3"] = t5_tokenizer()
    with seeded(seed):
        parts["transformer"] = library.SD3Transformer2DModel(**_transformer_config())
        parts["vae"] = tiny_vae(1.5305, 0.0609, widths=(8, 8, 16, 16), norm_num_groups=1)
        parts["text_encoder"] = _clip(parts["tokenizer"], width=8)
        parts["text_encoder_2"] = _clip(parts["tokenizer_2"], width=16)
        parts["text_encoder_3"] = tiny_t5(parts["tokenizer_3"], _WIDTH, num_heads=4)
    for index, module in enumerate(part for part in parts.values() if isinstance(part, nn.Module)):
        randomise(module, seed + index, 1.0)
    scheduler = library.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = library.StableDiffusion3Pipeline(**parts, scheduler=scheduler)
    SD3Policy(pipeline, BackboneSettings(64, 64, dtype="float32", max_sequence_length=32)).save(folder)
    return folder


def _clip(tokenizer: Any, width: int) -> Any:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(clip_config(tokenizer, width))


def _transformer_config() -> dict[str, Any]:
    return {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": _WIDTH // 2,
        "joint_attention_dim": _WIDTH,
        "caption_projection_dim": _WIDTH,
        "pooled_projection_dim": 8 + 16,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
