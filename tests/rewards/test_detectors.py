"""Detectors of transformers behind the Detection struct: labels, boxes and confidences from the models' raw outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor

from rewards.detectors import COCO_TO_GENEVAL, BoxDetector, DetectorSettings, Finder, Found, InstanceDetector
from rewards.text_detectors import GroundingDetector, OwlDetector
from rewards.tiny.detectors import SIDE, save_mask2former
from tests.rewards.tiny_detectors import save_detr, save_grounding_dino, save_owlv2
from tests.rewards.tiny_models import pictures

IMAGES = pictures(2, SIDE)
GENEVAL_ONLY = {"computer mouse", "tv remote", "computer keyboard"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("detectors")
    for name, save in SAVED.items():
        save(root / name)
    return root


SAVED: dict[str, Callable[[Path], Any]] = {
    "mask2former": save_mask2former,
    "detr": save_detr,
    "owlv2": save_owlv2,
    "grounding_dino": save_grounding_dino,
}
FINDERS: dict[str, Callable[[DetectorSettings], Finder]] = {
    "mask2former": InstanceDetector,
    "detr": BoxDetector,
    "owlv2": OwlDetector,
    "grounding_dino": GroundingDetector,
}


def made(folder: Path, name: str, min_confidence: float = 0.0) -> Finder:
    return FINDERS[name](DetectorSettings(str(folder / name), min_confidence))


Table = list[tuple[float, str, tuple[float, ...]]]


def table(found: list[Found]) -> Table:
    rows = [(one.detection.confidence, one.detection.label, tuple(np.round(one.detection.box, 2))) for one in found]
    return sorted((round(confidence, 4), label, box) for confidence, label, box in rows)


def corners(boxes: torch.Tensor, side: float) -> list[tuple[float, ...]]:
    """(cx, cy, w, h) in shares of the side to (x0, y0, x1, y1) in pixels."""
    pixels = (side * boxes).tolist()
    return [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in pixels]


def expected_table(scores: Any, labels: list[str], boxes: list[tuple[float, ...]]) -> Table:
    rows = zip(scores, labels, boxes, strict=True)
    return sorted((round(float(score), 4), label, tuple(np.round(box, 2))) for score, label, box in rows)


def same(found: list[Found], expected: Table) -> None:
    got = table(found)
    assert [row[1] for row in got] == [row[1] for row in expected]
    np.testing.assert_allclose([row[0] for row in got], [row[0] for row in expected], atol=2e-4)
    np.testing.assert_allclose([row[2] for row in got], [row[2] for row in expected], atol=0.05)


def test_detr_is_the_likeliest_class_of_each_query(folder: Path) -> None:
    from transformers import DetrForObjectDetection

    model = DetrForObjectDetection.from_pretrained(folder / "detr").eval()
    inputs = AutoImageProcessor.from_pretrained(folder / "detr", backend="pil")([IMAGES[0]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    # The last class is "no object".
    scores, best = outputs.logits[0].softmax(-1)[:, :-1].max(-1)
    names = ["bench", "cat", "computer mouse"]
    expected = expected_table(scores, [names[i] for i in best], corners(outputs.pred_boxes[0], SIDE))
    (first, _) = made(folder, "detr").find(IMAGES, [["cat"]] * 2)
    same(first, expected)
    assert {one.mask is None and one.detection.color is None for one in first} == {True}


def test_mask2former_is_the_class_times_the_mean_of_its_mask(folder: Path) -> None:
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder / "mask2former").eval()
    inputs = AutoImageProcessor.from_pretrained(folder / "mask2former", backend="pil")([IMAGES[0]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    classes = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
    masks = torch.nn.functional.interpolate(outputs.masks_queries_logits, size=(384, 384), mode="bilinear")[0]
    best = classes.flatten().topk(classes.shape[0])
    expected = []
    for value, index in zip(best.values, best.indices, strict=True):
        mask = masks[index // classes.shape[1]]
        if (mask > 0).any():
            expected.append(float(value * mask.sigmoid()[mask > 0].mean()))
    found = made(folder, "mask2former").find(IMAGES, [["cat"]] * 2)[0]
    np.testing.assert_allclose(sorted(one.detection.confidence for one in found), sorted(expected), atol=1e-4)
    for one in found:
        assert one.mask is not None
        assert one.mask.shape == (SIDE, SIDE)
        x0, y0, x1, y1 = map(int, one.detection.box)
        assert one.mask[y0:y1, x0:x1].sum() == one.mask.sum() > 0
        assert one.mask[:, x0].any()
        assert one.mask[y1 - 1].any()


def test_owlv2_is_the_likeliest_query_of_each_box(folder: Path) -> None:
    from transformers import Owlv2ForObjectDetection

    model = Owlv2ForObjectDetection.from_pretrained(folder / "owlv2").eval()
    processor = AutoProcessor.from_pretrained(folder / "owlv2", backend="pil")
    classes = ["cat", "dog"]
    inputs = processor(
        images=IMAGES[0], text=[["a photo of a cat", "a photo of a dog"]], return_tensors="pt", padding="max_length"
    )
    with torch.no_grad():
        outputs = model(**inputs)
    scores, best = outputs.logits[0].sigmoid().max(-1)
    expected = expected_table(scores, [classes[i] for i in best], corners(outputs.pred_boxes[0], SIDE))
    owl = OwlDetector(DetectorSettings(str(folder / "owlv2"), 0.0, query="a photo of a {}"))
    same(owl.find(IMAGES[:1], [classes])[0], expected)


def test_grounding_dino_is_the_class_of_the_likeliest_token(folder: Path) -> None:
    from transformers import GroundingDinoForObjectDetection

    model = GroundingDinoForObjectDetection.from_pretrained(folder / "grounding_dino").eval()
    processor = AutoProcessor.from_pretrained(folder / "grounding_dino", backend="pil")
    inputs = processor(images=IMAGES[0], text=[["cat", "hot dog"]], return_tensors="pt")
    # One letter is one token: [CLS] c a t . h o t d o g . [SEP]
    assert inputs["input_ids"].shape == (1, 13)
    with torch.no_grad():
        outputs = model(**inputs)
    tokens = outputs.logits[0].sigmoid()
    by_class = torch.stack([tokens[:, 1:4].amax(-1), tokens[:, 5:11].amax(-1)], -1)
    scores, best = by_class.max(-1)
    expected = expected_table(scores, [["cat", "hot dog"][i] for i in best], corners(outputs.pred_boxes[0], SIDE))
    same(made(folder, "grounding_dino").find(IMAGES[:1], [["cat", "hot dog"]])[0], expected)


@pytest.mark.parametrize("name", SAVED)
def test_an_image_is_read_by_itself_and_low_confidences_are_dropped(folder: Path, name: str) -> None:
    every = made(folder, name).find(IMAGES, [["cat"], ["bench", "cat"]])
    assert [len(found) > 1 for found in every] == [True, True]
    alone = made(folder, name).find(IMAGES[1:], [["bench", "cat"]])[0]
    same(alone, table(every[1]))
    confidences = sorted(one.detection.confidence for one in alone)
    middle = (confidences[0] + confidences[-1]) / 2
    kept = made(folder, name, middle).find(IMAGES[1:], [["bench", "cat"]])[0]
    assert 0 < len(kept) < len(alone)
    assert min(one.detection.confidence for one in kept) >= middle - 1e-6


def test_fixed_classes_have_genevals_names_and_open_ones_are_any(folder: Path) -> None:
    assert made(folder, "detr").known() == made(folder, "mask2former").known() == ("bench", "cat", "computer mouse")
    assert made(folder, "owlv2").known() is made(folder, "grounding_dino").known() is None
    assert set(COCO_TO_GENEVAL.values()) == GENEVAL_ONLY


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"model": "/none/detr"}, "model: expected a file or a folder, got '/none/detr'"),
        ({"min_confidence": 2.0}, r"min_confidence: expected a number in \[0, 1\], got 2.0"),
        ({"query": "a photo"}, "query: expected one {} for the class's name, got 'a photo'"),
    ],
)
def test_a_wrong_setting_is_named(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectorSettings(**{"model": "facebook/detr-resnet-50", **field})
