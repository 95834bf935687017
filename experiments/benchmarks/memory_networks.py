"""The published networks on torch's meta device, with a few blocks of each kind: sizes, inputs, adapters.

Sizes are those of the released checkpoints: SD3.5-Medium's (``sd35_medium_config``), and diffusers' own for
FLUX.1-Kontext-dev and Qwen-Image-Edit-2509.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from agents.algorithms.base import Algorithm
from agents.policies.base import JOINT_ATTENTION
from agents.policies.sd3 import sd35_medium_config
from agents.policies.unipic2 import kontext_velocity
from agents.policies.weights import LoraSettings, LoraWeights
from experiments.recipes.sd3 import SD3
from experiments.recipes.unipic2 import KONTEXT, METAQUERY
from pdtr.config import TrainConfig

Forward = Callable[[], Tensor]
Blocks = Mapping[str, int]
FLUX, QWEN = Path("black-forest-labs/FLUX.1-Kontext-dev"), Path("Qwen/Qwen-Image-Edit-2509")
_PIXELS_A_LATENT, _PIXELS_A_TOKEN, _WIDTH = 8, 16, 64
# CLIP's tokens and T5's for SD3; MetaQuery's queries; for Qwen-Image-Edit a template, a source and an instruction.
_CLIP_TOKENS, _T5_TOKENS, _QUERIES, _QWEN_TOKENS = 77, 256, 256, 512


@dataclass(frozen=True)
class Network:
    """One network, and what it is counted with.

    Attributes:
        sequences: that go through it at once: a chunk's samples, twice where both branches of guidance learn.
        few: blocks of each kind to count with; two of the first kind, for the first block's input needs no gradient.
        many: blocks of each kind that the published network has.
        build: from blocks of each kind to the network, with adapters, and its forward pass.
    """

    sequences: int
    few: Blocks
    many: Blocks
    build: Callable[[Blocks], tuple[Any, Forward]]


def network_of(config: TrainConfig, task: str) -> Network:
    """The network of a published recipe, with the inputs of one of its tasks.

    Raises:
        ValueError: the recipe's base is none of those known here, or it has no adapters.
    """
    known = {SD3: _sd3, KONTEXT: _sd3, METAQUERY: _sd3, FLUX: _flux, QWEN: _qwen}
    if config.base not in known or config.backbone is None or config.lora is None:
        raise ValueError(
            f"recipe: expected adapters on one of {', '.join(map(str, known))}, got {config.base} with "
            f"{'full training' if config.lora is None else 'adapters'}"
        )
    sequences = config.chunk_size * getattr(config.algorithm, "steps_per_forward", 1) * _branches(config.algorithm)
    return known[config.base](config, 1 if task == "edit" else 0, sequences)


def _branches(algorithm: Algorithm) -> int:
    """Branches of guidance that learn: none but the first in DiffusionNFT, unless it says so."""
    return 2 if algorithm.sampler().guidance_scale != 1.0 and getattr(algorithm, "is_guided", True) else 1


def _sd3(config: TrainConfig, num_references: int, sequences: int) -> Network:
    assert config.backbone is not None
    own = config.backbone.max_sequence_length or _T5_TOKENS
    num_texts = _QUERIES if config.base == METAQUERY else _CLIP_TOKENS + own
    height, width = config.backbone.height // _PIXELS_A_LATENT, config.backbone.width // _PIXELS_A_LATENT

    def build(blocks: Blocks) -> tuple[Any, Forward]:
        from diffusers import SD3Transformer2DModel

        layers = {"num_layers": sum(blocks.values()), "dual_attention_layers": tuple(range(blocks["dual"]))}
        network = _made(SD3Transformer2DModel, {**sd35_medium_config(), **layers}, config.lora)
        latents = _empty(sequences, 16, height, width)
        tensors = {f"reference_{index}": latents for index in range(num_references)}
        tensors |= {"prompt_embeds": _empty(sequences, num_texts, 4096), "pooled": _empty(sequences, 2048)}
        return network, partial(kontext_velocity, network, latents, _empty(sequences), tensors)

    # The last block, of the second kind, leaves the texts' half out.
    return Network(sequences, {"dual": 2, "single": 2}, {"dual": 13, "single": 11}, build)


def _flux(config: TrainConfig, num_references: int, sequences: int) -> Network:
    assert config.backbone is not None
    num_texts, num_images = config.backbone.max_sequence_length, (1 + num_references) * _num_tokens(config)

    def build(blocks: Blocks) -> tuple[Any, Forward]:
        from diffusers import FluxTransformer2DModel

        layers = {"num_layers": blocks["double"], "num_single_layers": blocks["single"]}
        network = _made(FluxTransformer2DModel, {"guidance_embeds": True, **layers}, config.lora)
        inputs = {
            "hidden_states": _empty(sequences, num_images, _WIDTH),
            "timestep": _empty(sequences),
            "guidance": _empty(sequences),
            "pooled_projections": _empty(sequences, 768),
            "encoder_hidden_states": _empty(sequences, num_texts, 4096),
            "txt_ids": _empty(num_texts, 3).float(),
            "img_ids": _empty(num_images, 3).float(),
        }
        return network, lambda: network(**inputs, return_dict=False)[0]

    return Network(sequences, {"double": 2, "single": 2}, {"double": 19, "single": 38}, build)


def _qwen(config: TrainConfig, num_references: int, sequences: int) -> Network:
    assert config.backbone is not None
    side = (1, config.backbone.height // _PIXELS_A_TOKEN, config.backbone.width // _PIXELS_A_TOKEN)
    num_images = (1 + num_references) * _num_tokens(config)

    def build(blocks: Blocks) -> tuple[Any, Forward]:
        from diffusers import QwenImageTransformer2DModel

        network = _made(QwenImageTransformer2DModel, {"num_layers": blocks["double"]}, config.lora)
        inputs = {
            "hidden_states": _empty(sequences, num_images, _WIDTH),
            "timestep": _empty(sequences),
            "encoder_hidden_states": _empty(sequences, _QWEN_TOKENS, 3584),
            "img_shapes": [[side] * (1 + num_references)] * sequences,
        }
        return network, lambda: network(**inputs, return_dict=False)[0]

    return Network(sequences, {"double": 2}, {"double": 60}, build)


def _num_tokens(config: TrainConfig) -> int:
    assert config.backbone is not None
    return config.backbone.height * config.backbone.width // _PIXELS_A_TOKEN**2


def _made(kind: Any, sizes: Mapping[str, Any], lora: LoraSettings | None) -> Any:
    """A network in bfloat16 with one version of its adapters, the one that learns."""
    assert lora is not None
    with torch.device("meta"):
        # The method of torch itself: diffusers' own warns of layers that it would keep in float32.
        network = nn.Module.to(kind(**sizes), torch.bfloat16).eval()
        policy: Any = SimpleNamespace(transformer=network, lora_targets=JOINT_ATTENTION)
        LoraWeights(policy, lora, ())
    return network


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
