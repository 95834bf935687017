"""A whole StableDiffusion3Pipeline of some 0.2 million random parameters, saved as the published ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.policies.backbone import BackboneSettings
from agents.policies.sd3 import SD3Policy
from agents.policies.tiny.text import clip_config
from agents.policies.tiny.tokenizers import clip_tokenizer, t5_tokenizer
from agents.policies.tiny.weights import randomise

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts["transformer"] = library.SD3Transformer2DModel(**_transformer_config())
        parts["vae"] = tiny_vae()
        parts["text_encoder"] = _clip(parts["tokenizer"], width=8)
        parts["text_encoder_2"] = _clip(parts["tokenizer_2"], width=16)
        parts["text_encoder_3"] = tiny_t5(parts["tokenizer_3"], _WIDTH)
    for index, module in enumerate(part for part in parts.values() if isinstance(part, nn.Module)):
        randomise(module, seed + index, 1.0)
    scheduler = library.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = library.StableDiffusion3Pipeline(**parts, scheduler=scheduler)
    SD3Policy(pipeline, BackboneSettings(64, 64, dtype="float32", max_sequence_length=32)).save(folder)
    return folder


def tiny_vae() -> Any:
    """SD3's AutoencoderKL: 16 channels, an eighth of the pixels' size, its shift and scaling."""
    import diffusers

    library: Any = diffusers
    return library.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_t5(tokenizer: Any, width: int) -> Any:
    """A T5 encoder with gated GELUs, as version 1.1's."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


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
