"""The embedded world's policy: KontextPolicy at a tiny size, saved as one folder.

A folder holds ``config.json`` (transformer configuration, vocabulary, sizes) and ``model.safetensors`` (the
transformer under ``transformer.``, the word encoder under ``words.``, the codec under ``codec.``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agents.policies.scenes_parts import PatchCodec, WordEncoder
from agents.policies.unipic2 import KontextPolicy

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


@dataclass(frozen=True)
class ScenesPolicyConfig:
    """Sizes of the tiny policy.

    Attributes:
        vocabulary: known words, in order.
        image_size: side of the square image in pixels.
        patch_size: side of the codec's patches in pixels; one patch is one token.
        latent_channels: components kept of a patch.
        width: width of the transformer and of the text states.
        num_layers: joint transformer blocks.
        num_heads: attention heads.
        text_length: padded words of a prompt.
        edit_text_length: padded words of an instruction.
        num_inference_steps: how the policy is drawn from where nothing else is said: ODE steps,
        guidance_scale: guidance,
        sigma_shift: and the schedule's shift, which is the one that it was trained with.
    """

    vocabulary: tuple[str, ...]
    image_size: int = 48
    patch_size: int = 8
    latent_channels: int = 48
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    text_length: int = 14
    edit_text_length: int = 24
    num_inference_steps: int = 8
    guidance_scale: float = 2.5
    sigma_shift: float = 4.0


class _Words(nn.Module):
    """The word encoder with the two padded lengths."""

    def __init__(self, config: ScenesPolicyConfig) -> None:
        super().__init__()
        self.lengths = (config.text_length, config.edit_text_length)
        self.encoder = WordEncoder(config.vocabulary, config.width, max(self.lengths))

    def encode(self, texts: Sequence[str], has_source: bool) -> tuple[Tensor, Tensor]:
        """Texts to (states, pooled), padded to the task's length."""
        tokens = self.encoder.tokenize(texts, self.lengths[has_source])
        states, pooled = self.encoder(tokens.to(self.encoder.words.weight.device))
        return states, pooled


class ScenesPolicy(KontextPolicy):
    """A KontextPolicy with a word encoder and a patch codec; about 2.5 million parameters.

    Args:
        config: the sizes.
        seed: seed of the initial weights; the global generator is left as it was.
    """

    def __init__(self, config: ScenesPolicyConfig, seed: int = 0) -> None:
        self.config = config
        side = config.image_size // config.patch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            build: Any = SD3Transformer2DModel
            transformer: nn.Module = build(
                sample_size=side,
                patch_size=1,
                in_channels=config.latent_channels,
                out_channels=config.latent_channels,
                num_layers=config.num_layers,
                attention_head_dim=config.width // config.num_heads,
                num_attention_heads=config.num_heads,
                joint_attention_dim=config.width,
                caption_projection_dim=config.width,
                pooled_projection_dim=config.width,
                pos_embed_max_size=side,
                qk_norm="rms_norm",
            )
            self.words = _Words(config).eval()
        codec = PatchCodec(config.patch_size, config.latent_channels)
        super().__init__(transformer.eval(), self.words, codec, (config.image_size,) * 2, (side, side))

    @property
    def parts(self) -> nn.ModuleDict:
        """Everything that is saved, by name."""
        codec = self.codec
        assert isinstance(codec, PatchCodec)
        return nn.ModuleDict({"transformer": self.transformer, "words": self.words, "codec": codec})

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write ``config.json`` and ``model.safetensors``; the codec keeps float32."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: tensor.detach().to(torch.float32 if name.startswith("codec.") else dtype).contiguous()
            for name, tensor in self.parts.state_dict().items()
            if not name.endswith("pos_embed.pos_embed")
        }
        save_file(state, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(asdict(self.config), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ScenesPolicy:
        """Read a folder written by :meth:`save`; weights become float32.

        Raises:
            ValueError: the folder is not one of ours, or its weights do not fit its configuration.
        """
        missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: expected a policy folder with {CONFIG_NAME} and {WEIGHTS_NAME}; no {missing}")
        raw = json.loads((folder / CONFIG_NAME).read_text())
        policy = cls(ScenesPolicyConfig(**{**raw, "vocabulary": tuple(raw["vocabulary"])}))
        state = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_NAME).items()}
        found = policy.parts.load_state_dict(state, strict=False)
        absent = [name for name in found.missing_keys if not name.endswith("pos_embed.pos_embed")]
        if absent or found.unexpected_keys:
            raise ValueError(f"{folder}: weights do not fit: missing {absent}, unexpected {found.unexpected_keys}")
        return policy
