"""CLIPScore against the formula by hand, on a tiny CLIP of each library, saved and loaded as the real ones are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.base import Prompt
from rewards.checker import check_reward
from rewards.checkpoints import Placement
from rewards.clip import CLIPScore, CLIPScoreSettings
from rewards.clip_models import ClipSource, load_clip, paired_cosines
from rewards.scoring import score
from rewards.tiny.clip import SIDE, clip_tokenizer, save_clip
from tests.rewards.tiny_models import PROMPTS, pictures

OPENAI_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
OPENAI_STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    save_clip(path)
    return path


def by_hand(model: Any, image: np.ndarray[Any, Any], text: str) -> float:
    """The cosine of one pair: the image resized and normalised here, the model called alone."""
    resized = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    pixels = torch.tensor(((resized / 255 - OPENAI_MEAN) / OPENAI_STD).transpose(2, 0, 1)[None], dtype=torch.float32)
    tokens = clip_tokenizer()(text, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    return float(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)[0])


def test_the_score_is_the_cosine_of_each_pair(folder: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    images = pictures()
    expected = [by_hand(model, image, prompt.text) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert np.ptp(expected) > 0.01
    reward = CLIPScore(CLIPScoreSettings(ClipSource(str(folder))))
    np.testing.assert_allclose(score(reward, images, PROMPTS).total, expected, atol=2e-5)


def test_weight_clamp_and_prefix_are_those_of_the_paper(folder: Path) -> None:
    source = ClipSource(str(folder))
    images = pictures(8, seed=3)
    prompts = [Prompt(text) for text in "abcdefgh"]
    plain = score(CLIPScore(CLIPScoreSettings(source)), images, [Prompt("x " + p.text) for p in prompts]).total
    settings = CLIPScoreSettings(source, weight=2.5, clamp=True, prefix="x ")
    published = score(CLIPScore(settings), images, prompts).total
    np.testing.assert_allclose(published, 2.5 * np.maximum(plain, 0), atol=1e-5)


def test_it_keeps_the_contract(folder: Path) -> None:
    reward = CLIPScore(CLIPScoreSettings(ClipSource(str(folder)), placement=Placement(batch_size=2)))
    check_reward(reward, pictures(), PROMPTS)


def test_no_text_is_not_available_and_all_else_is_scored(folder: Path) -> None:
    reward = CLIPScore(CLIPScoreSettings(ClipSource(str(folder))))
    scores = score(reward, pictures(), [PROMPTS[0], Prompt(" "), PROMPTS[2]])
    assert np.isnan(scores.total).tolist() == [False, True, False]
    assert scores.reasons == {1: "the prompt has no text"}
    assert np.isnan(score(reward, pictures(2), [Prompt(""), Prompt("")]).total).all()


def test_a_long_prompt_is_cut_at_the_context(folder: Path) -> None:
    reward = CLIPScore(CLIPScoreSettings(ClipSource(str(folder))))
    images = pictures(1).repeat(2, 0)
    first, second = score(reward, images, [Prompt("a" * 60), Prompt("a" * 60 + "b")]).total
    assert first == pytest.approx(second)


def test_half_precision_is_close(folder: Path) -> None:
    source = ClipSource(str(folder))
    exact = score(CLIPScore(CLIPScoreSettings(source)), pictures(), PROMPTS).total
    half = CLIPScore(CLIPScoreSettings(source, placement=Placement(dtype="bfloat16")))
    np.testing.assert_allclose(score(half, pictures(), PROMPTS).total, exact, atol=0.03)
    assert half.traits.fingerprint != CLIPScore(CLIPScoreSettings(source)).traits.fingerprint


def test_weights_are_loaded_at_the_first_call_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[ClipSource] = []

    def counted(source: ClipSource, placement: Placement) -> Any:
        loads.append(source)
        return load_clip(source, placement)

    monkeypatch.setattr("rewards.clip.load_clip", counted)
    reward = CLIPScore(CLIPScoreSettings(ClipSource(str(folder))))
    assert not loads
    score(reward, pictures(), PROMPTS)
    score(reward, pictures(), PROMPTS)
    assert len(loads) == 1


def test_the_fingerprint_changes_with_the_weights_and_the_settings(tmp_path: Path) -> None:
    save_clip(tmp_path)
    settings = CLIPScoreSettings(ClipSource(str(tmp_path)))
    before = CLIPScore(settings).traits.fingerprint
    assert json.loads(before)["reward"] == "CLIPScore"
    assert CLIPScore(replace(settings, placement=Placement("cuda:3"))).traits.fingerprint == before
    assert CLIPScore(replace(settings, weight=2.5)).traits.fingerprint != before
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert CLIPScore(settings).traits.fingerprint != before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: ClipSource(f"{path}/modle"), r"model: expected a file or a folder, got '.*modle', .* is 'model'"),
        (lambda path: ClipSource("a b"), "model: expected a path, a hub id 'owner/model' .* got 'a b'"),
        (lambda path: ClipSource("owner/model:"), "got 'owner/model:'"),
        (lambda path: ClipSource("ViT-L-14", pretrained="openai"), "pretrained: only for library='open_clip'"),
        (lambda path: ClipSource("ViT-L-14", "open_clip"), "expected pretrained, a tag such as 'openai' or a file"),
        (lambda path: ClipSource("x", "openclip"), "library: expected 'transformers' or 'open_clip', got 'openclip'"),
        (lambda path: CLIPScoreSettings(ClipSource("a/b"), weight=0), "weight: expected a positive number, got 0"),
        (lambda path: Placement(dtype="fp16"), "dtype: expected one of .* got 'fp16'; the nearest is 'float16'"),
        (lambda path: Placement(device="GPU 1"), "device: expected torch's name of one"),
        (lambda path: Placement(batch_size=0), "batch_size: expected 1 or more, got 0"),
    ],
)
def test_a_wrong_setting_is_named_at_construction(make: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_missing_open_clip_is_named_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'open_clip', and it is not installed: pip install 'pdtr\[clip\]'; or take"):
        CLIPScore()


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a tiny architecture of open_clip, whose name is registered."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip needs torchvision; see docs/scorers.md")
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "tiny-pdtr.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-pdtr.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-pdtr")
    torch.save({"state_dict": model.state_dict()}, folder / "tiny.pt")
    return folder / "tiny.pt"


def test_open_clip_gives_the_cosine_of_each_pair(open_clip_file: Path) -> None:
    import open_clip

    source = ClipSource("tiny-pdtr", "open_clip", str(open_clip_file))
    images = pictures()
    model, _, transform = open_clip.create_model_and_transforms("tiny-pdtr", pretrained=str(open_clip_file))
    tokens = open_clip.get_tokenizer("tiny-pdtr")([prompt.text for prompt in PROMPTS])
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([transform(Image.fromarray(image)) for image in images]))
        expected = torch.nn.functional.cosine_similarity(seen, model.encode_text(tokens)).numpy()
    reward = CLIPScore(CLIPScoreSettings(source))
    np.testing.assert_allclose(score(reward, images, PROMPTS).total, expected, atol=1e-5)
    check_reward(reward, images, PROMPTS)
    assert load_clip(source, Placement()).logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


@pytest.mark.parametrize(("pretrained", "quick"), [("openai", True), ("laion2b_s32b_b79k", False)])
def test_openais_weights_get_the_activation_they_were_trained_with(
    pretrained: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip needs torchvision; see docs/scorers.md")
    asked: list[tuple[str, bool]] = []

    def create(name: str, pretrained: str, force_quick_gelu: bool) -> tuple[Any, None, None]:
        asked.append((pretrained, force_quick_gelu))
        return torch.nn.Linear(1, 1), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    load_clip(ClipSource("ViT-L-14", "open_clip", pretrained), Placement())
    assert asked == [(pretrained, quick)]


def test_texts_that_images_share_are_encoded_once(folder: Path) -> None:
    clip = load_clip(ClipSource(str(folder)), Placement())
    seen: list[list[str]] = []

    class Watched:
        logit_scale = 1.0

        def image_features(self, images: Any) -> torch.Tensor:
            return clip.image_features(images)

        def text_features(self, texts: Any) -> torch.Tensor:
            seen.append(list(texts))
            return clip.text_features(texts)

    images = pictures(4)
    together = paired_cosines(Watched(), images, ["a", "b", "a", "a"])
    assert seen == [["a", "b"]]
    alone = [paired_cosines(clip, images[i : i + 1], [text])[0] for i, text in enumerate("abaa")]
    np.testing.assert_allclose(together, alone, atol=1e-6)
