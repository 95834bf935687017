"""What an edit reward's model reads: an instruction and two pictures as tokens and patches of Qwen2.5-VL.

The pictures are prepared here, not by transformers' processors, some of which need torchvision: resized to whole
patches within a budget of pixels, normalised, and cut into patches in Qwen2-VL's order (a test holds the two equal).

Shapes: B edits, L tokens, N patches of all pictures, p patch size, t temporal patch size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rewards.base import Images

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int, int]
TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE = "edit_reward.v1"
PREPROCESSOR = "preprocessor_config.json"
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
_PICTURES = (("source", "image"), ("frames",))
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
# Qwen2-VL's own bound on how elongated a picture may be.
_MAX_ASPECT = 200


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become patches: entries of a checkpoint's ``preprocessor_config.json``, Qwen2.5-VL's unless given.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: side, in patches, of what becomes one token.
        temporal_patch_size: frames of a patch; a picture is repeated so often.
        min_pixels: smaller pictures are enlarged.
        max_pixels: larger ones are reduced; Qwen's own is 12845056, EditReward (arXiv:2509.26346) has 200704 as here.
        image_mean: of the channels, in [0, 1].
        image_std: of the channels.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 448 * 448
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def save(self, folder: Path) -> None:
        """Write ``preprocessor_config.json``, which transformers' own processors read too."""
        known = {"image_processor_type": "Qwen2VLImageProcessor", **asdict(self)}
        (folder / PREPROCESSOR).write_text(json.dumps(known, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, max_pixels: int | None = None) -> ImageSettings:
        """Read ``preprocessor_config.json``; ``max_pixels`` replaces the file's where it is given.

        Raises:
            ValueError: the file is missing or is none of a Qwen2-VL processor.
        """
        path = folder / PREPROCESSOR
        try:
            found = json.loads(path.read_text())
            # transformers 5 writes the bounds as the edges of a size; they are numbers of pixels all the same.
            size = found.get("size") or {}
            bounds = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
            found = {name: value for name, value in bounds.items() if value is not None} | found
            values = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
            values |= {name: tuple(values[name]) for name in ("image_mean", "image_std") if name in values}
            return cls(**{**values, **({} if max_pixels is None else {"max_pixels": max_pixels})})
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected the settings of a Qwen2-VL image processor ({error})") from error


def fitted_size(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """The size that a picture is resized to: whole merged patches, its aspect kept, its pixels within the bounds.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ValueError(
            f"picture: expected sides that differ by a factor of {_MAX_ASPECT} at most, got {height} x {width}"
        )
    factor = settings.patch_size * settings.merge_size
    # A thin picture may round to nothing here: it is enlarged below.
    high, wide = (round(side / factor) * factor for side in (height, width))
    if settings.min_pixels <= high * wide <= settings.max_pixels and high and wide:
        return high, wide
    too_large = high * wide > settings.max_pixels
    scale = math.sqrt((settings.max_pixels if too_large else settings.min_pixels) / (height * width))
    whole = math.floor if too_large else math.ceil
    high, wide = (max(factor, whole(side * scale / factor) * factor) for side in (height, width))
    return high, wide


def image_patches(frames: Sequence[Images], settings: ImageSettings) -> tuple[NDArray[np.float32], Grid]:
    """One picture, or several of one size as the frames of a patch, as patches float32 [N, 3 t p p] and their grid.

    Args:
        frames: uint8 [H, W, 3] each: one, which is repeated, or as many as ``temporal_patch_size``.
        settings: of the checkpoint.

    Returns:
        The patches in Qwen2-VL's order, and (1, rows, columns).
    """
    cut = [_cut(frame, settings) for frame in frames]
    repeated = cut * settings.temporal_patch_size if len(cut) == 1 else cut
    stacked = np.stack(repeated, axis=2)  # [N, 3, t, p, p]
    high, wide = fitted_size(frames[0].shape[0], frames[0].shape[1], settings)
    return stacked.reshape(len(stacked), -1), (1, high // settings.patch_size, wide // settings.patch_size)


def _cut(image: Images, settings: ImageSettings) -> NDArray[np.float32]:
    """A picture as patches [N, 3, p, p]; those that become one token lie side by side."""
    from PIL import Image

    size = fitted_size(image.shape[0], image.shape[1], settings)
    if size != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC), np.uint8)
    mean, std = (np.array(values, np.float32) for values in (settings.image_mean, settings.image_std))
    pixels = (image.astype(np.float32) / np.float32(255) - mean) / std
    p, m = settings.patch_size, settings.merge_size
    rows, columns = size[0] // p, size[1] // p
    # [row / m, m, p, column / m, m, p, channel] -> [row / m, column / m, m, m, channel, p, p]
    cut = pixels.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(cut.reshape(rows * columns, 3, p, p), np.float32)


@dataclass(frozen=True)
class EditTemplate:
    """A versioned text with {prompt} in it, and either {source} and {image} or {frames}, once each.

    The instruction goes before the pictures and nothing of varying length between them: a place in the one is then at
    a fixed distance, in Qwen2.5-VL's rotary positions, from the same place in the other. ``{frames}`` is both pictures
    as the two frames of one patch, as Qwen2.5-VL has those of a film: half the tokens, and each sees both pictures at
    its place. Both have to be of one size then.

    Attributes:
        name: the file's name without ``.txt``.
        text: its text.

    Raises:
        ValueError: a placeholder is missing, repeated or unknown.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        found = _PLACEHOLDER.findall(self.text)
        if sorted(found) not in [sorted(("prompt", *pictures)) for pictures in _PICTURES]:
            raise ValueError(
                f"template {self.name}: expected {{prompt}}, and {{source}} and {{image}} or {{frames}}, once each, "
                f"got {found}"
            )

    @property
    def sha256(self) -> str:
        """Of the text, 64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def has_frames(self) -> bool:
        """Whether both pictures are the frames of one patch."""
        return "{frames}" in self.text

    @cached_property
    def parts(self) -> list[str]:
        """The text cut at its placeholders: text and placeholder's name in turn."""
        return _PLACEHOLDER.split(self.text)

    @classmethod
    def load(cls, name: str = TEMPLATE) -> EditTemplate:
        """One of ``rewards/templates``.

        Raises:
            ValueError: there is none of that name.
        """
        path = TEMPLATES / f"{name}.txt"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in TEMPLATES.glob("edit_reward*.txt")))
            raise ValueError(f"template: expected one of {known}, got {name!r}")
        return cls(name, path.read_text("utf-8"))


