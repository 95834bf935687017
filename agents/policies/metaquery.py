"""UniPic2-MetaQuery (arXiv:2509.04548): a frozen Qwen2.5-VL prompts the Kontext transformer through a connector.

Learnt queries behind the prompt gather what the language model makes of it; the connector turns their states into the
transformer's text states, in place of CLIP's and T5's. In editing the source image goes to the language model and, as
clean latents, to the transformer; either way can be left out (the paper's ablation). Understanding is the language
model's own: nothing in it is trained.

Text-to-image reads "Generate an image: {prompt}", its negative branch the same with an empty prompt; editing reads the
image and the instruction as it is, its negative branch the image and ``settings.edit_negative_prompt``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.policies.backbone import BackbonePolicy, BackboneSettings
from agents.policies.connector import Connector
from agents.policies.embeddings import Row, unstack
from agents.policies.metaquery_parts import PIPELINE_NAME, MetaQueryPipeline
from agents.policies.metaquery_vae import decode_images, encode_images, pixels_per_latent
from agents.policies.query_reader import QueryReader
from agents.policies.scenes_parts import PatchCodec
from agents.policies.sd3 import UNIPIC2_EDIT_NEGATIVE_PROMPT
from agents.policies.unipic2 import check_positions, kontext_velocity, num_channels
from agents.samplers import ODE


class MetaQueryPolicy(BackbonePolicy):
    """UniPic2-MetaQuery as a flow policy.

    In reinforcement learning the transformer learns and the connector is frozen, so a prompt's embedding is kept (the
    paper names nothing else for MetaQuery). Pre-training calls :meth:`embed_with_gradient`.

    Args:
        pipeline: see :class:`MetaQueryPipeline`; the embedded world's has a patch codec for a VAE.
        settings: see :class:`BackboneSettings`.

    Raises:
        ValueError: the image's size or the precision does not suit the parts.
    """

    pipeline_name: ClassVar[str] = PIPELINE_NAME
    default_sampler: ClassVar[ODE] = ODE(num_inference_steps=50, guidance_scale=3.5, shift=None)
    released_edit_negative_prompt: ClassVar[str] = UNIPIC2_EDIT_NEGATIVE_PROMPT
    max_sources: ClassVar[int | None] = 1
    has_even_grid: ClassVar[bool] = False

    def __init__(self, pipeline: MetaQueryPipeline, settings: BackboneSettings) -> None:
        pipeline.check()
        if isinstance(pipeline.vae, PatchCodec):
            if settings.dtype != "float32":
                raise ValueError(f"dtype: expected float32 with a patch codec, got {settings.dtype}")
            settings = replace(settings, slice_vae=False)
        super().__init__(pipeline, settings)
        self.reader = QueryReader(pipeline.lmm, pipeline.tokenizer, pipeline.pictures, pipeline.traits.reading)
        self.connector.to(settings.weights_dtype)
        if settings.gradient_checkpointing:
            self.lmm.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    @classmethod
    def load_pipeline(cls, source: str, settings: BackboneSettings) -> MetaQueryPipeline:
        """See :meth:`MetaQueryPipeline.from_pretrained`: UniPic 2.0's own folder or repository loads as it is."""
        return MetaQueryPipeline.from_pretrained(source, settings)

    def check_size(self, settings: BackboneSettings) -> None:
        """See :meth:`BackbonePolicy.check_size`; sides as SD3's, and whole tokens of the language model."""
        super().check_size(settings)
        pixels = pixels_per_latent(self.pipeline.vae)
        check_positions(self.transformer, pixels, (settings.height, settings.width))
        side = self.pipeline.traits.reading.pixels_per_token
        if settings.height % side or settings.width % side:
            raise ValueError(
                f"height and width: expected multiples of {side} pixels, a token of the language model each, "
                f"got {settings.height} and {settings.width}"
            )

    @property
    def connector(self) -> Connector:
        """Queries, projectors and encoder."""
        found: Connector = self.pipeline.connector
        return found

    @property
    def lmm(self) -> Any:
        """The frozen Qwen2.5-VL, which answers as it always did."""
        return self.pipeline.lmm

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """The language model and the connector."""
        return (self.lmm, self.connector)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample's latents."""
        side, (height, width) = pixels_per_latent(self.pipeline.vae), self.image_size
        return num_channels(self.transformer), height // side, width // side

    @property
    def patch_size(self) -> int:
        """The transformer's."""
        return int(self.pipeline.transformer.config.patch_size)

    @property
    def reads_sources(self) -> bool:
        """Whether the language model sees source images."""
        return self.reader.reading.reads_image

    def embed_prompts(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """Text states and pooled state of each prompt."""
        return unstack(self._embed(texts, sources))

    def embed_with_gradient(self, texts: Sequence[str], sources: NDArray[np.uint8] | None = None) -> dict[str, Tensor]:
        """One branch's tensors, for pre-training; gradients reach the connector and its queries.

        Args:
            texts: B prompts, or instructions.
            sources: images to edit, uint8 [B, H, W, 3], or None in text-to-image.

        Returns:
            ``prompt_embeds`` [B, N, D], ``pooled`` [B, P] and, in editing, ``reference_0`` [B, C, h, w].
        """
        for module in self.text_encoders:
            module.to(self.device)
        images: list[tuple[Any, ...]] = [() for _ in texts] if sources is None else [(image,) for image in sources]
        with self._recomputing():
            tensors = self._embed(texts, images)
        if sources is not None:
            tensors["reference_0"] = self.encode_sources(torch.from_numpy(sources))
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    @torch.no_grad()
    def encode_sources(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, H, W, 3], to clean latents [B, C, h, w]: references, and targets of pre-training."""
        return encode_images(self.pipeline.vae, images.to(self.device))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images in [-1, 1], [B, 3, height, width]."""
        return decode_images(self.pipeline.vae, latents)

    def network_velocity(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The Kontext transformer's velocity at timestep ``1000 sigma``."""
        if not self.pipeline.traits.references_to_dit:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("reference_")}
        return kontext_velocity(self.transformer, latents, sigma, tensors)

    def _embed(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        states = self.reader.states(texts, sources, self.connector.meta_queries)
        needed = self.settings.float32_weights and self.dtype != torch.float32
        with torch.autocast(states.device.type, self.dtype, enabled=needed):
            prompt_embeds, pooled = self.connector(states)
        return {"prompt_embeds": prompt_embeds, "pooled": pooled}

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Activations of the language model are recomputed in the backward pass where the settings say so.

        transformers does so in training mode alone; Qwen2.5-VL has no dropout that this would turn on.
        """
        language = self.lmm.model.language_model
        language.train(self.settings.gradient_checkpointing)
        try:
            yield
        finally:
            language.eval()
