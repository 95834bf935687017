"""ImageReward: BLIP trained on people's rankings of images of one prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.base import Images, Prompt, Scores
from rewards.checkpoints import (
    Once,
    Placement,
    check_source,
    load_strictly,
    load_tensors,
    local_file,
    scorer_traits,
    scores_at,
    with_text,
)
from rewards.linear_heads import linear_head

if TYPE_CHECKING:
    import torch

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores over the authors' data."""
MAX_TOKENS = 35
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
_LARGE: dict[str, Any] = {
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                      "num_attention_heads": 16, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6},
    "text_config": {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072,
                    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512},
}  # fmt: skip
"""BLIP-large as ImageReward has it: ViT-L/16 at 224 pixels, and BERT-base with cross-attention."""
_RENAMED = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)
"""From BLIP's own names to those of transformers; the text encoder's are the same."""
_UNUSED = ("vision_proj.", "text_proj.", "text_encoder.embeddings.position_ids")


@dataclass(frozen=True)
class ImageRewardSettings:
    """How ImageReward is computed.

    Attributes:
        weights: a path or "owner/model:file" of the hub, in the published format.
        tokenizer: a folder or a hub id; BERT's.
        config: a folder or a hub id with the configuration of another BLIP; empty: BLIP-large, as published.
        placement: device, precision and batch size; the head is in float32 always, as published.

    Raises:
        ValueError: a path that leads nowhere.
    """

    weights: str = "THUDM/ImageReward:ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"
    config: str = ""
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        check_source("weights", self.weights)
        check_source("tokenizer", self.tokenizer)
        if self.config:
            check_source("config", self.config)


class ImageReward:
    """ImageReward, a reward of about -2.3 to 2.

    score = (head(h_[CLS]) - 0.16717) / 1.03334,  h = BERT(prompt; cross-attention to ViT(image))

    Xu et al., arXiv:2304.05977; THUDM/ImageReward, BLIP-large. Prompts are cut at 35 tokens, as published, so that the
    end of a long one counts for nothing. Each image is seen with its own prompt alone: the published ``inference_rank``
    called with lists scores every image with every prompt. A prompt without text is not available.

    Differs: the published code scores one image at a time, this a batch of pairs; the numbers agree to rounding.
    """

    def __init__(self, settings: ImageRewardSettings | None = None) -> None:
        self.settings = settings or ImageRewardSettings()
        self.traits = scorer_traits("ImageReward", self.settings, self.settings.placement)
        self._models = Once(self._load)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3], one prompt each -> [B]."""
        rows, reasons = with_text(prompts)
        values = self._values(images[rows], [prompts[row].text for row in rows]) if rows else np.zeros(0)
        return scores_at(values, rows, len(images), reasons)

    def _values(self, images: Images, texts: Sequence[str]) -> NDArray[np.float64]:
        import torch

        blip, head, tokenizer = self._models()
        device, dtype = self.settings.placement.device, self.settings.placement.torch_dtype
        pixels = clip_pixels(images, blip.config.vision_config.image_size)
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.no_grad():
            seen = blip.vision_model(pixel_values=torch.from_numpy(pixels).to(device, dtype)).last_hidden_state
            read = blip.text_encoder(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
            ).last_hidden_state
            raw = head(read[:, 0].float())[:, 0]
        return np.asarray((raw.double().cpu().numpy() - MEAN) / STD)

    def _load(self) -> tuple[Any, torch.nn.Sequential, Any]:
        from transformers import AutoTokenizer, BlipConfig, BlipForImageTextRetrieval

        settings = self.settings
        config = BlipConfig.from_pretrained(settings.config) if settings.config else BlipConfig(**_LARGE)
        blip_tensors, head_tensors = split_checkpoint(load_tensors(local_file(settings.weights)))
        head = linear_head(head_tensors, settings.weights)
        blip: Any = BlipForImageTextRetrieval(config)
        unused = {
            name: tensor for name, tensor in blip.state_dict().items() if name.startswith(("itm_head.", *_UNUSED))
        }
        load_strictly(blip, {**unused, **blip_tensors}, settings.weights)
        placed = blip.to(settings.placement.device, settings.placement.torch_dtype).eval()
        return placed, head.to(settings.placement.device), AutoTokenizer.from_pretrained(settings.tokenizer)


def split_checkpoint(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A published checkpoint's BLIP, by the names of transformers' ``BlipForImageTextRetrieval``, and its head.

    The projections of BLIP's contrastive loss, which the score does not use, are left out.

    Raises:
        ValueError: a name that is of neither.
    """
    blip: dict[str, torch.Tensor] = {}
    head: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "mlp":
            head[rest] = tensor
        elif part == "blip":
            if not rest.startswith(_UNUSED):
                blip[_renamed(rest)] = tensor
        else:
            raise ValueError(f"expected ImageReward's tensors, blip.* and mlp.*, got {name!r}")
    return blip, head


def clip_pixels(images: Images, side: int) -> NDArray[np.float32]:
    """CLIP's preprocessing: the short side resized to ``side``, bicubic, the centre cut out, normalised.

    Images uint8 [B, H, W, 3] -> [B, 3, side, side].
    """
    height, width = images.shape[1:3]
    scale = side / min(height, width)
    size = (max(int(width * scale), side), max(int(height * scale), side))
    left, top = (round((length - side) / 2) for length in size)
    cut = [
        np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))[top : top + side, left : left + side]
        for image in images
    ]
    pixels = (np.stack(cut) / 255.0 - PIXEL_MEAN) / PIXEL_STD
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    return name
