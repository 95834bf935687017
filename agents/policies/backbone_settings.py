"""The settings of policies on published pipelines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]
_MAY_CHANGE = {"may_change": True}


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
    # Memory and speed: a run may be resumed with other values.
    offload_encoders: bool = field(default=True, metadata=_MAY_CHANGE)
    cached_prompts: int = field(default=256, metadata=_MAY_CHANGE)
    slice_vae: bool = field(default=True, metadata=_MAY_CHANGE)
    gradient_checkpointing: bool = field(default=False, metadata=_MAY_CHANGE)
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
