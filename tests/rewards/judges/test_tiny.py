import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from rewards.judges.readouts import surface_forms
from rewards.judges.templates import load_template, template_names
from rewards.judges.tiny import (
    IMAGE_PAD,
    LABELS,
    VISION_END,
    VISION_START,
    TinyVLM,
    make_tiny_vlm,
    tiny_model,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vlm(tmp_path_factory.mktemp("tiny") / "made", ["a purple hexagon"])


def test_labels_and_words_are_single_tokens(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    forms = [form for label in LABELS for form in surface_forms(label) if not form.startswith(("▁", "Ġ"))]
    for text in [*LABELS, *(form for form in forms if form.strip().isalpha()), " hexagon", " picture", " instruction"]:
        assert len(tokenizer(text)["input_ids"]) == 1, text
    assert len(tokenizer("10")["input_ids"]) == 2


@pytest.mark.parametrize("text", ["a zebra  in 1984,\n\tnot a CAT", "é漢字 🙂", "", *template_names()])
def test_every_text_comes_back(checkpoint: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    if text in template_names():
        text = "".join(part for part, _ in load_template(text).parts)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_chat_shows_its_images_in_order(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    parts = [
        {"type": "text", "text": "Before: "},
        {"type": "image"},
        {"type": "text", "text": "After: "},
        {"type": "image"},
    ]
    chat = [{"role": "system", "content": "Judge."}, {"role": "user", "content": parts}]
    shown = VISION_START + IMAGE_PAD + VISION_END
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nJudge.<|im_end|>\n"
        f"<|im_start|>user\nBefore: {shown}After: {shown}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_it_answers_with_labels_and_looks_at_the_image(checkpoint: Path) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(checkpoint))
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    assert model.dtype == torch.float32
    # 48 x 48: 12 x 12 patches of 4 pixels, 36 tokens.
    text = VISION_START + IMAGE_PAD * 36 + VISION_END + "<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(text, return_tensors="pt")
    kinds = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE_PAD)).int()
    generator = torch.Generator().manual_seed(0)
    answers = []
    for _ in range(2):
        with torch.no_grad():
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                mm_token_type_ids=kinds,
                pixel_values=torch.randn(144, 3 * 2 * 4 * 4, generator=generator),
                image_grid_thw=torch.tensor([[1, 12, 12]]),
            ).logits[0, -1]
        answers.append(logits.softmax(-1).numpy())
    labels = tokenizer.convert_tokens_to_ids(list(LABELS))
    assert min(answer[labels].sum() for answer in answers) > 0.5
    assert all(set(labels) <= set(np.argsort(-answer)[:20].tolist()) for answer in answers)
    assert np.abs(answers[0] - answers[1]).max() > 1e-4


def test_the_seed_makes_the_weights_and_leaves_torchs_generator() -> None:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    first = tiny_model(TinyVLM(seed=5), tokenizer).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    second, other = (tiny_model(TinyVLM(seed=seed), tokenizer).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_shape_is_in_the_files(tmp_path: Path) -> None:
    shape = TinyVLM(
        width=32, num_layers=1, vision_width=32, vision_layers=1, patch_size=8, merge_size=1, max_pixels=2304
    )
    folder = make_tiny_vlm(tmp_path, shape=shape)
    config = AutoConfig.from_pretrained(str(folder))
    assert (config.text_config.hidden_size, config.vision_config.patch_size) == (32, 8)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert (settings["merge_size"], settings["size"]["longest_edge"]) == (1, 2304)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"width": 48}, "width"),
        ({"vision_width": 0}, "vision_width"),
        ({"num_layers": 0}, "num_layers"),
        ({"max_pixels": 63}, "max_pixels"),
        ({"min_pixels": 5000}, "min_pixels"),
        ({"rope_theta": 1.0}, "rope_theta"),
    ],
)
def test_a_bad_shape_is_refused(changes: dict[str, float], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        TinyVLM(**changes)  # type: ignore[arg-type]
