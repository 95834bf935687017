"""A tiny Qwen2.5-VL that reads the embedded world: the frozen language model of the tiny UniPic2-MetaQuery.

The published policy builds on a model that understands pictures and instructions before any of its training. This one
is given what that has by a short training: its vision tower learns what stands where, then the whole learns to answer,
in words, what the picture should show: the objects asked for, those of a picture, those that an edit leaves. The
objective is the next word, of prompts and answers alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.policies.query_reader import GENERATE, QueryReader, Reading, Tokens
from envs.scenes.edits import sample_edit
from envs.scenes.grammar import COUNT_WORDS, Split, sample_task
from envs.scenes.pretraining import vocabulary
from envs.scenes.render import render
from envs.scenes.world import CANVAS, Scene
from experiments.scenes_judge_model import JudgeInputs
from experiments.scenes_judge_reward import TEMPLATE
from experiments.scenes_judge_schedule import Rates, Schedule
from experiments.scenes_judge_training import train_vision
from experiments.served_rewards import find_template
from rewards.judges.tiny import TinyVLM, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

DESCRIBE = "describe the image"
PATCH_SIZE, MERGE_SIZE = 6, 2
TOKEN_SIDE = PATCH_SIZE * MERGE_SIZE
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
_NOT_A_TOKEN = -100
_SAY_EVERY = 100


@dataclass(frozen=True)
class Question:
    """Something to be answered in words; ``picture`` uint8 [H, W, 3], or None where there is none to look at."""

    text: str
    answer: str
    picture: NDArray[np.uint8] | None = None


def vlm_shape(width: int, num_layers: int, seed: int) -> TinyVLM:
    """The shape of the tiny model: a token for 12 x 12 pixels, sixteen a picture."""
    return TinyVLM(
        width=width,
        num_layers=num_layers,
        vision_layers=3,
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        min_pixels=TOKEN_SIDE**2,
        max_pixels=CANVAS**2,
        rope_theta=4.0,  # Cells of a grid of four by four are told apart by fast rotations only.
        initializer_range=width**-0.5,
        seed=seed,
    )


def vlm_tokenizer() -> PreTrainedTokenizerBase:
    """Each word of the world's prompts and answers is a token, with and without a space before it."""
    words = [*vocabulary(), *_ROWS, *_COLUMNS, *COUNT_WORDS.values(), "nothing", *DESCRIBE.split()]
    return tiny_tokenizer([GENERATE.replace("{}", "a"), *words, *(f" {word}" for word in words)])


def new_vlm(shape: TinyVLM) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerBase, Any]:
    """A random model, its tokenizer and its image processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = vlm_tokenizer()
    half = [0.5, 0.5, 0.5]
    build: Any = Qwen2VLImageProcessorPil
    pictures = build(
        patch_size=shape.patch_size,
        merge_size=shape.merge_size,
        min_pixels=shape.min_pixels,
        max_pixels=shape.max_pixels,
        image_mean=half,
        image_std=half,
    )
    return tiny_model(shape, tokenizer), tokenizer, pictures


def train_vlm(
    reader: QueryReader, shape: TinyVLM, steps: tuple[int, int], rates: Rates, say: Callable[[str], None]
) -> None:
    """Teach the model to see, then to answer; its weights change in place.

    Args:
        reader: of the model.
        shape: the model's.
        steps: of the vision tower alone, and of the whole.
        rates: of both.
        say: told of progress.
    """
    model = reader.lmm.train()
    train_vision(model, JudgeInputs(reader.tokenizer, shape, find_template(TEMPLATE)), rates, steps[0], say)
    rng, schedule = np.random.default_rng((rates.seed, 3)), Schedule([model], rates, steps[1])
    right: list[float] = []
    for step in range(steps[1]):
        questions = draw_questions(rng, rates.batch_size)
        losses = []
        for part in questions.values():
            loss, share = answer_loss(reader, part)
            losses.append(loss)
            right.append(share)
        schedule.step(step, torch.stack(losses).mean())
        if (step + 1) % _SAY_EVERY == 0:
            recent = np.array(right[-_SAY_EVERY * len(questions) :]).reshape(-1, len(questions)).mean(0)
            told = ", ".join(f"{name} {value:.3f}" for name, value in zip(questions, recent, strict=True))
            say(f"language, step {step + 1}: words of answers right: {told}, {schedule.seconds:.0f} s")
    model.eval()


def draw_questions(rng: np.random.Generator, count: int, split: Split = "train") -> dict[str, list[Question]]:
    """Questions without and with a picture, ``count`` in all: a third prompts, the rest edits and descriptions."""
    tasks = [sample_task(rng, split) for _ in range(count // 3)]
    edits = [sample_edit(rng, split) for _ in range(count - len(tasks))]
    sources = render([edit.source for edit in edits])
    prompts = [Question(GENERATE.replace("{}", task.text), asked_for(task.metadata["include"])) for task in tasks]
    seen = [
        Question(edit.text, told(edit.target), source) if index % 3 else Question(DESCRIBE, told(edit.source), source)
        for index, (edit, source) in enumerate(zip(edits, sources, strict=True))
    ]
    return {"prompts": prompts, "pictures": seen}


def asked_for(include: Sequence[Mapping[str, Any]]) -> str:
    """What a prompt asks for, in one wording for all that mean the same."""
    named = [
        " ".join(filter(None, (COUNT_WORDS.get(clause.get("count", 1), "a"), clause.get("color"), clause["class"])))
        for clause in include
    ]
    if len(include) == 2 and include[1].get("position"):
        return f"{named[1]} {include[1]['position'][0]} {named[0]}"
    return ", ".join(named)


def told(scene: Scene) -> str:
    """A scene's objects from the top, each with the ninth of the canvas that it stands in."""

    def place(value: float) -> int:
        return min(int(3 * value / CANVAS), 2)

    objects = sorted(scene, key=lambda thing: (place(thing.y), place(thing.x), thing.x))
    words = [f"{_ROWS[place(o.y)]} {_COLUMNS[place(o.x)]} {o.color} {o.shape}" for o in objects]
    return ", ".join(words) or "nothing"


