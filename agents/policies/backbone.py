"""Policies on the parts of a published diffusers pipeline: what all backbones share.

A backbone is a subclass in a file of its own, with the things in which it differs from the others: how texts and source
images are embedded, what its transformer is called with, and where it is not as most are, its latents, its VAE and its
schedule. Loading, saving, precision and memory are here, what is kept of prompts in :mod:`agents.policies.prompted`.
"""

from __future__ import annotations

import importlib
import json
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self, final

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

# The policy and its settings are one address for those who load a model.
from agents.policies.backbone_settings import BackboneSettings as BackboneSettings
from agents.policies.pictures import decoded
from agents.policies.prompted import PromptedPolicy
from agents.policies.schedules import dynamic_mu, even_sigmas, scheduler_shift, scheduler_sigmas
from agents.samplers import ODE
from agents.types import Condition

INDEX_NAME, SETTINGS_NAME = "model_index.json", "pdtr_settings.json"
# Graphs of one block's forward pass, over all policies of the process.
_MAX_GRAPHS = 128


class BackbonePolicy(PromptedPolicy):
    """A flow policy on a diffusers pipeline's parts.

    Args:
        pipeline: of the class (or classes) that the subclass names; its transformer learns, the rest is frozen.
        settings: see :class:`BackboneSettings`.
    """

    pipeline_name: ClassVar[str]
    """The diffusers pipeline class whose folders this policy loads and saves."""
    pixel_multiple: ClassVar[int] = 16
    """Height and width are multiples of it."""
    default_sampler: ClassVar[ODE] = ODE(num_inference_steps=28, guidance_scale=4.5, shift=None)
    """How the published model is usually drawn from, where nothing else is said."""
    released_edit_negative_prompt: ClassVar[str] = ""
    """What the model's published script gives the negative branch in editing; for folders with no settings of ours."""
    has_even_grid: ClassVar[bool] = True
    """The pipeline hands its scheduler equal steps to be shifted; if not, the scheduler has a grid of its own."""

    def __init__(self, pipeline: Any, settings: BackboneSettings) -> None:
        super().__init__(settings)
        self.pipeline = pipeline
        self.check_size(settings)
        for module in (self.transformer, pipeline.vae, *self.text_encoders):
            module.eval().requires_grad_(False)
        _cast(pipeline.vae, settings.torch_dtype)
        self._prepare_transformer()
        if settings.slice_vae:
            pipeline.vae.enable_slicing()

    def resize(self, height: int, width: int) -> None:
        """Draw at another size from now on.

        Raises:
            ValueError: the model cannot.
        """
        settings = replace(self.settings, height=height, width=width)
        self.check_size(settings)
        self.settings = settings

    def check_size(self, settings: BackboneSettings) -> None:
        """Whether the model can draw at a size; a subclass may know more.

        Raises:
            ValueError: it cannot.
        """
        for side in ("height", "width"):
            value, multiple = getattr(settings, side), self.pixel_multiple
            if value % multiple:
                raise ValueError(
                    f"{side}: expected a multiple of {multiple} pixels for {type(self).__name__}, got {value}; "
                    f"{max(multiple, round(value / multiple) * multiple)} would do"
                )

    @classmethod
    def load(cls, source: str | Path, settings: BackboneSettings) -> Self:
        """Load a folder in diffusers' layout, or a repository of the hub.

        Raises:
            ValueError: it is not there, or a part of it is missing or damaged.
        """
        try:
            with warnings.catch_warnings():
                # diffusers 0.42 would have torch_dtype called dtype, which its older versions do not know.
                warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
                pipeline = cls.load_pipeline(str(source), settings)
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"{source}: expected the folder or hub name of a {cls.pipeline_name}, got none that loads ({error})"
            ) from error
        return cls(pipeline, settings)

    @classmethod
    def load_pipeline(cls, source: str, settings: BackboneSettings) -> Any:
        """The pipeline of :meth:`load`; where its folders are not as diffusers' class has them, a subclass says how."""
        import diffusers

        pipeline_class: Any = getattr(diffusers, cls.pipeline_name)
        dtypes = {"transformer": settings.weights_dtype, "default": settings.torch_dtype}
        return pipeline_class.from_pretrained(source, torch_dtype=dtypes)

    def save(self, folder: Path) -> None:
        """Write a folder that diffusers' own pipeline loads, and the settings beside it: safetensors and JSON.

        The transformer is written as it is held, in float32 with ``float32_weights``. Adapters must have been merged.
        """
        self.pipeline.save_pretrained(str(folder), safe_serialization=True)
        (folder / SETTINGS_NAME).write_text(json.dumps(asdict(self.settings), indent=1) + "\n")

    @property
    def transformer(self) -> nn.Module:
        """The pipeline's transformer."""
        module: nn.Module = self.pipeline.transformer
        return module

    @transformer.setter
    def transformer(self, module: nn.Module) -> None:
        self.pipeline.transformer = module

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the settings."""
        return self.settings.height, self.settings.width

    @property
    def dtype(self) -> torch.dtype:
        """Of forward passes and latents; weights may be float32."""
        return self.settings.torch_dtype

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """The pipeline's encoders of prompts: one, unless a subclass names several."""
        return (self.pipeline.text_encoder,)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w): the VAE's."""
        height, width = (side // self.pipeline.vae_scale_factor for side in self.image_size)
        return self.pipeline.vae.config.latent_channels, height, width

    @property
    def patch_size(self) -> int:
        """Side of the transformer's tokens in latents."""
        return 2

    @property
    def own_shift(self) -> float:
        """The scheduler's; where it is dynamic, ``e^mu`` of the image's size, at the usual number of steps."""
        return scheduler_shift(self.pipeline.scheduler, self.schedule_mu(self.default_sampler.num_inference_steps))

    @final
    def own_sigmas(self, num_inference_steps: int) -> Tensor:
        """The pipeline's schedule."""
        grid = even_sigmas(num_inference_steps) if self.has_even_grid else None
        mu = self.schedule_mu(num_inference_steps)
        return scheduler_sigmas(self.pipeline.scheduler, num_inference_steps, mu, grid)

    def schedule_mu(self, num_inference_steps: int) -> float | None:
        """Mu of a dynamic shift, which grows with the image's tokens; None where the scheduler's shift is static."""
        _, height, width = self.latent_shape
        return dynamic_mu(self.pipeline.scheduler, height * width // self.patch_size**2)

    @final
    def to(self, device: torch.device | str) -> None:
        """Move the transformer and the VAE; text encoders stay on the CPU where they are offloaded."""
        self._device = torch.device(device)
        self.transformer.to(device)
        self.pipeline.vae.to(device)
        if not self.settings.offload_encoders:
            for module in self.text_encoders:
                module.to(device)

    @final
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images, uint8 [B, height, width, 3]."""
        images = self.decode_latents(latents.to(self.dtype)).float()
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    @final
    def conditional_velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """:meth:`network_velocity` on latents in ``dtype``, autocast where the weights are kept in float32."""
        needed = self.settings.float32_weights and self.dtype != torch.float32
        with torch.autocast(latents.device.type, self.dtype, enabled=needed):
            return self.network_velocity(latents.to(self.dtype), sigma, condition.tensors)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images in [-1, 1], [B, 3, height, width]."""
        return decoded(self.pipeline.vae, latents)

    @abstractmethod
    def network_velocity(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The transformer's velocity; ``tensors`` has the rows of :meth:`embed_prompts` stacked, and references.

        The references are ``reference_0``, ``reference_1``, ... each [B, C, h, w], in editing only.
        """

    def compile_blocks(self) -> None:
        """Compile what the transformer repeats."""
        transformer: Any = self.transformer
        transformer.compile_repeated_blocks()

    def _prepare_transformer(self) -> None:
        transformer: Any = self.transformer
        _cast(transformer, self.settings.weights_dtype)
        if self.settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if self.settings.compile:
            # Beyond the limit, 8 by default, dynamo gives up without an error. There is a graph for each kind of block,
            # with and without gradients, for each version's adapters, and for text-to-image and editing.
            dynamo: Any = importlib.import_module("torch._dynamo")
            dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MAX_GRAPHS)
            self.compile_blocks()


def _cast(module: Any, dtype: torch.dtype) -> None:
    """Cast a module that was not loaded in its dtype: loading alone keeps float32 where a model needs it."""
    if module.dtype != dtype:
        module.to(dtype)
