"""The digit judge of the embedded world: its question as vLLM renders it, its target, and heads that see both pictures.

Shapes: B edits, L tokens, V tokens of the vocabulary, D digits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.scenes.pretraining import vocabulary
from envs.scenes.world import CANVAS
from experiments.scenes_judge_reward import TEMPLATE
from experiments.served_rewards import find_template
from rewards.base import Images, Prompt
from rewards.judges.messages import content_parts
from rewards.judges.readouts import LabelReadout
from rewards.judges.templates import Template
from rewards.judges.tiny import IMAGE_PAD, TURN_END, TinyVLM, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

PREPROCESSOR = "preprocessor_config.json"
PICTURES = ("source", "image", "first", "second")
"""Placeholders that stand for a picture."""
OTHER_TEMPLATES = ("scenes_yes_no.v1", "scenes_rubric.v1", "scenes_better.v1")
"""What the judge is asked besides digits."""
_TEMPORAL_PATCH = 2
_MEAN = _STD = 0.5


@dataclass(frozen=True)
class JudgeInputs:
    """Turns edits into the batch that the judge reads when vLLM is asked by ``VLMJudge``.

    The text is the chat template's over the parts of the user's message, with as many image tokens as a picture has;
    pictures are cut as Qwen2-VL's processor does. A test holds both equal to transformers' own.

    Attributes:
        tokenizer: with the chat template.
        shape: whose picture settings count.
        template: the question.
    """

    tokenizer: PreTrainedTokenizerBase
    shape: TinyVLM
    template: Template

    def __call__(
        self, instructions: Sequence[str], sources: Sequence[Images], images: Sequence[Images]
    ) -> dict[str, Tensor]:
        """A batch of B edits.

        Args:
            instructions: B texts.
            sources: B pictures before, uint8 [H, W, 3].
            images: B pictures after.

        Returns:
            input_ids, attention_mask and mm_token_type_ids [B, L], padded on the right; pixel_values and
            image_grid_thw [2 B, 3], a source before its image.

        Raises:
            ValueError: a picture is of a size that the processor would change.
        """
        return self.batch(instructions, list(zip(sources, images, strict=True)))

    def batch(
        self, instructions: Sequence[str], pictures: Sequence[Sequence[Images]], answers: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """A batch as above of any pictures, each row's in the order that the template shows them.

        Args:
            instructions: B texts.
            pictures: of each row, as many as the template has places for.
            answers: what is said to each, and the turn's end, behind the question; nothing where left out.
        """
        cut = [[picture_patches(picture, self.shape) for picture in row] for row in pictures]
        sequences = [self.tokens(text, [grid for _, grid in row]) for text, row in zip(instructions, cut, strict=True)]
        if answers:
            sequences = [[*asked, *self.answer(said)] for asked, said in zip(sequences, answers, strict=True)]
        longest = max(map(len, sequences))
        pad: Any = self.tokenizer.pad_token_id
        ids = torch.tensor([[*sequence, *[pad] * (longest - len(sequence))] for sequence in sequences])
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
            "mm_token_type_ids": (ids == self.image_pad).int(),
            "pixel_values": torch.from_numpy(np.concatenate([patches for row in cut for patches, _ in row])),
            "image_grid_thw": torch.tensor([grid for row in cut for _, grid in row]),
        }

    def answer(self, text: str) -> list[int]:
        """The ids of an answer and of the turn's end."""
        ids: Any = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, int(self._id(TURN_END))]

    def text(self, instruction: str) -> str:
        """The whole prompt, up to where the judge answers, with one token a picture."""
        prompt = Prompt(instruction)
        parts = content_parts(self.template, prompt, dict.fromkeys(PICTURES, ("",)))
        content: Any = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
        rendered: Any = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    def tokens(self, instruction: str, grids: Sequence[tuple[int, int, int]]) -> list[int]:
        """The ids of the prompt, with the image tokens of pictures of these grids of patches."""
        pieces = self.text(instruction).split(IMAGE_PAD)
        counts = [frames * rows * columns // self.shape.merge_size**2 for frames, rows, columns in grids]
        text = pieces[0] + "".join(IMAGE_PAD * count + piece for count, piece in zip(counts, pieces[1:], strict=True))
        ids: Any = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    @cached_property
    def image_pad(self) -> int:
        """The id of an image token."""
        return int(self._id(IMAGE_PAD))

    @cached_property
    def label_ids(self) -> list[int]:
        """The ids of the template's labels, in order."""
        readout = self.template.readout
        assert isinstance(readout, LabelReadout)
        return [int(self._id(label)) for label in readout.labels]

    @property
    def pictures(self) -> list[str]:
        """The template's placeholders of pictures, in order; one may come twice."""
        return [name for name in self.template.placeholders if name in PICTURES]

    @property
    def grid(self) -> int:
        """Tokens along a side of a picture of the embedded world."""
        return CANVAS // (self.shape.patch_size * self.shape.merge_size)

    def _id(self, token: str) -> Any:
        return self.tokenizer.convert_tokens_to_ids(token)


def judge_inputs(shape: TinyVLM, template: Template | None = None) -> JudgeInputs:
    """The inputs of a new judge: each word of the embedded world is a token of its tokenizer."""
    template = template or find_template(TEMPLATE)
    templates = [template, *(find_template(name) for name in OTHER_TEMPLATES)]
    texts = [text for asked in templates for text, _ in asked.parts]
    return JudgeInputs(tiny_tokenizer([*texts, *(f" {word}" for word in vocabulary()), *vocabulary()]), shape, template)


def load_judge(folder: Path) -> tuple[Qwen2_5_VLForConditionalGeneration, JudgeInputs]:
    """A judge that ``pdtr scenes-judge`` saved, and its inputs.

    Raises:
        ValueError: the folder holds none.
    """
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    try:
        found = json.loads((folder / PREPROCESSOR).read_text())
        sizes = {"min_pixels": found["size"]["shortest_edge"], "max_pixels": found["size"]["longest_edge"]}
        shape = TinyVLM(patch_size=found["patch_size"], merge_size=found["merge_size"], **sizes)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: expected a judge of the embedded world, got none ({error}); make one with: pdtr scenes-judge"
        ) from error
    return model, JudgeInputs(tokenizer, shape, find_template(TEMPLATE))


