"""FLUX.1-dev, FLUX.1-Kontext and FLUX.2-klein at a tiny size: whole pipelines of the same classes, random weights.

What their configurations say of shape is kept (an eightfold VAE of 16 and 32 channels, Qwen3's layers 9, 18 and 27,
schedules that shift with the resolution); widths and the depths of the transformers are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.policies.tiny.qwen_text import qwen_tokenizer
from agents.policies.tiny.text import clip_config, tiny_t5
from agents.policies.tiny.tokenizers import SENTENCES, clip_tokenizer, t5_tokenizer
from agents.policies.tiny.vae import tiny_flux1_vae, tiny_flux2_vae
from agents.policies.tiny.weights import seeded

WIDTH = 32
"""Of the transformers and of FLUX.1's text encoders."""
QWEN_WIDTH, QWEN_LAYERS = 16, 28
"""One layer more than the last that is read, since the states after the last of all are normalised."""


def make_tiny_flux(folder: Path, seed: int = 0) -> Path:
    """Write a tiny FLUX.1-dev to a folder that ``FluxPipeline`` loads; -> the folder."""
    with seeded(seed):
        _diffusers().FluxPipeline(**_flux1_parts()).save_pretrained(str(folder))
    return folder


def make_tiny_flux_kontext(folder: Path, seed: int = 0) -> Path:
    """Write a tiny FLUX.1-Kontext to a folder that ``FluxKontextPipeline`` loads; -> the folder."""
    with seeded(seed):
        _diffusers().FluxKontextPipeline(**_flux1_parts()).save_pretrained(str(folder))
    return folder


def make_tiny_flux2_klein(folder: Path, seed: int = 0, is_distilled: bool = False) -> Path:
    """Write a tiny FLUX.2-klein to a folder that ``Flux2KleinPipeline`` loads.

    Args:
        folder: where.
        seed: of the weights.
        is_distilled: as the step-distilled checkpoints are, which take no guidance.

    Returns:
        The folder.
    """
    with seeded(seed):
        tokenizer = qwen_tokenizer(SENTENCES, ("<think>", "</think>"))
        transformer = _diffusers().Flux2Transformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=WIDTH // 2,
            num_attention_heads=2,
            joint_attention_dim=3 * QWEN_WIDTH,
            timestep_guidance_channels=WIDTH,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        _diffusers().Flux2KleinPipeline(
            scheduler=_scheduler(),
            vae=tiny_flux2_vae(),
            text_encoder=_qwen(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer,
            is_distilled=is_distilled,
        ).save_pretrained(str(folder))
    return folder


def _diffusers() -> Any:
    """Imported where it is used, and untyped."""
    import diffusers

    return diffusers


def _flux1_parts() -> dict[str, Any]:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    vae = tiny_flux1_vae()
    transformer = _diffusers().FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return {
        "scheduler": _scheduler(),
        "vae": vae,
        "text_encoder": _clip(clip),
        "tokenizer": clip,
        "text_encoder_2": tiny_t5(t5, WIDTH, num_heads=2),
        "tokenizer_2": t5,
        "transformer": transformer,
    }


def _scheduler() -> Any:
    """The published configuration of all three."""
    return _diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _clip(tokenizer: Any) -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel(clip_config(tokenizer, WIDTH))


def _qwen(tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=QWEN_WIDTH,
        intermediate_size=2 * QWEN_WIDTH,
        num_hidden_layers=QWEN_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=QWEN_WIDTH // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # At the usual 0.02 so small a model hardly tells one text from another.
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config)