def answer_loss(reader: QueryReader, questions: Sequence[Question]) -> tuple[Tensor, float]:
    """Cross-entropy of the next word over prompts and answers, and the share of the answers' words that are right.

    All questions have a picture, or none has.
    """
    ids, starts, batch = _sequences(reader, questions)
    model = reader.lmm.model
    positions = None
    if batch.grids is not None:
        positions = model.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=(ids == reader.image_id).int(),
            image_grid_thw=batch.grids,
            attention_mask=batch.mask,
        )[0]
    states = model.language_model(
        inputs_embeds=reader.embed(batch), attention_mask=batch.mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = reader.lmm.lm_head(states[:, :-1]).float()
    labels = ids.masked_fill((batch.mask == 0) | (ids == reader.image_id), _NOT_A_TOKEN)[:, 1:]
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=_NOT_A_TOKEN)
    is_answer = (torch.arange(1, ids.shape[1]) >= starts[:, None]) & (labels != _NOT_A_TOKEN)
    share = (logits.argmax(-1) == labels)[is_answer].float().mean()
    return loss, float(share)


def _sequences(reader: QueryReader, questions: Sequence[Question]) -> tuple[Tensor, Tensor, Tokens]:
    """Ids of prompts and answers [B, L], where each answer starts [B], and the batch to embed."""
    pictures = [question.picture for question in questions if question.picture is not None]
    # A source marks the text as an instruction, which is read as it is; a prompt here is wrapped already.
    grids, pixels = reader.patches(pictures) if pictures else (None, None)
    prompts = [
        reader.prompt_ids(question.text, None if grids is None else grids[index].tolist())
        for index, question in enumerate(questions)
    ]
    end = reader.tokenizer.eos_token_id
    answers = [
        [*reader.tokenizer(question.answer, add_special_tokens=False)["input_ids"], end] for question in questions
    ]
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    padding = reader.tokenizer.pad_token_id
    ids = torch.tensor([[*row, *[padding] * (int(lengths.max()) - len(row))] for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids, torch.tensor([len(prompt) for prompt in prompts]), Tokens(ids, mask, pixels, grids)


@torch.no_grad()
def held_out_answers(reader: QueryReader, count: int = 240) -> dict[str, float]:
    """The share of answers' words that are right on held-out questions, the words before each being given."""
    questions = draw_questions(np.random.default_rng(11), count, "held_out")
    return {name: answer_loss(reader, part)[1] for name, part in questions.items()}


def reading_of_scenes() -> Reading:
    """How the tiny policy reads: rows and columns as its language model was trained with."""
    return Reading(pixels_per_token=TOKEN_SIDE, positions="mrope")
