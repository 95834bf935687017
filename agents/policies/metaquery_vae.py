"""The VAE of a UniPic2-MetaQuery checkpoint: diffusers' AutoencoderKL, or the embedded world's patch codec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agents.policies.connector import CONFIG_NAME, WEIGHTS_NAME
from agents.policies.loading import model_file
from agents.policies.pictures import decoded, drawn_latents
from agents.policies.scenes_parts import PatchCodec

_PATCH_CODEC = "PatchCodec"


def save_codec(codec: PatchCodec, folder: Path) -> None:
    """Write a patch codec as a folder, in diffusers' layout."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"patch_size": codec.patch_size, "num_channels": len(codec.scale)}
    (folder / CONFIG_NAME).write_text(json.dumps({"_class_name": _PATCH_CODEC, **sizes}, indent=1) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in codec.state_dict().items()}, folder / WEIGHTS_NAME)


def load_vae(source: str | Path, dtype: torch.dtype) -> nn.Module:
    """The ``vae`` of a folder or a repository: AutoencoderKL, or the codec of :func:`save_codec`, float32 always."""
    from diffusers import AutoencoderKL

    config = json.loads(model_file(source, f"vae/{CONFIG_NAME}").read_text())
    if config["_class_name"] != _PATCH_CODEC:
        kl: Any = AutoencoderKL
        vae: nn.Module = kl.from_pretrained(str(source), subfolder="vae", torch_dtype=dtype)
        return vae
    codec = PatchCodec(config["patch_size"], config["num_channels"])
    codec.load_state_dict(load_file(model_file(source, f"vae/{WEIGHTS_NAME}")))
    return codec


def pixels_per_latent(vae: nn.Module) -> int:
    """Side in pixels of what becomes one latent."""
    if isinstance(vae, PatchCodec):
        return vae.patch_size
    config: Any = vae.config
    return int(2 ** (len(config.block_out_channels) - 1))


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Images, uint8 [B, H, W, 3], to latents [B, C, h, w]; UniPic2's released code samples the VAE's posterior."""
    return vae.encode(images) if isinstance(vae, PatchCodec) else drawn_latents(vae, images)


def decode_images(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] to images in [-1, 1], [B, 3, H, W]."""
    if isinstance(vae, PatchCodec):
        return vae.decode(latents).permute(0, 3, 1, 2).float() / 127.5 - 1
    return decoded(vae, latents)
