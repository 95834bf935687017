"""Z-Image at a tiny size: a whole pipeline of the published classes, about 3 MB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.policies.tiny.qwen_text import WIDTH, qwen_tokenizer, tiny_qwen3
from agents.policies.tiny.vae import tiny_flux1_vae
from agents.policies.tiny.weights import randomise, seeded

_WORDS = "user\nassistant\na photo of two red circles left of the blue square, make it green and remove one dog"


def make_tiny_z_image(folder: Path, seed: int = 0) -> Path:
    """Write a random ``ZImagePipeline``; -> the folder. Images are multiples of 16 pixels, as published."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    tokenizer = qwen_tokenizer([_WORDS])
    with seeded(seed):
        vae = tiny_flux1_vae()
    randomise(vae, seed)
    build: tuple[Any, ...] = (ZImagePipeline, FlowMatchEulerDiscreteScheduler)
    pipeline = build[0](
        # Z-Image-Turbo's shift.
        scheduler=build[1](shift=3.0),
        vae=vae,
        text_encoder=tiny_qwen3(tokenizer, seed),
        tokenizer=tokenizer,
        transformer=_transformer(seed),
    )
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return folder


def _transformer(seed: int) -> Any:
    from diffusers import ZImageTransformer2DModel

    build: Any = ZImageTransformer2DModel
    with seeded(seed):
        transformer = build(
            in_channels=16,
            dim=WIDTH,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[640, 64, 64],
        )
    randomise(transformer, seed)
    return transformer
