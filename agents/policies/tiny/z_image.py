"""Z-Image at a tiny size: a whole pipeline of the published classes, about 3 MB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.policies.tiny.qwen_text import WIDTH, qwen_tokenizer, seeded, tiny_qwen3
from agents.policies.tiny.weights import randomise

_WORDS = "user\nassistant\na photo of two red circles left of the blue square, make it green and remove one dog"


def make_tiny_z_image(folder: Path, seed: int = 0) -> Path:
    """Write a random ``ZImagePipeline``; -> the folder. Images are multiples of 16 pixels, as published."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    tokenizer = qwen_tokenizer([_WORDS])
    build: tuple[Any, ...] = (ZImagePipeline, FlowMatchEulerDiscreteScheduler)
    pipeline = build[0](
        # Z-Image-Turbo's shift.
        scheduler=build[1](shift=3.0),
        vae=_vae(seed),
        text_encoder=tiny_qwen3(tokenizer, seed),
        tokenizer=tokenizer,
        transformer=_transformer(seed),
    )
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return folder


def _vae(seed: int) -> Any:
    """The published VAE's scale, channels and compression on narrow layers."""
    from diffusers import AutoencoderKL

    build: Any = AutoencoderKL
    vae = seeded(
        seed,
        lambda: build(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    )
    randomise(vae, seed)
    return vae


def _transformer(seed: int) -> Any:
    from diffusers import ZImageTransformer2DModel

    build: Any = ZImageTransformer2DModel
    transformer = seeded(
        seed,
        lambda: build(
            in_channels=16,
            dim=WIDTH,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[640, 64, 64],
        ),
    )
    randomise(transformer, seed)
    return transformer
