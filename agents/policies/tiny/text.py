"""The text encoders of tiny SD3 and FLUX.1: CLIP's configuration, whichever of its classes a pipeline wants, and T5."""

from __future__ import annotations

from typing import Any


def clip_config(tokenizer: Any, width: int) -> Any:
    """Two narrow layers over a tokenizer's vocabulary and length, projected to their own width."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_t5(tokenizer: Any, width: int, num_heads: int) -> Any:
    """A random T5 encoder with gated GELUs, as version 1.1's."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // num_heads,
        d_ff=2 * width,
        num_layers=2,
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)
