"""A tiny vision-language judge of Qwen2.5-VL's class, made from nothing: what vLLM serves where there is no real one.

It is a normal checkpoint: transformers' ``Qwen2_5_VLForConditionalGeneration`` and ``AutoProcessor`` load it, and vLLM
serves it. Its weights are random until somebody trains it, so its answers mean nothing, but they are answers: log-
probabilities of digits, of yes and no, of A and B, and JSON by a schema.

The tokenizer is a byte-level BPE over the texts that it is made with: each of their words becomes one token, and any
other text is spelled in smaller ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.judges.readouts import surface_forms
from rewards.judges.templates import load_template, template_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
"""The names are Qwen2-VL's: its processor looks for them."""
LABELS = (*"0123456789", "yes", "no", "A", "B")
"""Single tokens of every tiny tokenizer, as are those of their surface forms that are words."""
HEAD_SIDE = 32
"""Width of an attention head; vLLM's kernels on a CPU want a multiple of 32 in the language model."""
_MAX_VOCABULARY = 8192
_TURN = (
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    + _TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyVLM:
    """The shape of a tiny judge.

    Attributes:
        width: of the language model, a multiple of 32.
        num_layers: of the language model.
        vision_width: of the vision tower, a multiple of 32.
        vision_layers: of the vision tower; all of them attend over the whole image.
        patch_size: side of a patch in pixels.
        merge_size: side, in patches, of what becomes one token; images should have sides that are multiples of
            ``patch_size * merge_size``, else they are resized to such.
        min_pixels: smaller images are enlarged.
        max_pixels: larger images are reduced.
        max_tokens: longest sequence; as many as `pdtr judge serve` asks for, and vLLM refuses to start with more.
        rope_theta: base of the rotary positions. Qwen has a million; a grid of six by six tokens is told apart by fast
            rotations only.
        initializer_range: standard deviation of the random weights.
        seed: of the weights.

    Raises:
        ValueError: a number out of its range.
    """

    width: int = 64
    num_layers: int = 2
    vision_width: int = 64
    vision_layers: int = 2
    patch_size: int = 4
    merge_size: int = 2
    min_pixels: int = 16 * 16
    max_pixels: int = 64 * 64
    max_tokens: int = 8192
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "vision_width"):
            if getattr(self, name) < HEAD_SIDE or getattr(self, name) % HEAD_SIDE:
                raise ValueError(f"{name}: expected a positive multiple of {HEAD_SIDE}, got {getattr(self, name)}")
        for name in ("num_layers", "vision_layers", "patch_size", "merge_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        token_pixels = (self.patch_size * self.merge_size) ** 2
        if not token_pixels <= self.max_pixels or not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"expected 0 < min_pixels <= max_pixels and {token_pixels} (one token) <= max_pixels, got "
                f"{self.min_pixels} and {self.max_pixels}"
            )
        if not 1 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta: expected more than 1, got {self.rope_theta}")


def tiny_tokenizer(texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer whose single tokens are the words of the texts and of the library's templates.

    Args:
        texts: what the judge will often read, such as the prompts of a world.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Digits stand alone, so that "10" is two and each of them is the label of a scale; a word takes its space.
            pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_template_texts(), *texts], trainer)
    made: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return made


def tiny_config(shape: TinyVLM, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    """The configuration of transformers for a shape and its tokenizer."""
    from transformers import Qwen2_5_VLConfig

    ids: Any = tokenizer.convert_tokens_to_ids
    half = HEAD_SIDE // 2
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.width,
        "intermediate_size": 2 * shape.width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.width // HEAD_SIDE,
        "num_key_value_heads": shape.width // HEAD_SIDE,
        "max_position_embeddings": shape.max_tokens,
        "initializer_range": shape.initializer_range,
        # Time, rows and columns share the halves of a head; a still image has one time.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
        },
        "bos_token_id": ids(END_OF_TEXT),
        "eos_token_id": ids(TURN_END),
        "pad_token_id": ids(END_OF_TEXT),
    }
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_width,
        "intermediate_size": 2 * shape.vision_width,
        "num_heads": shape.vision_width // HEAD_SIDE,
        "patch_size": shape.patch_size,
        "spatial_merge_size": shape.merge_size,
        "window_size": 16 * shape.patch_size * shape.merge_size,
        "fullatt_block_indexes": list(range(shape.vision_layers)),
        "out_hidden_size": shape.width,
        "initializer_range": shape.initializer_range,
    }
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        image_token_id=ids(IMAGE_PAD),
        video_token_id=ids(VIDEO_PAD),
        vision_start_token_id=ids(VISION_START),
        vision_end_token_id=ids(VISION_END),
        tie_word_embeddings=False,
    )


