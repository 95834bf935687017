"""What a frozen Qwen2.5-VL makes of a prompt, read off learnt queries behind it (MetaQuery, arXiv:2504.06256).

The prompt, and in editing the source image before it, are put into the model's chat template without its system
message, up to where the assistant would answer; there the queries stand in place of an answer's embeddings, and one
causal forward pass of the language model gives their last hidden states. As in UniPic 2.0's released code
(arXiv:2509.04548).

Shapes: B prompts, L tokens of the longest, N queries, W width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Positions = Literal["sequence", "mrope"]
GENERATE = "Generate an image: {}"
"""What a prompt of text-to-image is wrapped in; an instruction is read as it is."""
_SYSTEM_START, _TURN_END = "<|im_start|>system\n", "<|im_end|>\n"
# A character of a private use area: no text has it, and templates pass it through.
_HERE = "\ue000"


@dataclass(frozen=True)
class Reading:
    """How prompts are read; part of a checkpoint, for queries are trained with it.

    Attributes:
        pixels_per_token: side in pixels of what becomes one token of the language model. UniPic2 has 32 (the image is
            reduced by 28 / 32 and Qwen2.5-VL has a token for 28 x 28 pixels).
        positions: ``"sequence"`` counts tokens, images' and queries' too, as UniPic2's released code ends up doing;
            ``"mrope"`` gives images rows and columns, as Qwen2.5-VL was trained.
        reads_image: whether the language model sees the source image.
    """

    pixels_per_token: int = 32
    positions: Positions = "sequence"
    reads_image: bool = True

    def __post_init__(self) -> None:
        if self.pixels_per_token < 1:
            raise ValueError(f"pixels_per_token: expected 1 or more, got {self.pixels_per_token}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions: expected one of {', '.join(get_args(Positions))}, got {self.positions!r}")


@dataclass(frozen=True)
class Tokens:
    """A batch of prompts, padded on the right.

    Attributes:
        ids: [B, L].
        mask: 1 where there is a token, [B, L].
        pixels: patches of all images, in order, or None where there are none.
        grids: (1, rows, columns) of patches of each image, [B, 3], or None.
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor | None = None
    grids: Tensor | None = None

    def to(self, device: torch.device) -> Tokens:
        """Move every tensor."""
        moved = [None if tensor is None else tensor.to(device) for tensor in (self.pixels, self.grids)]
        return Tokens(self.ids.to(device), self.mask.to(device), *moved)


