"""FLUX.1-dev, FLUX.1-Kontext and FLUX.2-klein at a tiny size: whole pipelines of the same classes, random weights.

What their configurations say of shape is kept (an eightfold VAE of 16 and 32 channels, Qwen3's layers 9, 18 and 27,
schedules that shift with the resolution); widths and the depths of the transformers are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from agents.policies.tiny.text import clip_config
from agents.policies.tiny.tokenizers import SENTENCES, clip_tokenizer, t5_tokenizer

WIDTH = 32
"""Of the transformers and of FLUX.1's text encoders."""
QWEN_WIDTH, QWEN_LAYERS = 16, 28
"""One layer more than the last that is read, since the states after the last of all are normalised."""
_VAE_SHAPE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_TURN_START, _TURN_END, _END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_THINK, _THOUGHT = "<think>", "</think>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def make_tiny_flux(folder: Path, seed: int = 0) -> Path:
    """Write a tiny FLUX.1-dev to a folder that ``FluxPipeline`` loads; -> the folder."""
    with _seeded(seed):
        _diffusers().FluxPipeline(**_flux1_parts()).save_pretrained(str(folder))
    return folder


def make_tiny_flux_kontext(folder: Path, seed: int = 0) -> Path:
    """Write a tiny FLUX.1-Kontext to a folder that ``FluxKontextPipeline`` loads; -> the folder."""
    with _seeded(seed):
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
    with _seeded(seed):
        tokenizer = qwen_tokenizer()
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
            vae=_flux2_vae(),
            text_encoder=_qwen(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer,
            is_distilled=is_distilled,
        ).save_pretrained(str(folder))
    return folder


def qwen_tokenizer(vocab_size: int = 400) -> Any:
    """Qwen's tokenizer and chat template: byte-pair encoding that any text has tokens in, a turn a message.

    Args:
        vocab_size: at most; the 256 bytes and the marks of turns are always there.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library: Any = transformers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = [_END_OF_TEXT, _TURN_START, _TURN_END, _THINK, _THOUGHT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    made: Any = library.Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token=_TURN_END,
        pad_token=_END_OF_TEXT,
        extra_special_tokens=marks,
    )
    made.chat_template = _CHAT_TEMPLATE
    return made


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights by a seed; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _diffusers() -> Any:
    """Imported where it is used, and untyped."""
    import diffusers

    return diffusers


def _flux1_parts() -> dict[str, Any]:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    vae = _diffusers().AutoencoderKL(
        **_VAE_SHAPE,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
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
        "text_encoder_2": _t5(t5),
        "tokenizer_2": t5,
        "transformer": transformer,
    }


def _scheduler() -> Any:
    """The published configuration of all three."""
    return _diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _flux2_vae() -> Any:
    vae = _diffusers().AutoencoderKLFlux2(**_VAE_SHAPE)
    # Statistics that a latent must really be normalised by.
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _clip(tokenizer: Any) -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel(clip_config(tokenizer, WIDTH))


def _t5(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


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
