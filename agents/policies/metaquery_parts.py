"""The parts of a UniPic2-MetaQuery checkpoint, their folder, and the two codecs that can stand in it.

A folder has ``model_index.json``, ``transformer/`` and ``scheduler/`` (diffusers), ``vae/`` (diffusers' AutoencoderKL,
or the embedded world's patch codec), ``lmm/`` (transformers: Qwen2.5-VL with tokenizer and image settings) and
``conditioner/`` (the connector, as published).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agents.policies.backbone import BackboneSettings
from agents.policies.connector import CONFIG_NAME, WEIGHTS_NAME, Connector, ConnectorConfig
from agents.policies.pictures import decoded, drawn_latents
from agents.policies.query_reader import Reading
from agents.policies.scenes_parts import PatchCodec

PIPELINE_NAME = "UniPic2MetaQueryPipeline"
_PATCH_CODEC = "PatchCodec"
_PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class MetaQueryTraits:
    """What a checkpoint says of itself beside its weights.

    Attributes:
        reading: how prompts are read.
        references_to_dit: whether the source image's latents stand in the transformer's sequence.
    """

    reading: Reading = field(default_factory=Reading)
    references_to_dit: bool = True

    def __post_init__(self) -> None:
        if not (self.references_to_dit or self.reading.reads_image):
            raise ValueError("expected source images to go to the language model, to the transformer or to both")


@dataclass
class MetaQueryPipeline:
    """The parts, as a pipeline of diffusers holds its own.

    Attributes:
        transformer: SD3's.
        vae: AutoencoderKL or PatchCodec.
        scheduler: FlowMatchEulerDiscreteScheduler; its shift is the policy's own.
        lmm: Qwen2_5_VLForConditionalGeneration.
        tokenizer: the language model's.
        pictures: its image processor.
        connector: see :class:`agents.policies.connector.Connector`.
        traits: see :class:`MetaQueryTraits`.
    """

    transformer: Any
    vae: Any
    scheduler: Any
    lmm: Any
    tokenizer: Any
    pictures: Any
    connector: Connector
    traits: MetaQueryTraits

    @classmethod
    def from_pretrained(cls, folder: Path, settings: BackboneSettings) -> MetaQueryPipeline:
        """Read a folder of :meth:`save_pretrained`.

        Raises:
            ValueError: a part is missing or of another kind.
        """
        connector = Connector.load(folder / "conditioner").to(settings.weights_dtype)
        return cls(**_loaded(folder, folder / "lmm", settings), connector=connector, traits=read_traits(folder))

    @classmethod
    def from_parts(
        cls,
        generator: Path,
        lmm: Path,
        connector: ConnectorConfig | Path | None = None,
        traits: MetaQueryTraits | None = None,
        settings: BackboneSettings | None = None,
    ) -> MetaQueryPipeline:
        """Put a policy together from checkpoints: what stages A and C of pre-training start from.

        Args:
            generator: a folder with ``transformer``, ``vae`` and ``scheduler``: SD3.5, or stage B's.
            lmm: Qwen2.5-VL's folder.
            connector: a trained one's folder, or sizes of a new one, whose widths are those of the two models; the
                published depth by default. New weights come from torch's own generator.
            traits: UniPic2's unless given.
            settings: whose precision is taken; the defaults with ``float32_weights``, for training, unless given.

        Raises:
            ValueError: a part is missing.
        """
        settings = settings or BackboneSettings(float32_weights=True)
        parts = _loaded(generator, lmm, settings)
        if isinstance(connector, Path):
            made = Connector.load(connector)
        else:
            made = Connector(_fitted(connector or ConnectorConfig(), parts["transformer"], parts["lmm"]))
        return cls(**parts, connector=made.to(settings.weights_dtype), traits=traits or MetaQueryTraits())

    def check(self) -> None:
        """The connector fits between the language model and the transformer.

        Raises:
            ValueError: it does not.
        """
        found, wanted = self.connector.config, _fitted(self.connector.config, self.transformer, self.lmm)
        if found != wanted:
            raise ValueError(
                f"connector: expected llm_hidden_size, joint_attention_dim, pooled_projection_dim of "
                f"{wanted.llm_hidden_size}, {wanted.joint_attention_dim}, {wanted.pooled_projection_dim}, got "
                f"{found.llm_hidden_size}, {found.joint_attention_dim}, {found.pooled_projection_dim}"
            )

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True) -> None:
        """Write the folder; weights as they are held, in safetensors."""
        if not safe_serialization:
            raise ValueError("safe_serialization: expected True; nothing is pickled")
        folder = Path(folder)
        for name, part in (("transformer", self.transformer), ("scheduler", self.scheduler), ("lmm", self.lmm)):
            part.save_pretrained(str(folder / name))
        if isinstance(self.vae, PatchCodec):
            save_codec(self.vae, folder / "vae")
        else:
            self.vae.save_pretrained(str(folder / "vae"))
        self.tokenizer.save_pretrained(str(folder / "lmm"))
        # Named as published: other programs look the class up by this name.
        pictures = {
            **self.pictures.to_dict(),
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        }
        (folder / "lmm" / _PREPROCESSOR).write_text(json.dumps(pictures, indent=1, default=str) + "\n")
        self.connector.save(folder / "conditioner")
        index = {"_class_name": PIPELINE_NAME, "traits": asdict(self.traits)}
        (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def _loaded(generator: Path, lmm: Path, settings: BackboneSettings) -> dict[str, Any]:
    """All parts but the connector."""
    import diffusers
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    sd3: Any = diffusers.SD3Transformer2DModel
    euler: Any = diffusers.FlowMatchEulerDiscreteScheduler
    pictures: Any = Qwen2VLImageProcessorPil
    dtype = settings.torch_dtype
    try:
        return {
            "transformer": sd3.from_pretrained(str(generator / "transformer"), torch_dtype=settings.weights_dtype),
            "vae": load_vae(generator / "vae", dtype),
            "scheduler": euler.from_pretrained(str(generator / "scheduler")),
            "lmm": transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(str(lmm), dtype=dtype),
            "tokenizer": transformers.AutoTokenizer.from_pretrained(str(lmm)),
            "pictures": pictures.from_pretrained(str(lmm)),
        }
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{generator}: expected transformer/, vae/, scheduler/ and, in {lmm}, a Qwen2.5-VL ({error})"
        ) from error


def _fitted(config: ConnectorConfig, transformer: Any, lmm: Any) -> ConnectorConfig:
    """The configuration with the widths of the transformer and of the language model."""
    return replace(
        config,
        llm_hidden_size=lmm.config.text_config.hidden_size,
        joint_attention_dim=transformer.config.joint_attention_dim,
        pooled_projection_dim=transformer.config.pooled_projection_dim,
    )


def read_traits(folder: Path) -> MetaQueryTraits:
    """What the folder of a checkpoint says of itself; UniPic2's traits where it says nothing.

    Raises:
        ValueError: it says something else.
    """
    found = dict(json.loads((folder / "model_index.json").read_text()).get("traits", {}))
    try:
        reading = Reading(**found.pop("reading", {}))
        return MetaQueryTraits(reading=reading, **found)
    except TypeError as error:
        raise ValueError(f"{folder}/model_index.json: expected the traits of a MetaQuery policy ({error})") from error


def save_codec(codec: PatchCodec, folder: Path) -> None:
    """Write a patch codec as a folder, in diffusers' layout."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"patch_size": codec.patch_size, "num_channels": len(codec.scale)}
    (folder / CONFIG_NAME).write_text(json.dumps({"_class_name": _PATCH_CODEC, **sizes}, indent=1) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in codec.state_dict().items()}, folder / WEIGHTS_NAME)


