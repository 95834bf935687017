"""Policies on the parts of a published diffusers pipeline: what all backbones share.

A backbone is a subclass in a file of its own, with the five things in which it differs from the others: how texts and
source images are embedded, how latents become pictures, and what its transformer is called with. Loading, saving,
precision, memory and the embeddings' cache are here.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from agents.policies.base import FlowPolicy
from agents.policies.embeddings import EmbeddingCache, Row, Visit, content_hash, stack_rows
from agents.samplers import ODE
from agents.types import Condition, PromptLike

INDEX_NAME, SETTINGS_NAME = "model_index.json", "pdtr_settings.json"
# Graphs of one block's forward pass, over all policies of the process.
_MAX_GRAPHS = 128
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BackboneSettings:
    """How a published model is loaded and run.

    Attributes:
        height: of images in pixels.
        width: of images in pixels.
        dtype: of the forward passes, latents and embeddings; SDE arithmetic is fp32 whatever it is.
        float32_weights: keep the transformer's weights in float32 and autocast to ``dtype``: full training needs it,
            for an update at 3e-4 of its size is lost in bfloat16. Adapters are float32 in any case.
        negative_prompt: the unconditional branch's text in text-to-image,
        edit_negative_prompt: and in editing.
        max_sequence_length: tokens of a prompt, where the backbone's encoder takes a limit; 0 is its own default.
        distilled_guidance: the guidance that a distilled model takes as an input, beside a sampler's guidance_scale;
            None is the model's own default (3.5 for FLUX.1-dev, 2.5 for FLUX.1-Kontext). Others do not look at it.
        reference_pixels: area that source images are resized to before they are encoded, by backbones that resize them;
            0 is the backbone's own.
        offload_encoders: text encoders live on the CPU and visit the device once a rollout.
        cached_prompts: embeddings kept on the CPU; an SD3 prompt takes 2.7 MB in bfloat16.
        slice_vae: decode one image at a time.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: compile the transformer's blocks.
    """

    height: int = 512
    width: int = 512
    dtype: Precision = "bfloat16"
    float32_weights: bool = False
    negative_prompt: str = ""
    edit_negative_prompt: str = ""
    max_sequence_length: int = 0
    distilled_guidance: float | None = None
    reference_pixels: int = 0
    offload_encoders: bool = True
    cached_prompts: int = 256
    slice_vae: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width: expected 1 or more pixels, got {self.height} and {self.width}")
        if min(self.max_sequence_length, self.reference_pixels, self.cached_prompts) < 0:
            raise ValueError("max_sequence_length, reference_pixels and cached_prompts: expected 0 or more")
        if self.distilled_guidance is not None and not 0 <= self.distilled_guidance < math.inf:
            raise ValueError(f"distilled_guidance: expected 0 or more, or None, got {self.distilled_guidance}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]

    @property
    def weights_dtype(self) -> torch.dtype:
        """The transformer's weights'."""
        return torch.float32 if self.float32_weights else self.torch_dtype


class BackbonePolicy(FlowPolicy):
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

    def __init__(self, pipeline: Any, settings: BackboneSettings) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.check_size(settings)
        self._device = torch.device("cpu")
        self._texts, self._sources = EmbeddingCache(settings.cached_prompts), EmbeddingCache(settings.cached_prompts)
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
    def prepare(self, prompts: Sequence[PromptLike]) -> None:
        """Embed all texts of a rollout in one visit of the text encoders."""
        has_source = [bool(prompt.source_images) for prompt in prompts]
        for kind in sorted(set(has_source)):
            chosen = [prompt for prompt, has in zip(prompts, has_source, strict=True) if has == kind]
            # What would push out the first of them again, the negative prompt included, is left to be asked for later.
            kept = chosen[: max(0, self.settings.cached_prompts - 1)]
            if kept:
                self._text_rows(kept)

    @final
    @torch.no_grad()
    def encode(self, prompts: Sequence[PromptLike]) -> Condition:
        """Embed prompts, all with or all without source images, each distinct text and image once: [B]."""
        check_same_number_of_sources(prompts)
        self._check_source_shapes(prompts)
        rows = self._text_rows(prompts)
        # Both branches go through one forward pass, so they are padded to one length.
        texts = self._on_device(stack_rows(rows))
        shared: dict[str, Tensor] = {}
        if prompts[0].source_images:
            shared = self._on_device(stack_rows(self._source_rows(prompts)))
        count = len(prompts)
        positive = {name: tensor[:count] for name, tensor in texts.items()} | shared
        negative = {name: tensor[count:] for name, tensor in texts.items()} | shared
        return Condition(positive, Condition(negative))

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

    @property
    @abstractmethod
    def text_encoders(self) -> Sequence[nn.Module]:
        """The pipeline's frozen encoders of prompts."""

    @abstractmethod
    def embed_prompts(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """Embed texts, one row of tensors each, on any device.

        It is called with one text at a time: a matrix product's last bits depend on the batch's shape, and so would an
        embedding on what was asked for with it, which a resumed run does not know.

        Args:
            texts: B prompts, instructions or negative prompts.
            sources: the source images of each, uint8 [H, W, 3], for encoders that look at them.
        """

    @abstractmethod
    def encode_sources(self, images: Tensor) -> Tensor:
        """Source images, uint8 [B, H, W, 3], to clean reference latents [B, C, h, w]; called with one at a time."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images in [-1, 1], [B, 3, height, width]."""

    @abstractmethod
    def network_velocity(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The transformer's velocity; ``tensors`` has the rows of :meth:`embed_prompts` stacked, and references.

        The references are ``reference_0``, ``reference_1``, ... each [B, C, h, w], in editing only.
        """

    @property
    def reads_sources(self) -> bool:
        """Whether :meth:`embed_prompts` looks at source images; if not, a text is embedded once for all of them."""
        return False

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

    def _text_rows(self, prompts: Sequence[PromptLike]) -> list[Row]:
        """Rows of the positive branch, then as many of the negative one."""
        negative = self.settings.edit_negative_prompt if prompts[0].source_images else self.settings.negative_prompt
        texts = [prompt.text for prompt in prompts] + [negative] * len(prompts)
        sources = [tuple(prompt.source_images) for prompt in prompts] * 2
        keys = [
            (text, len(images), *(content_hash(image) for image in (images if self.reads_sources else ())))
            for text, images in zip(texts, sources, strict=True)
        ]

        def compute(missing: list[int]) -> Sequence[Row]:
            visit = Visit(self.text_encoders, self.settings.offload_encoders)
            return visit.run(self._device, lambda: [self.embed_prompts([texts[i]], [sources[i]])[0] for i in missing])

        return self._texts.rows(keys, compute)

    def _source_rows(self, prompts: Sequence[PromptLike]) -> list[Row]:
        images = [image for prompt in prompts for image in prompt.source_images]

        def compute(missing: list[int]) -> Sequence[Row]:
            chosen = [torch.from_numpy(np.array(images[i])).to(self._device) for i in missing]
            return [{"latents": self.encode_sources(image[None])[0]} for image in chosen]

        rows = self._sources.rows([content_hash(image) for image in images], compute)
        each = len(prompts[0].source_images)
        return [{f"reference_{j}": rows[i * each + j]["latents"] for j in range(each)} for i in range(len(prompts))]

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor.to(self._device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }

    def _check_source_shapes(self, prompts: Sequence[PromptLike]) -> None:
        shapes = {np.asarray(image).shape for prompt in prompts for image in prompt.source_images}
        if shapes - {(*self.image_size, 3)}:
            raise ValueError(f"source images: expected shape {(*self.image_size, 3)}, got {sorted(shapes)}")


def check_same_number_of_sources(prompts: Sequence[PromptLike]) -> None:
    """All prompts of a batch have as many source images.

    Raises:
        ValueError: they do not.
    """
    counts = {len(prompt.source_images) for prompt in prompts}
    if len(counts) > 1:
        raise ValueError(
            f"prompts: expected as many source images for each, got {sorted(counts)} images a prompt; encode them apart"
        )


def _cast(module: Any, dtype: torch.dtype) -> None:
    """Cast a module that was not loaded in its dtype: loading alone keeps float32 where a model needs it."""
    if module.dtype != dtype:
        module.to(dtype)
