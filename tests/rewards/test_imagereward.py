"""ImageReward on a tiny BLIP whose checkpoint has the published names, against the formula pair by pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BlipConfig, BlipForImageTextRetrieval
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewards.base import Images, Prompt
from rewards.checker import check_reward
from rewards.imagereward import _LARGE, ImageReward, ImageRewardSettings, clip_pixels, split_checkpoint
from rewards.scoring import score
from rewards.tiny.clip import SIDE, randomised
from tests.rewards.tiny_models import PROMPTS, bert_tokenizer, head_tensors, pictures

WIDTH, LAYERS = 16, 2


def published_names(vision_layers: int, text_layers: int) -> list[str]:
    """The names in ImageReward.pt, spelt out from the structure of BLIP's own vit.py and med.py."""
    affine = ("weight", "bias")
    names = ["visual_encoder.cls_token", "visual_encoder.pos_embed"]
    names += [f"visual_encoder.{part}.{kind}" for part in ("patch_embed.proj", "norm") for kind in affine]
    for layer in range(vision_layers):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        names += [f"visual_encoder.blocks.{layer}.{part}.{kind}" for part in parts for kind in affine]
    embeddings = ("word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
    names += [f"text_encoder.embeddings.{part}" for part in (*embeddings, "position_ids")]
    attention = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    dense = ("intermediate.dense", "output.dense", "output.LayerNorm")
    for layer in range(text_layers):
        parts = (*(f"{kind}.{part}" for kind in ("attention", "crossattention") for part in attention), *dense)
        names += [f"text_encoder.encoder.layer.{layer}.{part}.{kind}" for part in parts for kind in affine]
    return [*names, *(f"{side}_proj.{kind}" for side in ("vision", "text") for kind in affine)]


def tiny_config() -> BlipConfig:
    vision = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": 8, "layer_norm_eps": 1e-6}  # fmt: skip
    text = {"vocab_size": len(bert_tokenizer()), "hidden_size": WIDTH, "encoder_hidden_size": WIDTH,
            "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
            "max_position_embeddings": 40}  # fmt: skip
    return BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=8)


def published(model: BlipForImageTextRetrieval) -> dict[str, torch.Tensor]:
    """A model's weights under the published names."""
    own = model.state_dict()
    by_name = {}
    for name in published_names(LAYERS, LAYERS):
        if name.endswith("position_ids"):
            by_name[name] = torch.arange(40)[None]
            continue
        renamed, _ = split_checkpoint({f"blip.{name}": torch.zeros(1)})
        by_name[name] = own[next(iter(renamed), name)]
    return {f"blip.{name}": tensor for name, tensor in by_name.items()}


@pytest.fixture(scope="module")
def model() -> BlipForImageTextRetrieval:
    model = BlipForImageTextRetrieval(tiny_config())
    randomised(model)
    return model


@pytest.fixture(scope="module")
def settings(model: BlipForImageTextRetrieval, tmp_path_factory: pytest.TempPathFactory) -> ImageRewardSettings:
    folder = tmp_path_factory.mktemp("imagereward")
    head = {f"mlp.{name}": tensor for name, tensor in head_tensors(WIDTH).items()}
    torch.save({**published(model), **head}, folder / "ImageReward.pt")
    tiny_config().save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return ImageRewardSettings(str(folder / "ImageReward.pt"), str(folder), str(folder))


def by_hand(model: BlipForImageTextRetrieval, image: Images, text: str) -> float:
    """One pair, without padding, through the two encoders and one affine map."""
    tokens = bert_tokenizer()(text, truncation=True, max_length=35, return_tensors="pt")
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})(
        images=[image], return_tensors="pt"
    )
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels["pixel_values"]).last_hidden_state
        read = model.text_encoder(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state
    raw = read[0, 0].double().numpy()
    tensors = head_tensors(WIDTH)
    for layer in (0, 2, 4, 6, 7):
        weight, bias = (tensors[f"layers.{layer}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        raw = weight @ raw + bias
    return float((raw[0] - 0.16717362830052426) / 1.0333394966054072)


def test_the_score_of_each_pair(settings: ImageRewardSettings, model: BlipForImageTextRetrieval) -> None:
    images = pictures()
    expected = [by_hand(model, image, prompt.text) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(score(ImageReward(settings), images, PROMPTS).total, expected, rtol=1e-3, atol=1e-4)


def test_image_and_prompt_both_matter(settings: ImageRewardSettings) -> None:
    reward = ImageReward(settings)
    grid = np.stack([score(reward, pictures(), [prompt] * 3).total for prompt in PROMPTS])
    assert np.ptp(grid, axis=0).min() > 1e-3
    assert np.ptp(grid, axis=1).min() > 1e-3


def test_the_end_of_a_long_prompt_counts_for_nothing(settings: ImageRewardSettings) -> None:
    images = pictures(1).repeat(2, 0)
    first, second = score(ImageReward(settings), images, [Prompt("a " * 40), Prompt("a " * 40 + "dog")]).total
    assert first == second


def test_it_keeps_the_contract_and_no_text_is_not_available(settings: ImageRewardSettings) -> None:
    reward = ImageReward(settings)
    prompts = [*PROMPTS[:2], Prompt("")]
    check_reward(reward, pictures(), prompts)
    assert score(reward, pictures(), prompts).reasons == {2: "the prompt has no text"}
    assert np.isnan(score(reward, pictures(2), [Prompt(""), Prompt(" ")]).total).all()


def test_the_published_checkpoint_fits_blip_large() -> None:
    with torch.device("meta"):
        large = BlipForImageTextRetrieval(BlipConfig(**_LARGE))
    tensors = {f"blip.{name}": torch.zeros(1) for name in published_names(24, 12)}
    renamed, head = split_checkpoint({**tensors, **{f"mlp.{name}": torch.zeros(1) for name in head_tensors(768)}})
    own = {name for name in large.state_dict() if not name.startswith(("itm_head.", "vision_proj.", "text_proj."))}
    assert renamed.keys() == own
    assert head.keys() == head_tensors(768).keys()
    assert large.vision_model.embeddings.position_embedding.shape == (1, 197, 1024)


# Where an odd number of columns is cut off, torchvision, as published, and transformers differ by one column.
@pytest.mark.parametrize("shape", [(40, 40), (50, 64), (33, 91), (91, 33), (32, 32)])
def test_the_preprocessing_is_clips(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    expected = processor(images=list(image), return_tensors="np")["pixel_values"]
    assert np.abs(clip_pixels(image, SIDE) - expected).max() < 1e-5


def test_a_checkpoint_that_does_not_fit_is_named(settings: ImageRewardSettings, tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    other = ImageRewardSettings(str(tmp_path / "other.pt"), settings.tokenizer, settings.config)
    with pytest.raises(ValueError, match=r"expected ImageReward's tensors, blip.\* and mlp.\*, got 'weights'"):
        score(ImageReward(other), pictures(), PROMPTS)
    with pytest.raises(ValueError, match="weights: expected a file or a folder"):
        ImageRewardSettings(str(tmp_path / "ImageReward.pt"))
