"""UniPic2-MetaQuery's connector: what stands between a frozen language model and an SD3 transformer.

``StableDiffusion3Conditioner`` of UniPic 2.0 (arXiv:2509.04548, released code), with its names of weights, so that a
published ``conditioner`` folder loads as it is. The encoder's layers are transformers' own SigLIP ones, which have the
published layers' form and names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

CONFIG_NAME, WEIGHTS_NAME = "config.json", "diffusion_pytorch_model.safetensors"
_PUBLISHED_CLASS = "StableDiffusion3Conditioner"
_LAYER_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_BIAS_STD = 1e-6


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes; the defaults are UniPic2-MetaQuery's, between Qwen2.5-VL-7B and SD3.5-Medium: 903,509,504 parameters.

    Attributes:
        num_queries: learnt tokens that are read behind the prompt.
        llm_hidden_size: width of the language model.
        hidden_size: width of the connector.
        intermediate_size: of its MLPs.
        num_hidden_layers: encoder layers.
        num_attention_heads: heads of a layer.
        joint_attention_dim: width of the SD3 transformer's text states,
        pooled_projection_dim: and of its pooled text state.
    """

    num_queries: int = 256
    llm_hidden_size: int = 3584
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )


class Connector(nn.Module):
    """Queries' states of the language model to an SD3 transformer's text states and pooled state.

    ``x = encoder(projector_1(states))``, ``prompt_embeds = projector_3(x)``, ``pooled = projector_2(mean over queries
    of x)``. The encoder has pre-LN layers, attends in both directions without a mask, and has neither positions nor a
    last norm: queries are told apart by what they are.

    New weights: queries ``N(0, 1 / llm_hidden_size)``, attention and MLPs Xavier, MLPs' biases of deviation 1e-6, other
    biases 0. Nothing says how the published projectors began; torch's own linear layers are kept. (A descendant of
    UniPic2's trainer starts projectors 2 and 3 at zero; on the embedded world that was not needed.)

    Args:
        config: see :class:`ConnectorConfig`.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.meta_queries = nn.Parameter(torch.randn(config.num_queries, config.llm_hidden_size))
        with torch.no_grad():
            self.meta_queries.mul_(config.llm_hidden_size**-0.5)
        self.projector_1 = nn.Linear(config.llm_hidden_size, config.hidden_size)
        build: Any = SiglipVisionConfig
        layers = build(**{name: getattr(config, name) for name in _LAYER_FIELDS}, attn_implementation="sdpa")
        self.connector = SiglipEncoder(layers)
        self.projector_2 = nn.Linear(config.hidden_size, config.pooled_projection_dim)
        self.projector_3 = nn.Linear(config.hidden_size, config.joint_attention_dim)
        self._initialize()

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States of the queries [B, N, llm_hidden_size] -> (prompt_embeds [B, N, D], pooled [B, P])."""
        hidden: Tensor = self.connector(self.projector_1(states)).last_hidden_state
        return self.projector_3(hidden), self.projector_2(hidden.mean(1))

    @torch.no_grad()
    def _initialize(self) -> None:
        for name, parameter in self.connector.named_parameters():
            if "layer_norm" in name:
                continue
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif ".mlp." in name:
                nn.init.normal_(parameter, std=_BIAS_STD)
            else:
                nn.init.zeros_(parameter)

    def save(self, folder: Path) -> None:
        """Write the published form: ``config.json`` with a nested ``connector_config``, and safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        flat = asdict(self.config)
        nested = {"connector_config": {name: flat.pop(name) for name in _LAYER_FIELDS}}
        content = {"_class_name": _PUBLISHED_CLASS, **nested, **flat}
        (folder / CONFIG_NAME).write_text(json.dumps(content, indent=1) + "\n")
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> Connector:
        """Read a folder of that form, at the dtype that it has.

        Raises:
            ValueError: it is none, or its weights do not fit its configuration.
        """
        try:
            found = json.loads((folder / CONFIG_NAME).read_text())
            flat = {**found, **found.get("connector_config", {})}
            config = ConnectorConfig(**{f.name: int(flat[f.name]) for f in fields(ConnectorConfig) if f.name in flat})
            state = load_file(folder / WEIGHTS_NAME)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder}: expected a connector's folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got none ({error})"
            ) from error
        with torch.device("meta"):
            connector = cls(config)
        try:
            connector.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: weights do not fit their configuration: {error}") from error
        return connector