def picture_patches(picture: Images, shape: TinyVLM) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
    """A picture, uint8 [H, W, 3], as Qwen2-VL's patches float32 [N, 3 * 2 * p * p], and its grid (1, rows, columns).

    Raises:
        ValueError: its size is none that the processor leaves as it is.
    """
    p, m = shape.patch_size, shape.merge_size
    height, width = picture.shape[:2]
    if height % (p * m) or width % (p * m) or not shape.min_pixels <= height * width <= shape.max_pixels:
        raise ValueError(
            f"picture: expected sides that are multiples of {p * m} and {shape.min_pixels} to {shape.max_pixels} "
            f"pixels, got {height} x {width}; the embedded world's are {CANVAS} x {CANVAS}"
        )
    pixels = (picture.astype(np.float32) / np.float32(255) - np.float32(_MEAN)) / np.float32(_STD)
    rows, columns = height // p, width // p
    # Patches that become one token lie side by side: [row / m, column / m, m, m, channel, p, p].
    cut = pixels.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    # A still picture is two equal frames.
    frames = np.repeat(cut[..., None, :, :], _TEMPORAL_PATCH, axis=5)
    return np.ascontiguousarray(frames.reshape(rows * columns, -1), np.float32), (1, rows, columns)


def two_hot(totals: Tensor, num_digits: int = 6) -> Tensor:
    """The distribution over neighbouring digits whose expectation is ``(D - 1) total``.

    ``p_k = max(0, 1 - |(D - 1) total - k|)``, so that 0.5 of 0 to 5 is half a 2 and half a 3.

    Args:
        totals: [B], in [0, 1].
        num_digits: D.

    Returns:
        [B, D].
    """
    places = (num_digits - 1) * totals.clamp(0, 1)
    return (1 - (places[:, None] - torch.arange(num_digits)).abs()).clamp(min=0)


def digit_loss(logits: Tensor, totals: Tensor, label_ids: Sequence[int]) -> Tensor:
    """Mean cross-entropy of the first answer token [B, V] to :func:`two_hot` targets, over the whole vocabulary.

    Over the whole of it, so that the judge learns to answer in digits at all: its label mass.
    """
    said = logits.float().log_softmax(-1)[:, list(label_ids)]
    return -(two_hot(totals, len(label_ids)) * said).sum(-1).mean()


def digit_scores(logits: Tensor, label_ids: Sequence[int]) -> Tensor:
    """What ``VLMJudge`` reads off the first answer token: ``sum_k p_k k / (D - 1)`` over the digits, [B, V] -> [B]."""
    digits = torch.linspace(0, 1, len(label_ids))
    return logits.float()[:, list(label_ids)].softmax(-1) @ digits


def answer_logits(model: Qwen2_5_VLForConditionalGeneration, states: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Logits [B, V] of the token that follows each prompt."""
    last = batch["attention_mask"].sum(1) - 1
    logits: Tensor = model.lm_head(states[torch.arange(len(states)), last])
    return logits
