"""GenEval from images alone: colours as the benchmark tells them apart, the rule, and the label "not comparable"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.base import Images, Prompt, reward_name
from rewards.checker import check_reward
from rewards.clip_models import ClipSource
from rewards.colors import BACKGROUND, COLORS, ColorClassifier, ColorSettings, color_crop
from rewards.detected import DetectedGenEval
from rewards.detectors import BoxDetector, DetectorSettings, Found, InstanceDetector
from rewards.geneval import Detection, GenEvalRule
from rewards.scoring import score
from rewards.tiny.clip import save_clip
from rewards.tiny.detectors import SIDE, save_mask2former
from tests.rewards.tiny_detectors import save_detr
from tests.rewards.tiny_models import pictures

RED, BLUE = (220, 20, 20), (20, 20, 220)
TWO = {"tag": "two_object", "include": [{"class": "cup", "count": 1}, {"class": "fork", "count": 1}]}
RED_CUP = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
LEFT = {"tag": "position", "include": [{"class": "fork", "count": 1},
                                       {"class": "cup", "count": 1, "position": ["left of", 0]}]}  # fmt: skip


class ColorfulClip:
    """A CLIP that understands: features are red, green and blue, of an image's mean and of a text's colour."""

    logit_scale = 100.0

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images: list[Images] = []

    def image_features(self, images: Sequence[Images]) -> torch.Tensor:
        self.images += list(images)
        means = torch.tensor(np.array([image.reshape(-1, 3).mean(0) for image in images])).float()
        return means / means.norm(dim=-1, keepdim=True)

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        self.texts += list(texts)
        axes = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}
        rows = [next((axis for name, axis in axes.items() if name in text), (-1.0, -1.0, -1.0)) for text in texts]
        features = torch.tensor(rows)
        return features / features.norm(dim=-1, keepdim=True)


@dataclass
class Told:
    """A detector that finds what it is told."""

    found: list[list[Found]]
    settings: DetectorSettings = field(default_factory=lambda: DetectorSettings("some/detector"))
    is_original: bool = False
    classes: tuple[str, ...] | None = ("cup", "fork")
    calls: list[tuple[int, list[list[str]]]] = field(default_factory=list)

    def known(self) -> tuple[str, ...] | None:
        return self.classes

    def find(self, images: Images, asked: Sequence[Sequence[str]]) -> list[list[Found]]:
        self.calls.append((len(images), [list(classes) for classes in asked]))
        return self.found[: len(images)]


def seen(label: str, x: float, confidence: float = 0.95, mask: Any = None) -> Found:
    return Found(Detection(label, (x, 4, x + 8, 12), None, confidence), mask)


def painted(color: tuple[int, int, int], side: int = 32) -> Images:
    image = np.full((side, side, 3), 128, np.uint8)
    image[4:12, 2:10] = color
    return image


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> ColorfulClip:
    clip = ColorfulClip()
    monkeypatch.setattr("rewards.colors.load_clip", lambda source, placement: clip)
    return clip


def classifier() -> ColorClassifier:
    return ColorClassifier(ColorSettings(ClipSource("some/clip")))


def test_the_crop_is_the_box_grey_outside_the_mask() -> None:
    image = painted(RED)
    mask = np.zeros((32, 32), bool)
    mask[4:12, 2:6] = True
    crop = color_crop(image, (1.6, 3.6, 10.4, 12.4), mask)
    assert crop.shape == (8, 8, 3)
    assert (crop[:, :4] == RED).all()
    assert (crop[:, 4:] == BACKGROUND).all()
    assert (color_crop(image, (2, 4, 10, 12), None) == RED).all()
    assert color_crop(image, (5, 5, 5, 9), None).size == 0
    assert (color_crop(image, (-4, 4, 10, 12), None)[:, :4] == 0).all()


def test_the_classifier_has_the_benchmarks_templates_and_colours(clip: ColorfulClip) -> None:
    classify = classifier()
    boxes = [(2.0, 4.0, 10.0, 12.0), (3.0, 3.0, 3.0, 3.0)]
    assert classify(painted(RED), boxes, [None, None], "cup") == ["red", None]
    assert classify(painted(BLUE), boxes[:1], [None], "cup") == ["blue"]
    # Once a class: three templates for each of ten colours.
    assert len(clip.texts) == 30
    assert clip.texts[:3] == ["a photo of a red cup", "a photo of a red-colored cup", "a photo of a red object"]
    assert clip.texts[-1] == "a photo of a white object"
    assert COLORS == ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def test_the_class_weights_are_the_mean_of_the_templates(tmp_path: Path) -> None:
    save_clip(tmp_path)
    source = ClipSource(str(tmp_path))
    from rewards.checkpoints import Placement
    from rewards.clip_models import load_clip

    model = load_clip(source, Placement())
    weights = []
    for color in COLORS:
        texts = [f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object"]
        mean = model.text_features(texts).double().mean(0)
        weights.append(mean / mean.norm())
    crops = pictures(6, 20)
    expected = (model.image_features(list(crops)).double() @ torch.stack(weights).T).argmax(-1)
    classify = ColorClassifier(ColorSettings(source))
    got = [classify(crop, [(0.0, 0.0, 20.0, 20.0)], [None], "cup")[0] for crop in crops]
    assert got == [COLORS[index] for index in expected]


def test_the_rule_over_what_is_found(clip: ColorfulClip) -> None:
    finder = Told([[seen("cup", 2), seen("fork", 20)], [seen("cup", 2)], [seen("cup", 2), seen("fork", 20)]])
    images = np.stack([painted(RED)] * 3)
    prompts = [Prompt("", metadata=TWO), Prompt("", metadata=TWO), Prompt("", metadata=LEFT)]
    scores = score(DetectedGenEval(finder), images, prompts)
    assert scores.total.tolist() == [1.0, 0.5, 1.0]
    assert scores.components["strict_not_comparable"].tolist() == [1.0, 0.0, 1.0]
    assert scores.components["official_not_comparable"].tolist() == [1.0, 0.0, 1.0]
    assert finder.calls == [(3, [["cup", "fork"], ["cup", "fork"], ["fork", "cup"]])]
    assert clip.images == []


def test_colours_are_asked_for_where_the_prompt_asks(clip: ColorfulClip) -> None:
    mask = np.zeros((32, 32), bool)
    mask[4:12, 2:10] = True
    found = [seen("cup", 2, 0.9, mask), seen("cup", 2, 0.2, mask), seen("fork", 2)]
    reward = DetectedGenEval(Told([found, found]), classifier())
    images = np.stack([painted(RED), painted(BLUE)])
    scores = score(reward, images, [Prompt("", metadata=RED_CUP)] * 2)
    assert scores.total.tolist() == [1.0, 0.5]
    # Neither the fork nor the cup below the threshold was looked at.
    assert len(clip.images) == 2


def test_what_cannot_be_scored_is_not_available(clip: ColorfulClip) -> None:
    finder = Told([[seen("cup", 2), seen("fork", 20)]])
    dog = {"tag": "single_object", "include": [{"class": "forks", "count": 1}]}
    prompts = [Prompt("", metadata=data) for data in ({}, dog, RED_CUP, TWO)]
    scores = score(DetectedGenEval(finder), np.stack([painted(RED)] * 4), prompts)
    assert np.isnan(scores.total).tolist() == [True, True, True, False]
    assert scores.reasons[0].startswith("not GenEval's metadata: tag: expected one of")
    assert scores.reasons[1] == "the detector knows no class 'forks'; the nearest is 'fork'"
    assert scores.reasons[2].startswith("the prompt asks for a colour, and there is no colour classifier")
    assert finder.calls == [(1, [["cup", "fork"]])]
    anything = Told([[seen("forks", 2)]], classes=None)
    assert score(DetectedGenEval(anything), painted(RED)[None], [prompts[1]]).total.tolist() == [1.0]


def test_scores_of_another_detector_are_labelled_everywhere() -> None:
    other, original = DetectedGenEval(Told([])), DetectedGenEval(Told([], is_original=True))
    assert reward_name(other) == "GenEval_not_comparable"
    assert json.loads(other.traits.fingerprint)["comparable_with_published"] is False
    assert reward_name(original) == "GenEval"
    assert json.loads(original.traits.fingerprint)["comparable_with_published"] is True
    found = [[seen("cup", 2), seen("fork", 20)]]
    named = score(DetectedGenEval(Told(found, is_original=True)), painted(RED)[None], [Prompt("", metadata=TWO)])
    assert list(named.components) == ["dense", "strict", "official"]


def test_the_reading_is_chosen_and_the_settings_are_checked() -> None:
    found = [[seen("cup", 2), seen("cup", 12), seen("fork", 20)]]
    for reading, expected in (("dense", 0.5), ("strict", 0.0), ("official", 1.0)):
        reward = DetectedGenEval(Told(found), reading=reading)  # type: ignore[arg-type]
        assert score(reward, painted(RED)[None], [Prompt("", metadata=TWO)]).total.tolist() == [expected]
    with pytest.raises(ValueError, match=r"reading: expected one of .* got 'offical'; the nearest is 'official'"):
        DetectedGenEval(Told([]), reading="offical")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected at most the rule's threshold, 0.1, got 0.3"):
        DetectedGenEval(Told([]), rule=GenEvalRule(threshold=0.1))


@pytest.mark.parametrize(("make", "save"), [(BoxDetector, save_detr), (InstanceDetector, save_mask2former)])
def test_real_detectors_and_a_real_clip_keep_the_contract(make: Any, save: Any, tmp_path: Path) -> None:
    save(tmp_path / "detector")
    save_clip(tmp_path / "clip")
    finder = make(DetectorSettings(str(tmp_path / "detector"), min_confidence=0.0))
    colors = ColorClassifier(ColorSettings(ClipSource(str(tmp_path / "clip"))))
    reward = DetectedGenEval(finder, colors, GenEvalRule(threshold=0.0))
    asked = [{"class": "cat", "count": 2, "color": "red"}, {"class": "bench", "count": 1, "position": ["above", 0]}]
    prompts = [Prompt("", metadata={"tag": "position", "include": asked[: 1 + index % 2]}) for index in range(4)]
    images = pictures(4, SIDE)
    check_reward(reward, images, prompts)
    assert np.isfinite(score(reward, images, prompts).total).all()
