"""Qwen-Image and its editing models at a tiny size: whole pipelines of the published classes, about 1 MB each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.policies.tiny.qwen_text import WIDTH, qwen_tokenizer, tiny_qwen_vl, tiny_qwen_vl_processor
from agents.policies.tiny.weights import randomise, seeded

_WORDS = "Picture 1: 2: 3: a photo of two red circles left of the blue square, make it green and remove one dog"


def make_tiny_qwen_image(folder: Path, seed: int = 0) -> Path:
    """Write a random ``QwenImagePipeline``; -> the folder. Images are multiples of 16 pixels, as published."""
    from diffusers import QwenImagePipeline

    return _write(QwenImagePipeline, folder, seed)


def make_tiny_qwen_image_edit(folder: Path, seed: int = 0) -> Path:
    """Write a random ``QwenImageEditPipeline``; -> the folder."""
    from diffusers import QwenImageEditPipeline

    return _write(QwenImageEditPipeline, folder, seed)


def make_tiny_qwen_image_edit_plus(folder: Path, seed: int = 0, zero_cond_t: bool = False) -> Path:
    """Write a random ``QwenImageEditPlusPipeline``; -> the folder.

    Args:
        folder: made where it is missing.
        seed: of the weights.
        zero_cond_t: sources are modulated as of time 0, as in Qwen-Image-Edit-2511.
    """
    from diffusers import QwenImageEditPlusPipeline

    return _write(QwenImageEditPlusPipeline, folder, seed, zero_cond_t=zero_cond_t)


def _write(pipeline_class: Any, folder: Path, seed: int, zero_cond_t: bool = False) -> Path:
    tokenizer = qwen_tokenizer([*_templates(), _WORDS])
    parts = {
        "scheduler": _scheduler(),
        "vae": _vae(seed),
        "text_encoder": tiny_qwen_vl(tokenizer, seed),
        "tokenizer": tokenizer,
        "transformer": _transformer(seed, zero_cond_t),
    }
    if pipeline_class.__name__ != "QwenImagePipeline":
        parts["processor"] = tiny_qwen_vl_processor(tokenizer)
    pipeline_class(**parts).save_pretrained(str(folder), safe_serialization=True)
    return folder


def _templates() -> list[str]:
    """The prompts that the pipelines wrap around a user's; each knows its own, whatever its parts."""
    from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline

    names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    parts: dict[str, Any] = dict.fromkeys(names)
    classes: tuple[Any, ...] = (QwenImagePipeline, QwenImageEditPlusPipeline)
    extras: tuple[dict[str, Any], ...] = ({}, {"processor": None})
    return [str(build(**parts, **extra).prompt_template_encode) for build, extra in zip(classes, extras, strict=True)]


def _scheduler() -> Any:
    """Qwen-Image's own."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    build: Any = FlowMatchEulerDiscreteScheduler
    return build(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def _vae(seed: int) -> Any:
    """The published VAE's statistics, channels and compression on narrow layers."""
    from diffusers import AutoencoderKLQwenImage

    build: Any = AutoencoderKLQwenImage
    with seeded(seed):
        vae = build(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    randomise(vae, seed)
    return vae


def _transformer(seed: int, zero_cond_t: bool) -> Any:
    from diffusers import QwenImageTransformer2DModel

    build: Any = QwenImageTransformer2DModel
    with seeded(seed):
        transformer = build(
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        )
    randomise(transformer, seed)
    return transformer