def tiny_model(shape: TinyVLM, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random weights, in fp32 and ready to answer; torch's own generator is left as it was."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.seed)
        model = Qwen2_5_VLForConditionalGeneration(tiny_config(shape, tokenizer))
    model.train(False)
    return model


def favour_labels(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, strength: float = 8.0
) -> None:
    """Make a random model answer with labels: where the assistant's turn begins they gain ``strength`` in their logits.

    The turn begins behind a line break, whose embedding and the labels' rows of the last layer get a common direction.
    What the images and the words do to the logits stays.
    """
    import torch

    ids: Any = tokenizer.convert_tokens_to_ids
    rows, embeddings = model.lm_head.weight, model.model.language_model.embed_tokens.weight
    width = rows.shape[1]
    direction = torch.full((width,), width**-0.5)
    with torch.no_grad():
        # The last norm makes a state of length sqrt(width) of it, whatever its own length.
        rows[[ids(label) for label in LABELS]] += direction * strength * width**-0.5
        embeddings[tokenizer("\n")["input_ids"][0]] += direction * width**0.5


def save_tiny_vlm(
    folder: Path,
    shape: TinyVLM,
    tokenizer: PreTrainedTokenizerBase,
    model: Qwen2_5_VLForConditionalGeneration | None = None,
) -> Path:
    """Write a checkpoint: configuration, weights, tokenizer, chat template and image settings.

    Args:
        folder: made where it is missing.
        shape: what the model was made by; its image settings are written.
        tokenizer: what the model was made with.
        model: a random one of the shape unless given.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (model or tiny_model(shape, tokenizer)).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    # Written by hand: transformers' own processor needs torchvision to be made, and not to be read about.
    for kind, name in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
        (folder / name).write_text(json.dumps(_processor_settings(shape, kind), indent=1) + "\n")
    return folder


def make_tiny_vlm(folder: Path, texts: Iterable[str] = (), shape: TinyVLM | None = None) -> Path:
    """Make a tiny random judge that answers with labels, and write it to a folder; -> the folder. About 2 MB.

    Its weights are larger than those that one would train, so that what it says depends on what it is shown.
    """
    shape, tokenizer = shape or TinyVLM(initializer_range=0.1), tiny_tokenizer(texts)
    model = tiny_model(shape, tokenizer)
    favour_labels(model, tokenizer)
    return save_tiny_vlm(folder, shape, tokenizer, model)


def _processor_settings(shape: TinyVLM, kind: str) -> dict[str, Any]:
    return {
        f"{kind}_processor_type": "Qwen2VLImageProcessor" if kind == "image" else "Qwen2VLVideoProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "size": {"shortest_edge": shape.min_pixels, "longest_edge": shape.max_pixels},
        "patch_size": shape.patch_size,
        "temporal_patch_size": 2,
        "merge_size": shape.merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _template_texts() -> list[str]:
    """The words that every judge is asked with, and the labels that it answers with."""
    templates = [load_template(name) for name in template_names()]
    asked = [text for template in templates for text, _ in template.parts]
    forms = [form for label in LABELS for form in surface_forms(label) if not form.startswith(("▁", "Ġ"))]
    return [*asked, *forms, *(f"{role}\n" for role in ("system", "user", "assistant"))]
