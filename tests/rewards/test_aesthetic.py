"""The aesthetic predictor: the published head over normalised CLIP features, on files as they are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rewards.aesthetic import Aesthetic, AestheticSettings
from rewards.base import Prompt
from rewards.checker import check_reward
from rewards.checkpoints import Placement, load_tensors
from rewards.clip_models import ClipSource, load_clip
from rewards.linear_heads import linear_head
from rewards.scoring import score
from rewards.tiny.clip import save_clip
from tests.rewards.tiny_models import PROMPTS, head_tensors, pictures

WIDTH = 16


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> AestheticSettings:
    folder = tmp_path_factory.mktemp("aesthetic")
    save_clip(folder / "clip", WIDTH)
    torch.save(head_tensors(WIDTH), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return AestheticSettings(ClipSource(str(folder / "clip")), str(folder / "sac+logos+ava1-l14-linearMSE.pth"))


def test_the_score_is_one_affine_map_of_the_unit_features(settings: AestheticSettings) -> None:
    tensors = {name: value.double().numpy() for name, value in load_tensors(Path(settings.head)).items()}
    features = load_clip(settings.source, Placement()).image_features(pictures()).double().numpy()
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    expected = features
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ tensors[f"layers.{layer}.weight"].T + tensors[f"layers.{layer}.bias"]
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(score(Aesthetic(settings), pictures(), PROMPTS).total, expected[:, 0], rtol=1e-4)


def test_prompts_do_not_matter_and_need_no_text(settings: AestheticSettings) -> None:
    reward = Aesthetic(settings)
    other = score(reward, pictures(), [Prompt("")] * 3).total
    np.testing.assert_array_equal(score(reward, pictures(), PROMPTS).total, other)


def test_it_keeps_the_contract(settings: AestheticSettings) -> None:
    check_reward(Aesthetic(settings), pictures(4), [*PROMPTS, PROMPTS[0]])


def test_no_images_have_no_scores(settings: AestheticSettings) -> None:
    assert score(Aesthetic(settings), pictures()[:0], []).total.shape == (0,)


def test_a_head_of_another_clip_is_named(settings: AestheticSettings, tmp_path: Path) -> None:
    torch.save(head_tensors(24), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="features of the head's width, 24, got 16"):
        score(Aesthetic(AestheticSettings(settings.source, str(tmp_path / "head.pth"))), pictures(), PROMPTS)


def test_a_file_that_is_no_head_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"head.pth: .* 10 missing: 0.bias, .*; 1 unknown: weight"):
        linear_head({"weight": torch.zeros(2)}, "head.pth")
    tensors = head_tensors(WIDTH)
    tensors["layers.7.bias"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"1 of another shape: 7.bias"):
        linear_head(tensors, "head.pth")


def test_a_missing_file_is_named_at_construction(settings: AestheticSettings) -> None:
    with pytest.raises(ValueError, match=r"head: expected a file or a folder, .* nearest beside it is 'sac\+logos"):
        AestheticSettings(settings.source, settings.head + "h")


def test_only_tensors_are_loaded(tmp_path: Path) -> None:
    torch.save({"layers": nn.Linear(1, 1)}, tmp_path / "pickled.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_tensors(tmp_path / "pickled.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a checkpoint of named tensors, got list"):
        load_tensors(tmp_path / "list.pth")
