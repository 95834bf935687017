"""Policies on the parts of a published diffusers pipeline: what all backbones share.

A backbone is a subclass in a file of its own, with the five things in which it differs from the others: how texts and
source images are embedded, how latents become pictures, and what its transformer is called with. Loading, saving,
precision, memory and the embeddings' cache are here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, final

import numpy as np
import torch
from torch import Tensor, nn

from agents.policies.base import FlowPolicy
from agents.policies.embeddings import EmbeddingCache, Row, Visit, stack_rows
from agents.types import Condition, PromptLike

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
    offload_encoders: bool = True
    cached_prompts: int = 256
    slice_vae: bool = True
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width: expected 1 or more pixels, got {self.height} and {self.width}")
        if self.max_sequence_length < 0 or self.cached_prompts < 0:
            raise ValueError("max_sequence_length and cached_prompts: expected 0 or more")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]


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

    def __init__(self, pipeline: Any, settings: BackboneSettings) -> None:
        for side in ("height", "width"):
            value, multiple = getattr(settings, side), self.pixel_multiple
            if value % multiple:
                raise ValueError(
                    f"{side}: expected a multiple of {multiple} pixels for {type(self).__name__}, got {value}; "
                    f"{max(multiple, round(value / multiple) * multiple)} would do"
                )
        self.pipeline, self.settings = pipeline, settings
        self._device = torch.device("cpu")
        self._texts, self._sources = EmbeddingCache(settings.cached_prompts), EmbeddingCache(settings.cached_prompts)
        for module in (self.transformer, pipeline.vae, *self.text_encoders):
            module.eval().requires_grad_(False)
        pipeline.vae.to(settings.torch_dtype)
        self._prepare_transformer()
        if settings.slice_vae:
            pipeline.vae.enable_slicing()

    @classmethod
    def load(cls, source: str | Path, settings: BackboneSettings) -> Self:
        """Load a folder in diffusers' layout, or a repository of the hub.

        Raises:
            ValueError: it is not there, or a part of it is missing.
        """
        import diffusers

        pipeline_class: Any = getattr(diffusers, cls.pipeline_name)
        try:
            pipeline = pipeline_class.from_pretrained(str(source), torch_dtype=settings.torch_dtype)
        except (OSError, EnvironmentError, ValueError) as error:
            raise ValueError(
                f"{source}: expected the folder or hub name of a {cls.pipeline_name}, got none that loads ({error})"
            ) from error
        return cls(pipeline, settings)

    def save(self, folder: Path) -> None:
        """Write a folder that :meth:`load` and diffusers' own pipeline load: safetensors, at ``settings.dtype``."""
        self.pipeline.save_pretrained(str(folder), safe_serialization=True)

    @property
    @final
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
            self._text_rows(chosen[: self.settings.cached_prompts])

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
        """:meth:`network_velocity`, autocast where the weights are kept in float32."""
        needed = self.settings.float32_weights and self.dtype != torch.float32
        with torch.autocast(latents.device.type, self.dtype, enabled=needed):
            return self.network_velocity(latents, sigma, condition.tensors)

    @property
    @abstractmethod
    def text_encoders(self) -> Sequence[nn.Module]:
        """The pipeline's frozen encoders of prompts."""

    @abstractmethod
    def embed_prompts(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """Embed texts, one row of tensors each, on any device.

        Args:
            texts: B prompts, instructions or negative prompts.
            sources: the source images of each, uint8 [H, W, 3], for encoders that look at them.
        """

    @abstractmethod
    def encode_sources(self, images: Tensor) -> Tensor:
        """Source images, uint8 [B, H, W, 3], to clean reference latents [B, C, h, w]."""

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

    def _prepare_transformer(self) -> None:
        transformer: Any = self.transformer
        transformer.to(torch.float32 if self.settings.float32_weights else self.dtype)
        if self.settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if self.settings.compile:
            transformer.compile_repeated_blocks()

    def _text_rows(self, prompts: Sequence[PromptLike]) -> list[Row]:
        """Rows of the positive branch, then as many of the negative one."""
        negative = self.settings.edit_negative_prompt if prompts[0].source_images else self.settings.negative_prompt
        texts = [prompt.text for prompt in prompts] + [negative] * len(prompts)
        sources = [tuple(prompt.source_images) for prompt in prompts] * 2
        keys = [
            (text, len(images), *(_key(image) for image in (images if self.reads_sources else ())))
            for text, images in zip(texts, sources, strict=True)
        ]

        def compute(missing: list[int]) -> Sequence[Row]:
            visit = Visit(self.text_encoders, self.settings.offload_encoders)
            return visit.run(
                self._device,
                lambda: self.embed_prompts([texts[i] for i in missing], [sources[i] for i in missing]),
            )

        return self._texts.rows(keys, compute)

    def _source_rows(self, prompts: Sequence[PromptLike]) -> list[Row]:
        images = [image for prompt in prompts for image in prompt.source_images]

        def compute(missing: list[int]) -> Sequence[Row]:
            batch = torch.from_numpy(np.stack([np.asarray(images[i]) for i in missing])).to(self._device)
            return [{"latents": latents} for latents in self.encode_sources(batch)]

        rows = self._sources.rows([_key(image) for image in images], compute)
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


def _key(image: Any) -> tuple[Any, ...]:
    array = np.asarray(image)
    return (array.shape, array.tobytes())
