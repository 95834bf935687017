"""Qwen's text side at a tiny size: the tokenizer, Qwen2.5-VL with its processor, Qwen3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from agents.policies.tiny.weights import seeded

WIDTH = 32
"""Of the text encoders' states."""
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
_HEAD, _PATCH, _MERGE = 16, 4, 2
_MAX_VOCABULARY = 1024


def qwen_tokenizer(texts: Iterable[str], marks: Iterable[str] = ()) -> Any:
    """Qwen2's tokenizer, trained so that each word of the texts is one token; other texts are spelled in smaller ones.

    The templates of Qwen-Image's pipelines have as many tokens as with the published one, for those are words too.

    Args:
        texts: what it knows.
        marks: tokens of their own besides those of Qwen2.5-VL.
    """
    from transformers import Qwen2Tokenizer

    untrained: Any = Qwen2Tokenizer()
    tokenizer = untrained.train_new_from_iterator(
        [*texts], vocab_size=_MAX_VOCABULARY, new_special_tokens=[*SPECIAL_TOKENS[1:], *marks], show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_qwen_vl(tokenizer: Any, seed: int) -> Any:
    """A random ``Qwen2_5_VLForConditionalGeneration`` that is shown images in patches of 4 x 4."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = tokenizer.convert_tokens_to_ids
    half = _HEAD // 2
    text = _language_model(tokenizer) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 6, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": WIDTH // _HEAD,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "window_size": 16 * _PATCH * _MERGE,
        "fullatt_block_indexes": [0],
        "out_hidden_size": WIDTH,
        "initializer_range": 0.2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    build: Any = Qwen2_5_VLForConditionalGeneration
    with seeded(seed):
        return build(config).eval()


def tiny_qwen_vl_processor(tokenizer: Any, max_pixels: int = 24 * 24) -> Any:
    """Qwen2-VL's processor, which shows images of ``max_pixels`` at most; transformers wants torchvision for it."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": (_PATCH * _MERGE) ** 2, "longest_edge": max_pixels}
    patches: dict[str, Any] = {"patch_size": _PATCH, "merge_size": _MERGE, "temporal_patch_size": 2, "size": size}
    build: tuple[Any, ...] = (Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen2VLProcessor)
    return build[2](image_processor=build[0](**patches), tokenizer=tokenizer, video_processor=build[1](**patches))


def tiny_qwen3(tokenizer: Any, seed: int) -> Any:
    """A random ``Qwen3Model``."""
    from transformers import Qwen3Config, Qwen3Model

    config: Any = Qwen3Config(**_language_model(tokenizer), head_dim=_HEAD)
    build: Any = Qwen3Model
    with seeded(seed):
        return build(config).eval()


def _language_model(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": WIDTH // _HEAD,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
    }
