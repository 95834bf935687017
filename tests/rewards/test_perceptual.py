"""Distances to the source: LPIPS on checkpoints with the published names, DINO on a tiny DINOv2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from rewards.base import Images, Prompt
from rewards.checker import check_reward
from rewards.checkpoints import Placement
from rewards.lpips import SCALE, SHIFT, Network, make_lpips
from rewards.perceptual import NO_SOURCE, DINOSettings, LPIPSSettings, SourceDINO, SourceLPIPS
from rewards.scoring import score
from rewards.tiny.clip import randomised
from tests.rewards.tiny_models import pictures

# torchvision's names and shapes, written out: index in ``features``, channels in and out, kernel.
ALEX = ((0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384, 3), (8, 384, 256, 3), (10, 256, 256, 3))
VGG = ((0, 3, 64, 3), (2, 64, 64, 3), (5, 64, 128, 3), (7, 128, 128, 3), (10, 128, 256, 3), (12, 256, 256, 3),
       (14, 256, 256, 3), (17, 256, 512, 3), (19, 512, 512, 3), (21, 512, 512, 3), (24, 512, 512, 3),
       (26, 512, 512, 3), (28, 512, 512, 3))  # fmt: skip
CHANNELS: dict[Network, tuple[int, ...]] = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def trunk(network: Network) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"classifier.1.weight": torch.zeros(2, 2)}
    for index, below, above, kernel in ALEX if network == "alex" else VGG:
        shape = (above, below, kernel, kernel)
        tensors[f"features.{index}.weight"] = torch.randn(shape, generator=generator) * (2 / (below * kernel**2)) ** 0.5
        tensors[f"features.{index}.bias"] = 0.1 * torch.randn(above, generator=generator)
    return tensors


def linear(network: Network) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {f"lin{index}.model.1.weight": (1, width, 1, 1) for index, width in enumerate(CHANNELS[network])}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> LPIPSSettings:
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(trunk("alex"), folder / "alexnet-owt-7be5be79.pth")
    torch.save(linear("alex"), folder / "alex.pth")
    return LPIPSSettings(str(folder / "alexnet-owt-7be5be79.pth"), str(folder / "alex.pth"))


def alex_features(image: Images) -> list[np.ndarray[Any, Any]]:
    """AlexNet's five activations, layer by layer as torchvision's file has them."""
    from torch.nn.functional import conv2d, max_pool2d, relu

    w = {name: tensor.double() for name, tensor in trunk("alex").items()}
    x = torch.tensor(image.transpose(2, 0, 1)[None] / 127.5 - 1)
    x = (x - torch.tensor(SHIFT).double().view(1, 3, 1, 1)) / torch.tensor(SCALE).double().view(1, 3, 1, 1)
    steps = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
    read = []
    for index, stride, padding, pooled in steps:
        x = max_pool2d(x, 3, 2) if pooled else x
        x = relu(conv2d(x, w[f"features.{index}.weight"], w[f"features.{index}.bias"], stride, padding))
        read.append(x[0].numpy())
    return read


def distance_by_hand(first: Images, second: Images) -> float:
    total = 0.0
    for layer, (a, b) in enumerate(zip(alex_features(first), alex_features(second), strict=True)):
        weight = linear("alex")[f"lin{layer}.model.1.weight"].double().numpy().ravel()
        unit_a, unit_b = a / (np.linalg.norm(a, axis=0) + 1e-10), b / (np.linalg.norm(b, axis=0) + 1e-10)
        total += float((weight[:, None, None] * (unit_a - unit_b) ** 2).sum(0).mean())
    return total


def edits(count: int = 3, side: int = 48) -> tuple[Images, list[Prompt]]:
    sources = pictures(count, side, seed=5)
    return pictures(count, side, seed=6), [Prompt("make it red", (source,)) for source in sources]


def test_lpips_by_hand(settings: LPIPSSettings) -> None:
    images, prompts = edits()
    expected = [1 - distance_by_hand(i, p.source_images[0]) for i, p in zip(images, prompts, strict=True)]
    np.testing.assert_allclose(score(SourceLPIPS(settings), images, prompts).total, expected, rtol=1e-4, atol=1e-4)


def test_an_untouched_source_scores_one_and_a_small_change_more_than_a_large_one(settings: LPIPSSettings) -> None:
    source = pictures(1, 48)[0]
    changed = source.astype(int)
    images = np.stack([source, np.clip(changed + 8, 0, 255), np.roll(source, 20, 0)]).astype(np.uint8)
    same, little, much = score(SourceLPIPS(settings), images, [Prompt("x", (source,))] * 3).total
    assert same == 1.0
    assert same > little > much


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_the_published_names_fit(network: Network) -> None:
    lpips = make_lpips(network, trunk(network), linear(network))
    pixels = torch.rand(2, 3, 64, 64)
    assert [feature.shape[1] for feature in lpips.features(pixels)] == list(CHANNELS[network])
    with torch.no_grad():
        assert lpips.distance(lpips.features(pixels), lpips.features(pixels)).tolist() == [0.0, 0.0]


def test_checkpoints_of_another_network_are_named() -> None:
    with pytest.raises(ValueError, match=r"LPIPS's vgg network: the checkpoint does not fit the model: \d+ missing"):
        make_lpips("vgg", trunk("alex"), linear("alex"))
    with pytest.raises(
        ValueError, match=r"LPIPS's weights for alex: expected .*'lin0.model.1.weight': \[1, 64, 1, 1\]"
    ):
        make_lpips("alex", trunk("alex"), linear("vgg"))


def test_lpips_keeps_the_contract_and_says_what_it_cannot_score(settings: LPIPSSettings) -> None:
    reward = SourceLPIPS(replace(settings, placement=Placement(batch_size=2)))
    images, prompts = edits()
    prompts[1] = Prompt("no source")
    check_reward(reward, images, prompts)
    assert score(reward, images, prompts).reasons == {1: NO_SOURCE}
    assert np.isnan(score(reward, images[:1], prompts[1:2]).total).all()
    small = score(reward, images[:1, :30], prompts[:1])
    assert small.reasons == {0: "the image is smaller than 31 pixels, and alex sees nothing of it"}


def test_a_source_of_another_size_is_resized(settings: LPIPSSettings) -> None:
    flat = np.full((96, 64, 3), 90, np.uint8)
    assert score(SourceLPIPS(settings), flat[None, :48, :48], [Prompt("x", (flat,))]).total.tolist() == [1.0]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"network": "squeeze"}, "network: expected 'alex' or 'vgg', got 'squeeze'"),
        ({"placement": Placement(dtype="float16")}, "expected dtype='float32' for LPIPS, got 'float16'"),
        ({"trunk": "/nowhere/alexnet.pth"}, "trunk: expected a file or a folder"),
    ],
)
def test_a_wrong_setting_is_named(settings: LPIPSSettings, field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(settings, **field)


# DINO.


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> DINOSettings:
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    model = Dinov2Model(config)
    randomised(model)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(**size, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(folder)
    return DINOSettings(str(folder))


def test_dino_is_the_cosine_of_the_class_tokens(dino: DINOSettings) -> None:
    images, prompts = edits(side=32)
    model = Dinov2Model.from_pretrained(Path(dino.model)).eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def token(image: Images) -> torch.Tensor:
        pixels = torch.tensor(((image / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
        with torch.no_grad():
            return model(pixel_values=pixels).last_hidden_state[0, 0]

    pairs = [(token(i), token(p.source_images[0])) for i, p in zip(images, prompts, strict=True)]
    expected = [float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairs]
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(score(SourceDINO(dino), images, prompts).total, expected, atol=1e-5)


def test_dino_keeps_the_contract_and_shares_sources(dino: DINOSettings) -> None:
    reward = SourceDINO(dino)
    images, prompts = edits()
    shared = [prompts[0], prompts[0], Prompt("no source")]
    check_reward(reward, images, shared)
    assert score(reward, images, shared).reasons == {2: NO_SOURCE}
    assert np.isnan(score(reward, images[:1], [Prompt("")]).total).all()
    sources = np.stack([prompt.source_images[0] for prompt in prompts])
    np.testing.assert_allclose(score(reward, sources, prompts).total, 1, atol=1e-6)
    with pytest.raises(ValueError, match="model: expected a file or a folder"):
        DINOSettings("/nowhere/dino")
