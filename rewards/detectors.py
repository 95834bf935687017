"""Objects in images without mmdet: the detectors of transformers behind one shape, for the GenEval rule.

None of them is the detector that GenEval's published numbers were measured with (mmdet's
``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``), and a confidence of 0.3 or 0.9 means something else for each: what
is computed from them is labelled "not comparable", see :mod:`rewards.detected`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.base import Images
from rewards.checkpoints import Once, Placement, check_source, image_processor
from rewards.geneval import Detection
from rewards.relations import Box

COCO_TO_GENEVAL = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""The classes that GenEval's prompts name otherwise than COCO; the other 77 are the same."""


@dataclass(frozen=True)
class Found:
    """A detection, of unknown colour, and its mask where the detector has masks: bool [H, W]."""

    detection: Detection
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class DetectorSettings:
    """Which detector, and how it is run.

    Attributes:
        model: a folder or a hub id with weights, configuration and processor.
        min_confidence: detections below it are dropped early; no more than the rule's threshold.
        names: from the detector's class names to GenEval's, where they differ.
        query: open vocabularies only: how a class is asked for; {} is its name.
        placement: device, precision, batch size.

    Raises:
        ValueError: a path that leads nowhere, a confidence outside [0, 1], or a query without {}.
    """

    model: str
    min_confidence: float = 0.3
    names: Mapping[str, str] = field(default_factory=lambda: dict(COCO_TO_GENEVAL))
    query: str = "{}"
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        check_source("model", self.model)
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence: expected a number in [0, 1], got {self.min_confidence}")
        if self.query.count("{}") != 1:
            raise ValueError(f"query: expected one {{}} for the class's name, got {self.query!r}")


class Finder(Protocol):
    """A detector that is told which classes are asked for.

    Attributes:
        settings: which detector; part of the fingerprint.
        is_original: whether this is GenEval's own detector, so that numbers are comparable with published ones.
    """

    @property
    def settings(self) -> DetectorSettings: ...  # noqa: D102

    @property
    def is_original(self) -> bool: ...  # noqa: D102

    def known(self) -> tuple[str, ...] | None:
        """The classes that it can find; None: any."""
        ...

    def find(self, images: Images, asked: Sequence[Sequence[str]]) -> list[list[Found]]:
        """Images uint8 [B, H, W, 3] and the classes asked for in each to what was found in each."""
        ...


class InstanceDetector:
    """Mask2Former, or another universal segmentation model of transformers: masks, and boxes around them.

    ``facebook/mask2former-swin-small-coco-instance`` is the nearest to GenEval's: the same architecture and data,
    other weights. Its confidence is the class's probability times the mean probability of the mask. The processor has
    to resize to one size, as the published one does: transformers maps masks back as if nothing had been padded.
    """

    is_original = False

    def __init__(self, settings: DetectorSettings) -> None:
        self.settings = settings
        self._model = Once(partial(load_detector, "AutoModelForUniversalSegmentation", settings))

    def known(self) -> tuple[str, ...]:
        """The model's classes under GenEval's names."""
        return _classes(self._model()[0], self.settings.names)

    def find(self, images: Images, asked: Sequence[Sequence[str]]) -> list[list[Found]]:
        """See :class:`Finder`; every class that the model has is found, asked for or not."""
        model, processor = self._model()
        outputs = run_detector(model, _inputs(processor, images), self.settings.placement)
        results = processor.post_process_instance_segmentation(
            outputs,
            threshold=self.settings.min_confidence,
            target_sizes=[images.shape[1:3]] * len(images),
            return_binary_maps=True,
        )
        return [self._found(result, model.config.id2label) for result in results]

    def _found(self, result: Mapping[str, Any], labels: Mapping[int, str]) -> list[Found]:
        maps, found = result["segmentation"], []
        for segment, mask in zip(result["segments_info"], maps if len(result["segments_info"]) else (), strict=True):
            inside = np.asarray(mask.cpu().numpy() > 0)
            label = _renamed(labels[segment["label_id"]], self.settings.names)
            found.append(Found(Detection(label, _box_around(inside), None, float(segment["score"])), inside))
        return found


class BoxDetector:
    """DETR, or another object detector of transformers with fixed classes: boxes, no masks.

    Without a mask GenEval's colour classification sees the box's whole content.
    """

    is_original = False

    def __init__(self, settings: DetectorSettings) -> None:
        self.settings = settings
        self._model = Once(partial(load_detector, "AutoModelForObjectDetection", settings))

    def known(self) -> tuple[str, ...]:
        """The model's classes under GenEval's names."""
        return _classes(self._model()[0], self.settings.names)

    def find(self, images: Images, asked: Sequence[Sequence[str]]) -> list[list[Found]]:
        """See :class:`Finder`; every class that the model has is found, asked for or not."""
        model, processor = self._model()
        outputs = run_detector(model, _inputs(processor, images), self.settings.placement)
        results = processor.post_process_object_detection(
            outputs, threshold=self.settings.min_confidence, target_sizes=[images.shape[1:3]] * len(images)
        )
        names = model.config.id2label
        labels = [[_renamed(names[int(i)], self.settings.names) for i in result["labels"]] for result in results]
        return [boxes_found(result, found) for result, found in zip(results, labels, strict=True)]


def load_detector(auto_class: str, settings: DetectorSettings) -> tuple[Any, Any]:
    """A model of one of transformers' auto classes, and its processor."""
    import transformers

    if auto_class == "AutoModelForZeroShotObjectDetection":
        auto: Any = transformers.AutoProcessor
        processor = auto.from_pretrained(settings.model, backend="pil")
    else:
        processor = image_processor(settings.model)
    model: Any = getattr(transformers, auto_class).from_pretrained(settings.model, dtype=settings.placement.torch_dtype)
    return model.to(settings.placement.device).eval(), processor


def _inputs(processor: Any, images: Images) -> Any:
    return processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")


def run_detector(model: Any, inputs: Any, placement: Placement) -> Any:
    """A model's outputs for a processor's inputs, without gradients."""
    import torch

    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    placed = {name: value.to(placement.device) for name, value in tensors.items()}
    floats = {name: value.to(placement.torch_dtype) for name, value in placed.items() if value.is_floating_point()}
    with torch.no_grad():
        return model(**{**placed, **floats})


def _classes(model: Any, names: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(_renamed(label, names) for label in model.config.id2label.values())


def _renamed(label: str, names: Mapping[str, str]) -> str:
    return names.get(label, label)


def boxes_found(result: Mapping[str, Any], labels: Sequence[str]) -> list[Found]:
    """Boxes and scores as transformers post-processes them, with the label of each."""
    rows = zip(labels, result["boxes"].float().tolist(), result["scores"].float().tolist(), strict=True)
    return [Found(Detection(label, (x0, y0, x1, y1), None, score)) for label, (x0, y0, x1, y1), score in rows]


def _box_around(mask: NDArray[np.bool_]) -> Box:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return 0.0, 0.0, 0.0, 0.0
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