def load_vae(folder: Path, dtype: torch.dtype) -> nn.Module:
    """An AutoencoderKL, or the patch codec of :func:`save_codec`, which is float32 always."""
    from diffusers import AutoencoderKL

    config = json.loads((folder / CONFIG_NAME).read_text())
    if config["_class_name"] != _PATCH_CODEC:
        kl: Any = AutoencoderKL
        vae: nn.Module = kl.from_pretrained(str(folder), torch_dtype=dtype)
        return vae
    codec = PatchCodec(config["patch_size"], config["num_channels"])
    codec.load_state_dict(load_file(folder / WEIGHTS_NAME))
    return codec


def pixels_per_latent(vae: nn.Module) -> int:
    """Side in pixels of what becomes one latent."""
    if isinstance(vae, PatchCodec):
        return vae.patch_size
    config: Any = vae.config
    return int(2 ** (len(config.block_out_channels) - 1))


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Images, uint8 [B, H, W, 3], to latents [B, C, h, w]; UniPic2's released code samples the VAE's posterior."""
    return vae.encode(images) if isinstance(vae, PatchCodec) else drawn_latents(vae, images)


def decode_images(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] to images in [-1, 1], [B, 3, H, W]."""
    if isinstance(vae, PatchCodec):
        return vae.decode(latents).permute(0, 3, 1, 2).float() / 127.5 - 1
    return decoded(vae, latents)
