"""Detectors that are asked for classes by name, so that any prompt can be scored: OWLv2 and Grounding DINO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image

from rewards.base import Images
from rewards.checkpoints import Once
from rewards.detectors import DetectorSettings, Found, boxes_found, load_detector, run_detector

_AUTO_CLASS = "AutoModelForZeroShotObjectDetection"


class OwlDetector:
    """OWL-ViT or OWLv2 of transformers, such as ``google/owlv2-base-patch16-ensemble``: boxes, no masks.

    It wants ``query="a photo of a {}"``. The classes of a prompt compete for each box; images are shown one by one with
    the classes of their own prompt.
    """

    is_original = False

    def __init__(self, settings: DetectorSettings) -> None:
        self.settings = settings
        self._model = Once(partial(load_detector, _AUTO_CLASS, settings))

    def known(self) -> None:
        """Any class."""

    def find(self, images: Images, asked: Sequence[Sequence[str]]) -> list[list[Found]]:
        """See :class:`rewards.detectors.Finder`; only what is asked for is found."""
        return [self._one(image, classes) for image, classes in zip(images, asked, strict=True)]

    def _one(self, image: Images, classes: Sequence[str]) -> list[Found]:
        model, processor = self._model()
        queries = [self.settings.query.format(name) for name in classes]
        inputs = processor(images=Image.fromarray(image), text=[queries], return_tensors="pt", padding="max_length")
        (result,) = processor.post_process_grounded_object_detection(
            run_detector(model, inputs, self.settings.placement),
            threshold=self.settings.min_confidence,
            target_sizes=[image.shape[:2]],
        )
        return boxes_found(result, [classes[int(index)] for index in result["labels"]])


class GroundingDetector:
    """Grounding DINO of transformers, such as ``IDEA-Research/grounding-dino-tiny``: boxes, no masks.

    It wants the plain name as the query. A box belongs to the class that has its likeliest token, with that token's
    probability as the confidence.

    Differs: the published demonstration joins all tokens above a threshold to a phrase, which may be of two classes or
    of none; a box here always has one class.
    """

    is_original = False

    def __init__(self, settings: DetectorSettings) -> None:
        self.settings = settings
        self._model = Once(partial(load_detector, _AUTO_CLASS, settings))

    def known(self) -> None:
        """Any class."""

    def find(self, images: Images, asked: Sequence[Sequence[str]]) -> list[list[Found]]:
        """See :class:`rewards.detectors.Finder`; only what is asked for is found."""
        return [self._one(image, classes) for image, classes in zip(images, asked, strict=True)]

    def _one(self, image: Images, classes: Sequence[str]) -> list[Found]:
        import torch

        model, processor = self._model()
        queries = [self.settings.query.format(name.replace(".", " ")) for name in classes]
        inputs = processor(images=Image.fromarray(image), text=[queries], return_tensors="pt")
        outputs = run_detector(model, inputs, self.settings.placement)
        # A threshold below every probability keeps the boxes in the order of the logits.
        (result,) = processor.post_process_grounded_object_detection(
            outputs, input_ids=inputs["input_ids"], threshold=-1.0, target_sizes=[image.shape[:2]]
        )
        probabilities = outputs.logits[0].float().sigmoid().cpu()
        spans = _spans(inputs["input_ids"][0].tolist(), processor.tokenizer)
        by_class = torch.stack([probabilities[:, span].amax(-1) for span in spans], dim=-1)
        scores, best = by_class.max(-1)
        found = boxes_found({**result, "scores": scores}, [classes[index] for index in best.tolist()])
        return [one for one in found if one.detection.confidence > self.settings.min_confidence]


def _spans(ids: Sequence[int], tokenizer: Any) -> list[list[int]]:
    """Where the tokens of each class are in "[CLS] one . two . [SEP]"."""
    stop = tokenizer.convert_tokens_to_ids(".")
    special = set(tokenizer.all_special_ids)
    spans: list[list[int]] = [[]]
    for position, token in enumerate(ids):
        if token == stop:
            spans.append([])
        elif token not in special:
            spans[-1].append(position)
    return [span for span in spans if span]
