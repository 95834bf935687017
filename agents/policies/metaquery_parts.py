"""The parts of a UniPic2-MetaQuery checkpoint and their folder.

A folder, or a repository of the hub, has ``model_index.json``, ``transformer/`` and ``scheduler/`` (diffusers),
``vae/`` (diffusers' AutoencoderKL, or the embedded world's patch codec), ``lmm/`` (transformers: Qwen2.5-VL with
tokenizer and image settings) and ``conditioner/`` (the connector, as published). UniPic 2.0's own has neither an index
nor a language model: its released scripts load :data:`LANGUAGE_MODEL` from the hub, and so does this where there is no
``lmm/``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from agents.policies.backbone import INDEX_NAME, BackboneSettings
from agents.policies.connector import CONFIG_NAME, WEIGHTS_NAME, Connector, ConnectorConfig
from agents.policies.loading import has_file, model_file, one_line
from agents.policies.metaquery_vae import load_vae, save_codec
from agents.policies.query_reader import Reading
from agents.policies.scenes_parts import PatchCodec

PIPELINE_NAME = "UniPic2MetaQueryPipeline"
LANGUAGE_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
"""What UniPic 2.0's released scripts read prompts with."""
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
    def from_pretrained(cls, source: str | Path, settings: BackboneSettings) -> MetaQueryPipeline:
        """Read a folder of :meth:`save_pretrained`, a published one, or a repository of the hub that is either.

        Raises:
            ValueError: a part is missing or of another kind.
        """
        lmm = (source, "lmm") if has_file(source, f"lmm/{CONFIG_NAME}") else (LANGUAGE_MODEL, "")
        parts = _generator(source, settings) | _language_model(*lmm, settings.torch_dtype)
        connector = _connector(source).to(settings.weights_dtype)
        return cls(**parts, connector=connector, traits=read_traits(source))

    @classmethod
    def from_parts(
        cls,
        generator: str | Path,
        lmm: str | Path,
        connector: ConnectorConfig | Path | None = None,
        traits: MetaQueryTraits | None = None,
        settings: BackboneSettings | None = None,
    ) -> MetaQueryPipeline:
        """Put a policy together from checkpoints: what stages A and C of pre-training start from.

        Args:
            generator: a folder with ``transformer``, ``vae`` and ``scheduler``: SD3.5, or stage B's; or a repository of
                the hub.
            lmm: Qwen2.5-VL's folder, or its repository.
            connector: a trained one's folder, or sizes of a new one, whose widths are those of the two models; the
                published depth by default. New weights come from torch's own generator.
            traits: UniPic2's unless given.
            settings: whose precision is taken; the defaults with ``float32_weights``, for training, unless given.

        Raises:
            ValueError: a part is missing.
        """
        settings = settings or BackboneSettings(float32_weights=True)
        parts = _generator(generator, settings) | _language_model(lmm, "", settings.torch_dtype)
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
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")


def _generator(source: str | Path, settings: BackboneSettings) -> dict[str, Any]:
    """Transformer, VAE and scheduler of a folder or a repository."""
    import diffusers

    sd3: Any = diffusers.SD3Transformer2DModel
    euler: Any = diffusers.FlowMatchEulerDiscreteScheduler
    dtype = settings.weights_dtype
    try:
        return {
            "transformer": sd3.from_pretrained(str(source), subfolder="transformer", torch_dtype=dtype),
            "vae": load_vae(source, settings.torch_dtype),
            "scheduler": euler.from_pretrained(str(source), subfolder="scheduler"),
        }
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: expected transformer/, vae/, scheduler/, got none that load ({one_line(error)})"
        ) from error


def _language_model(source: str | Path, subfolder: str, dtype: torch.dtype) -> dict[str, Any]:
    """Qwen2.5-VL with its tokenizer and image processor, of a folder or a repository, or of a folder in it."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model: Any = transformers.Qwen2_5_VLForConditionalGeneration
    pictures: Any = Qwen2VLImageProcessorPil
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source), "subfolder": subfolder}
    try:
        return {
            "lmm": model.from_pretrained(**where, dtype=dtype),
            "tokenizer": transformers.AutoTokenizer.from_pretrained(**where),
            "pictures": pictures.from_pretrained(**where),
        }
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{Path(source) / subfolder}: expected a Qwen2.5-VL with tokenizer and image settings, got none that loads "
            f"({one_line(error)}); hf download {LANGUAGE_MODEL}, or put it into the checkpoint's folder as lmm/"
        ) from error


def _connector(source: str | Path) -> Connector:
    try:
        config, _ = (model_file(source, f"conditioner/{name}") for name in (CONFIG_NAME, WEIGHTS_NAME))
    except OSError as error:
        raise ValueError(f"{source}: expected a connector in conditioner/, got none ({one_line(error)})") from error
    return Connector.load(config.parent)


def _fitted(config: ConnectorConfig, transformer: Any, lmm: Any) -> ConnectorConfig:
    """The configuration with the widths of the transformer and of the language model."""
    return replace(
        config,
        llm_hidden_size=lmm.config.text_config.hidden_size,
        joint_attention_dim=transformer.config.joint_attention_dim,
        pooled_projection_dim=transformer.config.pooled_projection_dim,
    )


def read_traits(source: str | Path) -> MetaQueryTraits:
    """What the index of a checkpoint says of it; UniPic2's traits where it says nothing, or there is none.

    Raises:
        ValueError: it says something else.
    """
    try:
        index = model_file(source, INDEX_NAME)
    except FileNotFoundError:
        return MetaQueryTraits()
    found = dict(json.loads(index.read_text()).get("traits", {}))
    try:
        reading = Reading(**found.pop("reading", {}))
        return MetaQueryTraits(reading=reading, **found)
    except TypeError as error:
        raise ValueError(f"{source}/{INDEX_NAME}: expected the traits of a MetaQuery policy ({error})") from error
