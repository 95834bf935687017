"""Detectors of the real classes with random weights, saved as they lie on the hub."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    ResNetConfig,
)
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from rewards.tiny.clip import CONTEXT, clip_tokenizer, randomised
from rewards.tiny.detectors import SIZE, labels_of, swin
from tests.rewards.tiny_models import bert_tokenizer


def save_detr(folder: Path) -> DetrForObjectDetection:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=10, **labels_of(),
    )  # fmt: skip
    model = DetrForObjectDetection(config)
    randomised(model)
    model.save_pretrained(folder)
    DetrImageProcessorPil(size=SIZE).save_pretrained(folder)
    return model


def save_owlv2(folder: Path) -> Owlv2ForObjectDetection:
    size = len(clip_tokenizer())
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": 0}
    config = Owlv2Config(
        text_config={**tiny, **tokens, "max_position_embeddings": CONTEXT},
        vision_config={**tiny, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = Owlv2ForObjectDetection(config)
    randomised(model, scale=0.1)
    model.save_pretrained(folder)
    processor = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    Owlv2Processor(image_processor=processor, tokenizer=clip_tokenizer()).save_pretrained(folder)
    return model


def save_grounding_dino(folder: Path) -> GroundingDinoForObjectDetection:
    text = {"model_type": "bert", "vocab_size": len(bert_tokenizer()), "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 256}  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin("stage2", "stage3", "stage4"), text_config=text, d_model=64, encoder_layers=1,
        decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        num_queries=10, max_text_len=64,
    )  # fmt: skip
    model = GroundingDinoForObjectDetection(config)
    randomised(model)
    model.save_pretrained(folder)
    processor = GroundingDinoImageProcessorPil(size=SIZE)
    GroundingDinoProcessor(image_processor=processor, tokenizer=bert_tokenizer()).save_pretrained(folder)
    return model
