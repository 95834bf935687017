"""HPSv2: the cosine, its scale and its two checkpoints; the published format where open_clip is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.base import Prompt
from rewards.checker import check_reward
from rewards.clip import CLIPScore, CLIPScoreSettings
from rewards.clip_models import ClipSource
from rewards.hps import FILES, HPS, HPSSettings
from rewards.scoring import score
from rewards.tiny.clip import SIDE, save_clip
from tests.rewards.tiny_models import PROMPTS, pictures


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ClipSource:
    folder = tmp_path_factory.mktemp("hps")
    save_clip(folder)
    return ClipSource(str(folder))


def test_the_score_is_the_scaled_cosine(source: ClipSource) -> None:
    cosines = score(CLIPScore(CLIPScoreSettings(source)), pictures(), PROMPTS).total
    np.testing.assert_allclose(score(HPS(HPSSettings(source=source)), pictures(), PROMPTS).total, cosines, rtol=1e-6)
    percent = score(HPS(HPSSettings(source=source, scale=100)), pictures(), PROMPTS).total
    np.testing.assert_allclose(percent, 100 * cosines, rtol=1e-5)


def test_it_keeps_the_contract(source: ClipSource) -> None:
    reward = HPS(HPSSettings(source=source))
    check_reward(reward, pictures(), [PROMPTS[0], Prompt(""), PROMPTS[2]])
    assert score(reward, pictures(1), [Prompt("")]).reasons == {0: "the prompt has no text"}


def test_each_version_has_its_checkpoint_and_its_fingerprint(source: ClipSource) -> None:
    assert HPSSettings().clip == ClipSource("ViT-H-14", "open_clip", "xswu/HPSv2:HPS_v2.1_compressed.pt")
    assert HPSSettings("v2.0").clip.pretrained == FILES["v2.0"]
    old, new = (HPS(HPSSettings(version, source)).traits.fingerprint for version in ("v2.0", "v2.1"))
    assert json.loads(old)["published"] != json.loads(new)["published"]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"version": "2.1"}, "version: expected 'v2.0' or 'v2.1', got '2.1'; the nearest is 'v2.1'"),
        ({"scale": -1}, "scale: expected a positive"),
    ],
)
def test_a_wrong_setting_is_named(field: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HPSSettings(**field)  # type: ignore[arg-type]


def test_a_checkpoint_as_it_is_published(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip needs torchvision; see docs/scorers.md")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (tmp_path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-hps.json")
    torch.manual_seed(1)
    model, _, transform = open_clip.create_model_and_transforms("tiny-hps")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    tokens = open_clip.get_tokenizer("tiny-hps")([prompt.text for prompt in PROMPTS])
    with torch.no_grad():
        seen = model.eval().encode_image(torch.stack([transform(Image.fromarray(image)) for image in pictures()]))
        expected = torch.nn.functional.cosine_similarity(seen, model.encode_text(tokens)).numpy()
    clip = ClipSource("tiny-hps", "open_clip", str(tmp_path / "HPS_v2.1_compressed.pt"))
    reward = HPS(HPSSettings(source=clip))
    np.testing.assert_allclose(score(reward, pictures(), PROMPTS).total, expected, atol=1e-5)
    check_reward(reward, pictures(), PROMPTS)
