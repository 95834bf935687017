"""Policies whose prompts are embedded by frozen encoders, each distinct text and source image once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from agents.policies.backbone_settings import BackboneSettings
from agents.policies.base import FlowPolicy
from agents.policies.embeddings import EmbeddingCache, Row, Visit, content_hash, stack_rows
from agents.policies.pictures import check_same_number_of_sources, check_sources
from agents.types import Condition, PromptLike


class PromptedPolicy(FlowPolicy):
    """A flow policy whose encoders visit the device once a rollout, and whose embeddings are kept.

    Args:
        settings: which has the negative prompts, where encoders live and how many embeddings are kept.
    """

    max_sources: ClassVar[int | None] = None
    """Source images a prompt may have; None is any number."""

    def __init__(self, settings: BackboneSettings) -> None:
        self.settings = settings
        self._device = torch.device("cpu")
        self._texts, self._sources = EmbeddingCache(settings.cached_prompts), EmbeddingCache(settings.cached_prompts)

    @property
    @abstractmethod
    def text_encoders(self) -> Sequence[nn.Module]:
        """The frozen encoders of prompts."""

    @abstractmethod
    def embed_prompts(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """Embed texts, one row of tensors each, on any device.

        What is kept is embedded one text at a time: a matrix product's last bits depend on the batch's shape, and so
        would an embedding on what was asked for with it, which a resumed run does not know.
        :meth:`encode_batch` hands over a whole batch: but for those bits each row has to be the same, whatever else is
        in it.

        Args:
            texts: B prompts, instructions or negative prompts.
            sources: the source images of each, uint8 [H, W, 3], for encoders that look at them.
        """

    def encode_sources(self, images: Tensor) -> Tensor:
        """Source images, uint8 [B, H, W, 3], to clean reference latents [B, C, h, w]; kept ones are encoded alone."""
        raise NotImplementedError(f"{type(self).__name__} has max_sources {self.max_sources} and no encode_sources")

    @property
    def reads_sources(self) -> bool:
        """Whether :meth:`embed_prompts` looks at source images; if not, a text is embedded once for all of them."""
        return False

    @final
    @torch.no_grad()
    def prepare(self, prompts: Sequence[PromptLike]) -> None:
        """Embed all texts of a rollout in one visit of the text encoders."""
        self._check_sources(prompts)
        asked: set[Hashable] = set()
        for has_source in (False, True):
            kept: list[PromptLike] = []
            # What would push out the first of them again, negative prompts included, is left to be asked for later.
            for prompt in prompts:
                if bool(prompt.source_images) == has_source:
                    asked.update(self._text_keys([prompt]))
                    if len(asked) > self.settings.cached_prompts:
                        break
                    kept.append(prompt)
            if kept:
                self._text_rows(kept)

    @final
    @torch.no_grad()
    def encode(self, prompts: Sequence[PromptLike]) -> Condition:
        """Embed prompts, all with or all without source images, each distinct text and image once: [B]."""
        check_same_number_of_sources(prompts)
        self._check_sources(prompts)
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
    def encode_batch(self, prompts: Sequence[PromptLike]) -> Condition:
        """:meth:`encode` of a stream's batch, which does not come again: one call of each encoder, nothing kept: [B].

        There is no negative branch. Rows are those of :meth:`encode` but for the last bits, which depend on the batch:
        whoever goes on with a stream has to go on with the same batches.
        """
        check_same_number_of_sources(prompts)
        self._check_sources(prompts)
        texts, sources = [prompt.text for prompt in prompts], [tuple(prompt.source_images) for prompt in prompts]
        visit = Visit(self.text_encoders, self.settings.offload_encoders)
        tensors = stack_rows(visit.run(self._device, lambda: self.embed_prompts(texts, sources)))
        for index, images in enumerate(zip(*sources, strict=True)):
            batch = torch.from_numpy(np.stack(images)).to(self._device)
            tensors[f"reference_{index}"] = self.encode_sources(batch)
        return Condition(self._on_device(tensors))

    def _text_rows(self, prompts: Sequence[PromptLike]) -> list[Row]:
        """Rows of the positive branch, then as many of the negative one."""
        texts = [prompt.text for prompt in prompts] + [self._negative(prompt) for prompt in prompts]
        sources = [tuple(prompt.source_images) for prompt in prompts] * 2

        def compute(missing: list[int]) -> Sequence[Row]:
            visit = Visit(self.text_encoders, self.settings.offload_encoders)
            return visit.run(self._device, lambda: [self.embed_prompts([texts[i]], [sources[i]])[0] for i in missing])

        return self._texts.rows(self._text_keys(prompts), compute)

    def _text_keys(self, prompts: Sequence[PromptLike]) -> list[Hashable]:
        """What each of :meth:`_text_rows` depends on."""
        seen = [
            (len(prompt.source_images), *map(content_hash, prompt.source_images if self.reads_sources else ()))
            for prompt in prompts
        ]
        texts = [prompt.text for prompt in prompts] + [self._negative(prompt) for prompt in prompts]
        return list(zip(texts, seen * 2, strict=True))

    def _negative(self, prompt: PromptLike) -> str:
        return self.settings.edit_negative_prompt if prompt.source_images else self.settings.negative_prompt

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

    def _check_sources(self, prompts: Sequence[PromptLike]) -> None:
        check_sources(prompts, self.image_size, self.max_sources, type(self).__name__)