class QueryReader:
    """Reads queries' states off a frozen Qwen2.5-VL.

    Args:
        lmm: transformers' ``Qwen2_5_VLForConditionalGeneration``; it is not changed.
        tokenizer: its tokenizer, with the chat template.
        pictures: its image processor.
        reading: see :class:`Reading`.
    """

    def __init__(self, lmm: Any, tokenizer: Any, pictures: Any, reading: Reading) -> None:
        self.lmm, self.tokenizer, self.pictures, self.reading = lmm, tokenizer, pictures, reading
        self.image_id = int(lmm.config.image_token_id)
        self._image = tokenizer.convert_ids_to_tokens(self.image_id)

    def states(self, texts: Sequence[str], sources: Sequence[Sequence[Any]], queries: Tensor) -> Tensor:
        """The queries' last hidden states behind each prompt; gradients reach the queries.

        Args:
            texts: B prompts or instructions.
            sources: images of each, uint8 [H, W, 3]: none in text-to-image.
            queries: [N, W].

        Returns:
            [B, N, W].
        """
        batch = self.tokenize(texts, sources).to(queries.device)
        model, count = self.lmm.model, len(queries)
        with torch.no_grad():
            embeddings = self.embed(batch)
        queries = queries.to(embeddings.dtype).expand(len(texts), -1, -1)
        mask = torch.cat([batch.mask, batch.mask.new_ones(len(texts), count)], 1)
        output = model.language_model(
            inputs_embeds=torch.cat([embeddings, queries], 1),
            attention_mask=mask,
            position_ids=self._positions(batch, mask),
            use_cache=False,
        )
        states: Tensor = output.last_hidden_state[:, -count:]
        return states

    def tokenize(self, texts: Sequence[str], sources: Sequence[Sequence[Any]]) -> Tokens:
        """Prompts in the chat template, with as many image tokens as the images take."""
        has_image = bool(sources and sources[0]) and self.reading.reads_image
        grids, pixels = self.patches([images[0] for images in sources]) if has_image else (None, None)
        wrap = "{}" if sources and sources[0] else GENERATE
        rows = [
            self.prompt_ids(wrap.replace("{}", text), None if grids is None else grids[index].tolist())
            for index, text in enumerate(texts)
        ]
        lengths = torch.tensor([len(row) for row in rows])
        padding: Any = self.tokenizer.pad_token_id
        ids = torch.tensor([[*row, *[padding] * (int(lengths.max()) - len(row))] for row in rows])
        return Tokens(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long(), pixels, grids)

    def prompt_ids(self, text: str, grid: Sequence[int] | None = None) -> list[int]:
        """One prompt up to the assistant's turn; ``grid`` is its image's, in patches."""
        before, after = self._frame(grid is not None).split(_HERE)
        if grid is not None:
            num_tokens = grid[1] * grid[2] // int(self.pictures.merge_size) ** 2
            before = before.replace(self._image, self._image * num_tokens)
        # Split, so that a prompt that spells a token of the template is text like any other.
        middle = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*self._ids(before), *middle, *self._ids(after)]

    def embed(self, batch: Tokens) -> Tensor:
        """Embeddings of tokens, the images' from the vision tower: [B, L, W]."""
        embeddings: Tensor = self.lmm.get_input_embeddings()(batch.ids)
        if batch.pixels is None:
            return embeddings
        visual = self.lmm.model.visual
        features = visual(batch.pixels.to(visual.dtype), grid_thw=batch.grids).pooler_output
        is_image = (batch.ids == self.image_id)[..., None]
        return embeddings.masked_scatter(is_image, features.to(embeddings.dtype))

    def _positions(self, batch: Tokens, mask: Tensor) -> Tensor:
        """Positions of tokens and queries, [B, L + N] or [3, B, L + N]; padding takes none."""
        if self.reading.positions == "sequence" or batch.grids is None:
            return (mask.cumsum(1) - 1).clamp(min=0)
        ids = torch.cat([batch.ids, batch.ids.new_zeros(len(mask), mask.shape[1] - batch.ids.shape[1])], 1)
        is_image = (ids == self.image_id) & mask.bool()
        positions: Tensor = self.lmm.model.get_rope_index(
            input_ids=ids, mm_token_type_ids=is_image.int(), image_grid_thw=batch.grids, attention_mask=mask
        )[0]
        return positions

    def patches(self, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Grids [B, 3] and patches of images, each reduced to a token for every ``pixels_per_token`` pixels."""
        side = int(self.pictures.patch_size) * int(self.pictures.merge_size)
        rows, columns = (length // self.reading.pixels_per_token for length in images[0].shape[:2])
        # One pixel more than asked for: the processor rounds sizes down.
        bounds = {"shortest_edge": rows * columns * side**2, "longest_edge": rows * columns * side**2 + 1}
        found = self.pictures(images=list(images), size=bounds, return_tensors="pt", input_data_format="channels_last")
        grids: Tensor = found["image_grid_thw"]
        wanted = [1, *(count * int(self.pictures.merge_size) for count in (rows, columns))]
        if any(grid != wanted for grid in grids.tolist()):
            raise ValueError(
                f"source images: expected sides that are multiples of {self.reading.pixels_per_token} pixels, "
                f"got {images[0].shape[0]} x {images[0].shape[1]}"
            )
        return grids, found["pixel_values"]

    def _frame(self, has_image: bool) -> str:
        """The chat template around a text, which is one private character; without a system message."""
        content = [{"type": "image"}] * has_image + [{"type": "text", "text": _HERE}]
        frame: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return frame.split(_TURN_END, 1)[1] if frame.startswith(_SYSTEM_START) else frame

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
