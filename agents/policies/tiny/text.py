"""The CLIP text encoders of tiny pipelines: one configuration, whichever of CLIP's classes a pipeline wants."""

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
