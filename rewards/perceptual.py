"""How much of the source an edit leaves as it was, by LPIPS and by DINO: rewards of consistency.

Both are highest for an untouched source. On their own they teach a policy to do nothing: weigh them beside a reward for
the edit itself, or hold them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rewards.base import Images, Prompt, Scores
from rewards.checkpoints import (
    Once,
    Placement,
    check_source,
    image_processor,
    load_tensors,
    local_file,
    scorer_traits,
    scores_at,
)
from rewards.lpips import LPIPS, SMALLEST, Network, make_lpips

if TYPE_CHECKING:
    import torch

NO_SOURCE = "the prompt has no source image"


@dataclass(frozen=True)
class LPIPSSettings:
    """Which LPIPS; the published files are named, since no single place on the hub has them.

    Attributes:
        trunk: torchvision's checkpoint, ``alexnet-owt-7be5be79.pth`` or ``vgg16-397923af.pth``: a path or
            "owner/model:file" of the hub.
        linear: LPIPS's own weights of version 0.1, ``lpips/weights/v0.1/alex.pth`` or ``vgg.pth`` in the package
            ``lpips``.
        network: "alex", as the authors measure with, or "vgg".
        placement: device and batch size; it runs in float32 always.

    Raises:
        ValueError: a path that leads nowhere, an unknown network, or another dtype than float32.
    """

    trunk: str
    linear: str
    network: Network = "alex"
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        if self.network not in SMALLEST:
            raise ValueError(f"network: expected 'alex' or 'vgg', got {self.network!r}")
        if self.placement.dtype != "float32":
            raise ValueError(f"placement: expected dtype='float32' for LPIPS, got {self.placement.dtype!r}")
        check_source("trunk", self.trunk)
        check_source("linear", self.linear)


class SourceLPIPS:
    """1 - LPIPS(image, source), a reward of about 0.2 to 1; 1 for an untouched source.

    See :meth:`rewards.lpips.LPIPS.distance` (arXiv:1801.03924). The source is the prompt's first source image, resized
    to the image's size where it differs. Not available: a prompt without a source, an image too small for the network.

    Differs: the published distance is of images of any size; this too, and it grows as they get smaller: compare
    numbers of one size only.
    """

    def __init__(self, settings: LPIPSSettings) -> None:
        self.settings = settings
        self.traits = scorer_traits("SourceLPIPS", settings, settings.placement)
        self._lpips = Once(partial(_load_lpips, settings))

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] against their prompts' sources -> [B]."""
        import torch

        smallest = SMALLEST[self.settings.network]
        if len(images) and min(images.shape[1:3]) < smallest:
            reason = f"the image is smaller than {smallest} pixels, and {self.settings.network} sees nothing of it"
            return scores_at(np.zeros(0), [], len(images), dict.fromkeys(range(len(images)), reason))
        rows, sources, which, reasons = _sources(prompts)
        if not rows:
            return scores_at(np.zeros(0), [], len(images), reasons)
        lpips = self._lpips()
        with torch.no_grad():
            of_sources = lpips.features(self._pixels([_resized(source, images.shape[1:3]) for source in sources]))
            of_images = lpips.features(self._pixels(list(images[rows])))
            distances = lpips.distance(of_images, [features[which] for features in of_sources])
        return scores_at(1 - distances.double().cpu().numpy(), rows, len(images), reasons)

    def _pixels(self, images: Sequence[Images]) -> torch.Tensor:
        import torch

        stacked = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
        return torch.from_numpy(stacked).to(self.settings.placement.device).float() / 255


@dataclass(frozen=True)
class DINOSettings:
    """Which DINO.

    Attributes:
        model: a folder or a hub id of a vision transformer with a class token and its image processor: DINOv2, DINO
            (``facebook/dino-vits16`` is that of DreamBooth's metric) or DINOv3.
        placement: device, precision, batch size.

    Raises:
        ValueError: a path that leads nowhere.
    """

    model: str = "facebook/dinov2-base"
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        check_source("model", self.model)


class SourceDINO:
    """cos(h_[CLS](image), h_[CLS](source)), a reward in [-1, 1], mostly above 0; 1 for an untouched source.

    The subject fidelity of DreamBooth (arXiv:2208.12242) with DINO (arXiv:2104.14294) or DINOv2 (arXiv:2304.07193). It
    sees what things are and hardly where they are. The source is the prompt's first source image; a prompt without one
    is not available. The published processors cut the margins off: what changes there is not seen.
    """

    def __init__(self, settings: DINOSettings | None = None) -> None:
        self.settings = settings or DINOSettings()
        self.traits = scorer_traits("SourceDINO", self.settings, self.settings.placement)
        self._model = Once(self._load)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] against their prompts' sources -> [B]."""
        rows, sources, which, reasons = _sources(prompts)
        if not rows:
            return scores_at(np.zeros(0), [], len(images), reasons)
        products = self._features(list(images[rows])) * self._features(sources)[which]
        return scores_at(products.sum(-1).cpu().numpy(), rows, len(images), reasons)

    def _features(self, images: Sequence[Images]) -> torch.Tensor:
        import torch

        model, processor = self._model()
        pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
        placement = self.settings.placement
        with torch.no_grad():
            hidden = model(pixel_values=pixels.to(placement.device, placement.torch_dtype)).last_hidden_state
        first = hidden[:, 0].double()
        unit: torch.Tensor = first / first.norm(dim=-1, keepdim=True)
        return unit

    def _load(self) -> tuple[Any, Any]:
        from transformers import AutoModel

        settings = self.settings
        model: Any = AutoModel.from_pretrained(settings.model, dtype=settings.placement.torch_dtype)
        return model.to(settings.placement.device).eval(), image_processor(settings.model)


def _sources(prompts: Sequence[Prompt]) -> tuple[list[int], list[Images], list[int], dict[int, str]]:
    """Rows with a source, the different sources, which of them each row has, and why the other rows have none."""
    rows = [index for index, prompt in enumerate(prompts) if prompt.source_images]
    reasons = {index: NO_SOURCE for index, prompt in enumerate(prompts) if not prompt.source_images}
    sources: dict[int, Images] = {}
    for row in rows:
        sources.setdefault(id(prompts[row].source_images[0]), prompts[row].source_images[0])
    order = list(sources)
    return rows, list(sources.values()), [order.index(id(prompts[row].source_images[0])) for row in rows], reasons


def _resized(image: Images, size: tuple[int, ...]) -> Images:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _load_lpips(settings: LPIPSSettings) -> LPIPS:
    trunk, linear = load_tensors(local_file(settings.trunk)), load_tensors(local_file(settings.linear))
    return make_lpips(settings.network, trunk, linear, settings.placement.device)
