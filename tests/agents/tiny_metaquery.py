"""A tiny UniPic2-MetaQuery of the real classes, in a folder as a published one."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from agents.policies.backbone import BackboneSettings
from agents.policies.connector import ConnectorConfig
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.metaquery_parts import MetaQueryPipeline
from agents.policies.tiny.vae import tiny_vae
from rewards.judges.tiny import TinyVLM, save_tiny_vlm, tiny_model, tiny_tokenizer

NUM_QUERIES = 6
SHAPE = TinyVLM(width=64, num_layers=2, initializer_range=0.1)
WORDS = ("Generate an image: a red circle", " blue", " make", "make", " the", " square", " bad", "bad")


def make_metaquery(root: Path, settings: BackboneSettings) -> Path:
    """Put a tiny SD3, a tiny VAE, a tiny Qwen2.5-VL and a new connector together; -> the folder."""
    torch.manual_seed(0)
    SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
    ).save_pretrained(root / "sd3" / "transformer")
    tiny_vae(1.5, 0.06, latent_channels=4).save_pretrained(root / "sd3" / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(root / "sd3" / "scheduler")
    tokenizer = tiny_tokenizer(WORDS)
    save_tiny_vlm(root / "qwen", SHAPE, tokenizer, tiny_model(SHAPE, tokenizer))
    sizes = ConnectorConfig(
        NUM_QUERIES, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    pipeline = MetaQueryPipeline.from_parts(root / "sd3", root / "qwen", sizes, settings=settings)
    MetaQueryPolicy(pipeline, settings).save(root / "policy")
    return root / "policy"
