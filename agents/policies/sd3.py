"""Stable Diffusion 3 and 3.5, and UniPic2-SD3.5M-Kontext, which is SD3.5-Medium with references: one policy.

SD3 (arXiv:2403.03206): a joint transformer over text and image tokens, three text encoders, a 16-channel VAE.
UniPic 2.0 (arXiv:2509.04548): the same weights' names and shapes, and the references' tokens before the image's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from agents.policies.backbone import INDEX_NAME, BackbonePolicy, BackboneSettings
from agents.policies.embeddings import Row, unstack
from agents.policies.pictures import drawn_latents
from agents.policies.unipic2 import check_positions, kontext_velocity, num_channels
from agents.samplers import ODE

MAX_TEXT_TOKENS = 512
_DEFAULT_TEXT_TOKENS = 256
UNIPIC2_EDIT_NEGATIVE_PROMPT = (
    "blurry, low quality, low resolution, distorted, deformed, broken content, missing parts, damaged details, "
    "artifacts, glitch, noise, pixelated, grainy, compression artifacts, bad composition, wrong proportion, "
    "incomplete editing, unfinished, unedited areas."
)
"""The released editing script's default; ``BackboneSettings.edit_negative_prompt`` takes it."""
# The scripts that were released with UniPic 2.0 load each folder with these, whatever the folders' own names for them.
_MODELS = {"vae": "AutoencoderKL", "scheduler": "FlowMatchEulerDiscreteScheduler"}
_ENCODERS = {
    "text_encoder": ("CLIPTextModelWithProjection", "tokenizer", "CLIPTokenizer"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "tokenizer_2", "CLIPTokenizer"),
    "text_encoder_3": ("T5EncoderModel", "tokenizer_3", "T5TokenizerFast"),
}


class SD3Policy(BackbonePolicy):
    """SD3 without source images, Kontext with one or more.

    Guidance takes text only: the negative branch has the same references, as released. Several references and any
    number of them are an extension, see :func:`agents.policies.unipic2.kontext_forward`.

    Args:
        pipeline: diffusers' ``StableDiffusion3Pipeline``; its T5 encoder may be None.
        settings: see :class:`BackboneSettings`; ``max_sequence_length`` is T5's, 256 by default and 512 at most.
    """

    pipeline_name = "StableDiffusion3Pipeline"
    has_even_grid = False

    def __init__(self, pipeline: Any, settings: BackboneSettings) -> None:
        if settings.max_sequence_length > MAX_TEXT_TOKENS:
            raise ValueError(
                f"max_sequence_length: expected at most {MAX_TEXT_TOKENS} for SD3, got {settings.max_sequence_length}"
            )
        super().__init__(pipeline, settings)

    def check_size(self, settings: BackboneSettings) -> None:
        """As for all, and at most what the table of positions holds."""
        super().check_size(settings)
        check_positions(self.transformer, self.pipeline.vae_scale_factor, (settings.height, settings.width))

    @classmethod
    def load_pipeline(cls, source: str, settings: BackboneSettings) -> Any:
        """Load part by part: UniPic2's index, where there is one, names classes that diffusers does not have."""
        import diffusers
        import transformers

        library: Any = diffusers
        dtype = settings.torch_dtype
        parts = {
            name: getattr(library, kind).from_pretrained(source, subfolder=name, torch_dtype=dtype)
            for name, kind in _MODELS.items()
        }
        parts["transformer"] = library.SD3Transformer2DModel.from_pretrained(
            source, subfolder="transformer", torch_dtype=settings.weights_dtype
        )
        for name, (kind, tokenizer, tokenizer_kind) in _ENCODERS.items():
            parts[name] = parts[tokenizer] = None
            if name != "text_encoder_3" or _has_t5(source):
                parts[name] = getattr(transformers, kind).from_pretrained(source, subfolder=name, dtype=dtype)
                parts[tokenizer] = getattr(transformers, tokenizer_kind).from_pretrained(source, subfolder=tokenizer)
        return library.StableDiffusion3Pipeline(**parts)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w): 16 channels, an eighth of the pixels' size."""
        height, width = (side // self.pipeline.vae_scale_factor for side in self.image_size)
        return num_channels(self.transformer), height, width

    @property
    def patch_size(self) -> int:
        """The transformer's."""
        return int(self.pipeline.patch_size)

    @property
    def text_encoders(self) -> Sequence[nn.Module]:
        """Two CLIPs, and T5 where it is not left out."""
        encoders = (getattr(self.pipeline, name) for name in _ENCODERS)
        return [encoder for encoder in encoders if encoder is not None]

    def embed_prompts(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """``prompt_embeds`` [77 + T, 4096], CLIP's tokens and T5's (zeros without it), and ``pooled`` [2048]."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts),
            None,
            None,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_sequence_length or _DEFAULT_TEXT_TOKENS,
        )
        return unstack({"prompt_embeds": states, "pooled": pooled})

    def encode_sources(self, images: Tensor) -> Tensor:
        """``(z - shift) scaling`` with z drawn from the encoder's Gaussian, as released.

        Differs: the draw's seed is a hash of the image, so that an image has one encoding at any time and place.
        """
        return drawn_latents(self.pipeline.vae, images)

    def network_velocity(self, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """:func:`agents.policies.unipic2.kontext_velocity`, the embedded world's policy's too."""
        return kontext_velocity(self.transformer, latents, sigma, tensors)

    def compile_blocks(self) -> None:
        """Compile each joint block; diffusers does not say of SD3 what it repeats."""
        transformer: Any = self.transformer
        for block in transformer.transformer_blocks:
            block.compile()


class UniPic2KontextPolicy(SD3Policy):
    """UniPic2-SD3.5M-Kontext as released: SD3's policy with the released pipeline's 50 steps and guidance 3.5.

    A folder of this kind is known by its index or by its transformer's class. What :meth:`save` writes is an SD3
    pipeline, so that diffusers loads it: a run's folder records by itself how it was evaluated.
    """

    default_sampler = ODE(num_inference_steps=50, guidance_scale=3.5, shift=None)
    released_edit_negative_prompt = UNIPIC2_EDIT_NEGATIVE_PROMPT


def sd35_medium_config() -> dict[str, Any]:
    """The arguments of ``SD3Transformer2DModel`` for SD3.5-Medium, and so for UniPic2-SD3.5M-Kontext.

    From the released checkpoints' code, checked by count: 2,243,171,520 parameters and a buffer of 384 x 384 x 1536
    positions, as reported for UniPic2's transformer (github.com/deepgenteam/deepgen).
    """
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }


def _has_t5(source: str) -> bool:
    """Whether a folder has the third encoder; a repository of the hub is taken to have it."""
    folder = Path(source)
    if (folder / INDEX_NAME).is_file():
        return json.loads((folder / INDEX_NAME).read_text()).get("text_encoder_3", [None])[0] is not None
    return not folder.is_dir() or (folder / "text_encoder_3").is_dir()
