"""PickScore on a tiny CLIP whose processor lies elsewhere, as the published one's does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPModel

from rewards.base import Prompt
from rewards.checker import check_reward
from rewards.clip_models import ClipSource
from rewards.pickscore import PickScore, PickScoreSettings
from rewards.scoring import score
from rewards.tiny.clip import CONTEXT, clip_tokenizer, save_clip, save_clip_processor
from tests.rewards.tiny_models import PROMPTS, pictures


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ClipSource:
    folder = tmp_path_factory.mktemp("pickscore")
    save_clip(folder / "model", with_processor=False)
    save_clip_processor(folder / "processor")
    return ClipSource(str(folder / "model"), processor=str(folder / "processor"))


def logits(source: ClipSource) -> torch.Tensor:
    """CLIP's own logits of every image with every prompt, [B, B]."""
    model = CLIPModel.from_pretrained(source.model).eval()
    pixels = AutoImageProcessor.from_pretrained(source.processor, backend="pil")(list(pictures()), return_tensors="pt")
    texts = [prompt.text for prompt in PROMPTS]
    tokens = clip_tokenizer()(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, **pixels).logits_per_image


def test_the_score_is_the_diagonal_of_clips_logits(source: ClipSource) -> None:
    every = logits(source).numpy()
    assert np.abs(every - every.T).max() > 0.01
    total = score(PickScore(PickScoreSettings(source)), pictures(), PROMPTS).total
    np.testing.assert_allclose(total, np.diagonal(every), rtol=1e-4)


def test_flow_grpos_divisor(source: ClipSource) -> None:
    published = score(PickScore(PickScoreSettings(source)), pictures(), PROMPTS).total
    divided = score(PickScore(PickScoreSettings(source, divisor=26)), pictures(), PROMPTS).total
    np.testing.assert_allclose(divided * 26, published, rtol=1e-5)


def test_it_keeps_the_contract(source: ClipSource) -> None:
    reward = PickScore(PickScoreSettings(source))
    check_reward(reward, pictures(), [PROMPTS[0], PROMPTS[0], Prompt("")])
    assert score(reward, pictures(1), [Prompt("")]).reasons == {0: "the prompt has no text"}


def test_a_score_that_overflowed_is_not_available(source: ClipSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.pickscore.paired_cosines", lambda clip, images, texts: np.array([0.5, np.inf, np.nan]))
    scores = score(PickScore(PickScoreSettings(source)), pictures(), PROMPTS)
    assert np.isnan(scores.total).tolist() == [False, True, True]
    assert "the model's score is inf" in scores.reasons[1]


def test_the_default_is_the_published_checkpoint() -> None:
    reward = PickScore()
    assert reward.settings.source.model == "yuvalkirstain/PickScore_v1"
    assert "PickScore_v1" in reward.traits.fingerprint
    with pytest.raises(ValueError, match="divisor: expected a positive number, got 0"):
        PickScoreSettings(divisor=0)


def test_a_fixture_is_saved_in_the_published_format(source: ClipSource) -> None:
    assert (Path(source.model) / "model.safetensors").is_file()
    assert not (Path(source.model) / "tokenizer.json").exists()
