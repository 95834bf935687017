"""Qwen-Image (arXiv:2508.02324) and its editing models, on diffusers' pipelines.

Latents are [B, 16, H / 8, W / 8], the VAE's one frame squeezed. The transformer sees them in patches of 2 x 2, the
target's tokens before those of its sources, beside states of Qwen2.5-VL, which reads the prompt and, in editing, looks
at the sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, VAE_IMAGE_SIZE
from PIL import Image
from torch import Tensor

from agents.policies.backbone import BackbonePolicy, BackboneSettings
from agents.policies.base import JOINT_ATTENTION
from agents.policies.embeddings import Row
from agents.policies.pictures import references
from agents.policies.schedules import pipeline_timestep
from agents.samplers import ODE

_TEXT_PIPELINE: Any = QwenImagePipeline
_SIZE_OF_AREA: Any = calculate_dimensions
_MAX_SEQUENCE_LENGTH = 512


class QwenImagePolicy(BackbonePolicy):
    """Qwen-Image: text-to-image.

    Guidance is rescaled: each token keeps the length of the prompted branch's velocity (:meth:`guide`).
    """

    pipeline_name = "QwenImagePipeline"
    default_sampler = ODE(num_inference_steps=50, guidance_scale=4.0, shift=None)
    max_sources: ClassVar[int | None] = 0
    lora_targets = (
        *JOINT_ATTENTION,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )
    """Flow-GRPO's (arXiv:2505.05470, its code for Qwen-Image), there with rank 64 and alpha 128."""

    def __init__(self, pipeline: Any, settings: BackboneSettings) -> None:
        super().__init__(pipeline, settings)
        # Prompts alone are embedded as Qwen-Image does it, by an editing model too.
        parts = {name: getattr(pipeline, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer")}
        self._text_pipeline = _TEXT_PIPELINE(**parts, transformer=None)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        height, width = (side // self.pipeline.vae_scale_factor for side in self.image_size)
        return self.pipeline.vae.config.z_dim, height, width

    def embed_prompts(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """``prompt_embeds`` [L, D] and ``prompt_mask`` [L], which tells padding; each alone, so that none is padded."""
        states = [self.prompt_states(text, images) for text, images in zip(texts, sources, strict=True)]
        return [{"prompt_embeds": one, "prompt_mask": torch.ones(len(one), dtype=torch.bool)} for one in states]

    def prompt_states(self, text: str, images: Sequence[Any]) -> Tensor:
        """Qwen2.5-VL's states of a prompt in the model's template, the template's beginning left out: [L, D]."""
        length = self.settings.max_sequence_length or _MAX_SEQUENCE_LENGTH
        states: Tensor = self._text_pipeline.encode_prompt([text], self._device, max_sequence_length=length)[0]
        return states[0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The VAE's pictures of latents that are brought back to its mean and deviation a channel."""
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values).to(latents).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        images: Tensor = vae.decode(latents.unsqueeze(2) * std + mean, return_dict=False)[0]
        return images[:, :, 0]

    def network_velocity(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The transformer at time sigma, over the target's tokens and then each source's."""
        pictures = [latents, *references(tensors)]
        tokens = [_pack(picture) for picture in pictures]
        mask = tensors["prompt_mask"]
        network: Any = self.transformer
        velocity: Tensor = network(
            hidden_states=torch.cat(tokens, dim=1),
            timestep=pipeline_timestep(sigma, self.dtype),
            encoder_hidden_states=tensors["prompt_embeds"],
            # Attention without a mask is the faster one.
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, picture.shape[2] // 2, picture.shape[3] // 2) for picture in pictures]] * len(latents),
            return_dict=False,
        )[0]
        return _unpack(velocity[:, : tokens[0].shape[1]], latents.shape)

    def guide(self, negative: Tensor, positive: Tensor, guidance_scale: float) -> Tensor:
        """``v = |v_positive| u / |u|`` a token of 2 x 2 patches, ``u = v_negative + s (v_positive - v_negative)``."""
        guided, prompted = _pack(super().guide(negative, positive, guidance_scale)), _pack(positive)
        length, prompted_length = (tokens.norm(dim=-1, keepdim=True) for tokens in (guided, prompted))
        return _unpack(guided * (prompted_length / length), positive.shape)


class QwenImageEditPolicy(QwenImagePolicy):
    """Qwen-Image-Edit: editing of one source image, which the text encoder looks at and the transformer attends to.

    A prompt without a source is drawn as Qwen-Image draws it, so that one set of weights can practise both tasks. That
    is not what the model was published for.

    Source images have the output's size. The pipeline resizes them to an area of 1024 x 1024 whatever that is, four
    times as many tokens as a target of 512 x 512 has; Flow-GRPO trains with ``reference_pixels`` of 512 x 512.
    """

    pipeline_name = "QwenImageEditPipeline"
    max_sources: ClassVar[int | None] = 1

    def __init__(self, pipeline: Any, settings: BackboneSettings) -> None:
        super().__init__(pipeline, settings)
        if min(self._size_of_area(self.reference_pixels)) < 1:
            raise ValueError(
                f"reference_pixels: expected 0 (the model's own {VAE_IMAGE_SIZE}) or 32 x 32 and more, "
                f"got {settings.reference_pixels}"
            )

    @property
    def reads_sources(self) -> bool:
        """Qwen2.5-VL looks at them."""
        return True

    @property
    def reference_pixels(self) -> int:
        """Area that the VAE encodes sources at."""
        return self.settings.reference_pixels or int(VAE_IMAGE_SIZE)

    @property
    def seen_pixels(self) -> int:
        """Area that the text encoder is shown sources at."""
        return self.reference_pixels

    def prompt_states(self, text: str, images: Sequence[Any]) -> Tensor:
        """States of an instruction and of what it is about: [L, D]."""
        if not images:
            return super().prompt_states(text, images)
        height, width = self._size_of_area(self.seen_pixels)
        resize = self.pipeline.image_processor.resize
        pictures = [resize(Image.fromarray(image), height, width) for image in images]
        states: Tensor = self.pipeline.encode_prompt([text], image=pictures, device=self._device)[0]
        return states[0]

    def encode_sources(self, images: Tensor) -> Tensor:
        """The VAE's most likely latents of resized sources, brought to mean 0 and deviation 1 a channel."""
        height, width = self._size_of_area(self.reference_pixels)
        pictures = [Image.fromarray(image) for image in images.cpu().numpy()]
        pixels = self.pipeline.image_processor.preprocess(pictures, height, width)
        pixels = pixels.to(self._device, self.dtype).unsqueeze(2)
        latents: Tensor = self.pipeline._encode_vae_image(pixels, generator=None)
        return latents.squeeze(2)

    def _size_of_area(self, pixels: int) -> tuple[int, int]:
        """(height, width) of an area in the output's proportions, multiples of 32."""
        height, width = self.image_size
        width, height, *_ = _SIZE_OF_AREA(pixels, width / height)
        return height, width


class QwenImageEditPlusPolicy(QwenImageEditPolicy):
    """Qwen-Image-Edit-2509 and later: editing with one or several source images, named "Picture 1" and so on.

    The text encoder is shown each at an area of 384 x 384, whatever ``reference_pixels`` is.
    """

    pipeline_name = "QwenImageEditPlusPipeline"
    max_sources = None

    @property
    def seen_pixels(self) -> int:
        """Area that the text encoder is shown sources at."""
        return int(CONDITION_IMAGE_SIZE)


def _pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, (h / 2) (w / 2), 4 C]."""
    tokens: Tensor = _TEXT_PIPELINE._pack_latents(latents, *latents.shape)
    return tokens


def _unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Back to ``shape``, [B, C, h, w]."""
    latents: Tensor = _TEXT_PIPELINE._unpack_latents(tokens, shape[2], shape[3], vae_scale_factor=1)
    return latents.squeeze(2)
