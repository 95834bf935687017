"""CLIP behind one shape, from transformers or from open_clip: unit features of images and of texts.

B images or texts, D features. Every scorer that compares an image with a text (CLIPScore, PickScore, HPSv2, GenEval's
colours) differs in its weights and its scale alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.base import Images
from rewards.checkpoints import Placement, check_source, image_processor, local_file, require_package

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ClipSource:
    """Which CLIP.

    Attributes:
        model: transformers: a folder or a hub id. open_clip: the name of an architecture, such as "ViT-L-14".
        library: whose format the weights are in. The two give the same features up to how an image is resized.
        pretrained: open_clip only: a tag of its list such as "openai", a file, or "owner/model:file" of the hub.
        processor: transformers only: another folder or hub id for tokenizer and image processor; empty: the model's.

    Raises:
        ValueError: a path that leads nowhere, a missing package, or a setting of the other library.
    """

    model: str
    library: Literal["transformers", "open_clip"] = "transformers"
    pretrained: str = ""
    processor: str = ""

    def __post_init__(self) -> None:
        if self.library == "transformers":
            if self.pretrained:
                raise ValueError(f"pretrained: only for library='open_clip', got {self.pretrained!r}; leave it empty")
            check_source("model", self.model)
            if self.processor:
                check_source("processor", self.processor)
        elif self.library == "open_clip":
            if not self.pretrained or self.processor:
                raise ValueError(
                    "library='open_clip': expected pretrained, a tag such as 'openai' or a file, and no processor, got "
                    f"pretrained={self.pretrained!r} and processor={self.processor!r}"
                )
            check_source("pretrained", self.pretrained)
        else:
            raise ValueError(f"library: expected 'transformers' or 'open_clip', got {self.library!r}")

    def require(self) -> None:
        """Check that the library is installed.

        Raises:
            ValueError: it is not.
        """
        if self.library == "open_clip":
            require_package("open_clip", "clip", "take a ClipSource of library='transformers', if there is one")


class ClipModel(Protocol):
    """What scorers need of a CLIP."""

    @property
    def logit_scale(self) -> float:
        """The learnt temperature, exponentiated: logits are this times the cosine."""
        ...

    def image_features(self, images: Iterable[Images]) -> torch.Tensor:
        """Images uint8 [H, W, 3], of any sizes, to unit vectors float32 [B, D]."""
        ...

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts, cut at the model's context length, to unit vectors float32 [B, D]."""
        ...


def load_clip(source: ClipSource, placement: Placement) -> ClipModel:
    """Load a CLIP, which costs seconds and, from the hub, the network.

    Raises:
        OSError: weights that are not there.
        RuntimeError: a device that is not there.
    """
    return _Transformers(source, placement) if source.library == "transformers" else _OpenClip(source, placement)


def paired_cosines(clip: ClipModel, images: Iterable[Images], texts: Sequence[str]) -> NDArray[np.float64]:
    """cos(image_i, text_i) of each pair and of no other; a text that many images share is encoded once.  -> [B]."""
    if not texts:
        return np.zeros(0)
    unique = list(dict.fromkeys(texts))
    rows = [unique.index(text) for text in texts]
    products = clip.image_features(images) * clip.text_features(unique)[rows]
    return np.asarray(products.double().sum(-1).cpu().numpy())


class _Transformers:
    """A CLIPModel of transformers, or a model of the same shape."""

    def __init__(self, source: ClipSource, placement: Placement) -> None:
        from transformers import AutoTokenizer, CLIPModel

        processor = source.processor or source.model
        self._processor = image_processor(processor)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(processor)
        model: Any = CLIPModel.from_pretrained(source.model, dtype=placement.torch_dtype)
        self._model = model.to(placement.device).eval()
        self._placement = placement

    @property
    def logit_scale(self) -> float:
        return float(self._model.logit_scale.detach().double().exp())

    def image_features(self, images: Iterable[Images]) -> torch.Tensor:
        import torch

        pixels = self._processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        with torch.no_grad():
            seen = self._model.vision_model(
                pixel_values=pixels["pixel_values"].to(self._placement.device, self._placement.torch_dtype)
            )
            return _unit(self._model.visual_projection(seen.pooler_output))

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        import torch

        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self._placement.device)
        with torch.no_grad():
            read = self._model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            return _unit(self._model.text_projection(read.pooler_output))


class _OpenClip:
    """A CLIP of open_clip."""

    def __init__(self, source: ClipSource, placement: Placement) -> None:
        import open_clip

        pretrained = str(local_file(source.pretrained)) if ":" in source.pretrained else source.pretrained
        # OpenAI's weights were trained with it; open_clip only warns where the architecture's name does not say so.
        model, _, transform = open_clip.create_model_and_transforms(
            source.model, pretrained=pretrained, force_quick_gelu=pretrained == "openai"
        )
        self._model: Any = model.to(device=placement.device, dtype=placement.torch_dtype).eval()
        self._transform: Any = transform
        self._tokenizer: Any = open_clip.get_tokenizer(source.model)
        self._placement = placement

    @property
    def logit_scale(self) -> float:
        return float(self._model.logit_scale.detach().double().exp())

    def image_features(self, images: Iterable[Images]) -> torch.Tensor:
        import torch

        pixels = torch.stack([self._transform(Image.fromarray(image)) for image in images])
        with torch.no_grad():
            return _unit(self._model.encode_image(pixels.to(self._placement.device, self._placement.torch_dtype)))

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        import torch

        with torch.no_grad():
            return _unit(self._model.encode_text(self._tokenizer(list(texts)).to(self._placement.device)))


def _unit(features: torch.Tensor) -> torch.Tensor:
    exact = features.float()
    unit: torch.Tensor = exact / exact.norm(dim=-1, keepdim=True)
    return unit