@dataclass(frozen=True)
class EditInputs:
    """Turns edits into a batch for the model.

    Attributes:
        tokenizer: of the checkpoint, with Qwen2-VL's three tokens of vision.
        settings: of the checkpoint's pictures.
        template: what surrounds them.
        max_tokens: longest sequence; a longer one cannot be judged.
    """

    tokenizer: Any
    settings: ImageSettings
    template: EditTemplate
    max_tokens: int = 4096

    @classmethod
    def load(cls, folder: Path, template: EditTemplate | None = None, max_pixels: int | None = None) -> EditInputs:
        """Tokenizer and settings of a checkpoint's folder.

        Raises:
            ValueError: a file is missing or damaged, or the tokenizer lacks the tokens of vision.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        unknown = [t for t in (VISION_START, IMAGE_PAD, VISION_END) if t not in tokenizer.get_vocab()]
        if unknown:
            raise ValueError(f"{folder}: expected a tokenizer of Qwen2-VL, got one without {', '.join(unknown)}")
        return cls(tokenizer, ImageSettings.load(folder, max_pixels), template or EditTemplate.load())

    def __call__(
        self, instructions: Sequence[str], sources: Sequence[Images], images: Sequence[Images]
    ) -> dict[str, Tensor]:
        """A batch of B edits.

        Args:
            instructions: B texts.
            sources: B pictures before, uint8 [H, W, 3].
            images: B pictures after.

        Returns:
            input_ids, attention_mask and mm_token_type_ids [B, L], padded on the right; pixel_values [N, 3 t p p] and
            image_grid_thw [2 B, 3], a source before its image,
            or [B, 3] where they are frames.

        Raises:
            ValueError: a picture is too elongated, a sequence too long, or frames differ in size.
        """
        import torch

        cut = [
            image_patches(frames, self.settings)
            for pair in zip(sources, images, strict=True)
            for frames in self._runs(pair)
        ]
        grids = [grid for _, grid in cut]
        each = len(grids) // max(len(instructions), 1)
        sequences = [self._tokens(text, grids[each * row : each * (row + 1)]) for row, text in enumerate(instructions)]
        return {
            **self.padded(sequences),
            "pixel_values": torch.from_numpy(np.concatenate([patches for patches, _ in cut])),
            "image_grid_thw": torch.tensor(grids),
        }

    def _runs(self, pair: tuple[Images, Images]) -> list[tuple[Images, ...]]:
        """What becomes a run of tokens each: both pictures, or both as frames of one."""
        if not self.template.has_frames:
            return [(picture,) for picture in pair]
        if pair[0].shape != pair[1].shape or self.settings.temporal_patch_size != len(pair):
            raise ValueError(
                f"frames: expected two pictures of one size and patches of two frames, got {list(pair[0].shape)}, "
                f"{list(pair[1].shape)} and {self.settings.temporal_patch_size}; train with a template of two pictures"
            )
        return [pair]

    def unfit(self, instruction: str, pictures: tuple[Images, Images]) -> str:
        """Why an edit cannot be judged; empty where it can."""
        grids = []
        p = self.settings.patch_size
        try:
            for picture in pictures:
                if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3:
                    raise ValueError(f"picture: expected uint8 [H, W, 3], got {type(picture).__name__}")
                if picture.shape[2] != 3 or 0 in picture.shape:
                    raise ValueError(f"picture: expected uint8 [H, W, 3], got {list(picture.shape)}")
                height, width = fitted_size(picture.shape[0], picture.shape[1], self.settings)
                grids.append((1, height // p, width // p))
            self._tokens(instruction, grids[: len(self._runs(pictures))])
        except ValueError as error:
            return str(error)
        return ""

    def padded(self, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Sequences of tokens as input_ids, attention_mask and mm_token_type_ids, [B, L]."""
        import torch

        longest = max(map(len, sequences))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[*sequence, *[pad] * (longest - len(sequence))] for sequence in sequences])
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == self._image_pad).int()}

    def _tokens(self, instruction: str, grids: Sequence[Grid]) -> list[int]:
        """The tokens of one edit, by the grids of its runs of patches."""
        tokens: list[int] = []
        runs = iter(grids)
        for index, part in enumerate(self.template.parts):
            if index % 2 == 0:
                tokens += self._literal(part)
            elif part == "prompt":
                # Split, so that an instruction that spells a token of vision is text like any other.
                tokens += self.tokenizer(instruction, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            else:
                _, rows, columns = next(runs)
                count = rows * columns // self.settings.merge_size**2
                tokens += [self._vision_start, *[self._image_pad] * count, self._vision_end]
        if len(tokens) > self.max_tokens:
            raise ValueError(
                f"edit: expected at most {self.max_tokens} tokens, got {len(tokens)}; shorten the instruction"
            )
        return tokens

    def _literal(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    @cached_property
    def _image_pad(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE_PAD))

    @cached_property
    def _vision_start(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(VISION_START))

    @cached_property
    def _vision_end(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(VISION_END))
