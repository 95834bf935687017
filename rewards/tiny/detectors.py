"""A Mask2Former of the real class with random weights, saved as it lies on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from rewards.tiny.clip import randomised

SIDE = 64
SIZE = {"height": SIDE, "width": SIDE}
CLASSES = ("bench", "cat", "mouse")


def labels_of(classes: Sequence[str] = CLASSES) -> dict[str, Any]:
    """A configuration's two tables of class names."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}


def swin(*stages: str) -> SwinConfig:
    """A backbone."""
    build: Any = SwinConfig
    made: SwinConfig = build(
        image_size=SIDE,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=list(stages),
    )
    return made


def save_mask2former(
    folder: Path, classes: Sequence[str] = CLASSES, certainty: float = 1.0
) -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former that knows some classes, with its image processor; what it finds depends on the image.

    Args:
        folder: made where it is missing.
        classes: what it knows.
        certainty: by which the classes' logits grow; a random one finds nothing with 0.3 and more at 1, much at 3.
    """
    config = Mask2FormerConfig(
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"), feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=32, num_queries=12, **labels_of(classes),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
    randomised(model)
    model.class_predictor.weight.data *= certainty
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size=SIZE).save_pretrained(folder)
    return model
