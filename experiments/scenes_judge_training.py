"""Training of the digit judge: its vision tower reads the world, then the whole learns to grade edits in digits.

A batch is rendered edits, whose every cell is known, and some of the policy's own. Grades alone, one number an edit,
teach a small model slowly to look; so it is also asked, at each token of the picture after, what stands there before
the edit, after it (both as the detector of the ground truth reads them, on the policy's pictures too), and as the
instruction would have it. The heads that answer are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from envs.scenes.render import render
from envs.scenes.world import COLORS, SHAPES, Scene, pick, place_all
from experiments.edit_reward_cells import CHOICES, MOMENTS, cell_loss, share_right
from experiments.edit_reward_reading import (
    UNKNOWN,
    RenderedEdit,
    detected_cells,
    drawn_cells,
    rendered_edits,
    scene_cells,
)
from experiments.scenes_judge_model import JudgeInputs, answer_logits, digit_loss, digit_scores, picture_patches
from experiments.scenes_judge_schedule import Rates, Schedule
from rewards.agreement import spearman

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from rewards.base import Images
    from rewards.edit_reward_data import ScoredEdit

Say = Callable[[str], None]
_SAY_EVERY = 50
_SCORED_AT_ONCE = 128


@dataclass(frozen=True)
class Point:
    """A point of the learning curve.

    Attributes:
        step: optimiser steps so far.
        seconds: since the training began.
        loss: mean cross-entropy since the last point.
        spearman: with the ground truth, on held-out edits of the policy.
        asked: of the cells that an instruction fills or changes, the share that is read as it would have them.
    """

    step: int
    seconds: float
    loss: float
    spearman: float
    asked: float


def train_vision(
    model: Qwen2_5_VLForConditionalGeneration,
    inputs: JudgeInputs,
    rates: Rates,
    num_steps: int,
    say: Say,
    edits: Sequence[ScoredEdit] = (),
) -> None:
    """Teach the vision tower colour and shape at each token, on random scenes and on as many of a policy's edits.

    The detector reads those: what a half-formed shape counts for, no rendered one tells. Without edits all are scenes.
    """
    visual, rng, grid = model.model.visual, np.random.default_rng((rates.seed, 1)), inputs.grid
    head = nn.Linear(_width(model), sum(CHOICES))
    schedule = Schedule([visual, head], rates, num_steps)
    order = _endless(len(edits), rng)
    num_drawn = rates.batch_size if edits else 0
    right: list[float] = []
    for step in range(num_steps):
        scenes = [_random_scene(rng) for _ in range(2 * rates.batch_size - num_drawn)]
        drawn = [edits[next(order)].image for _ in range(num_drawn)]
        pictures = np.stack([*render(scenes), *drawn])
        cut = [picture_patches(picture, inputs.shape) for picture in pictures]
        patches = torch.from_numpy(np.concatenate([patches for patches, _ in cut]))
        states = visual(patches, torch.tensor([grid for _, grid in cut])).pooler_output
        known = np.stack([scene_cells(scene, grid) for scene in scenes])
        labels = torch.from_numpy(np.concatenate([known, detected_cells(pictures[len(scenes) :], grid)]))  # [B, 2, G G]
        answers = head(states).view(len(labels), grid * grid, -1)
        schedule.step(step, cell_loss(answers, labels))
        right.append(share_right(answers.detach(), labels))
        if (step + 1) % _SAY_EVERY == 0:
            say(
                f"vision, step {step + 1}: read rightly {np.nanmean(right[-_SAY_EVERY:]):.3f}, {schedule.seconds:.0f} s"
            )


def train_digits(
    model: Qwen2_5_VLForConditionalGeneration,
    inputs: JudgeInputs,
    edits: tuple[Sequence[ScoredEdit], Sequence[ScoredEdit]],
    rates: Rates,
    num_steps: int,
) -> Iterator[Point]:
    """Teach the language model to grade; the vision tower stays as it is. Yields a point every fifty steps.

    Args:
        model: from :func:`experiments.scenes_judge.new_judge`, or a judge to train on.
        inputs: what it reads.
        edits: the policy's, to train on and to measure on.
        rates: see :class:`Rates`.
        num_steps: optimiser steps.
    """
    train, held_out = edits
    rng = np.random.default_rng((rates.seed, 2))
    heads = CellHeads(_width(model))
    model.model.visual.requires_grad_(False)
    schedule = Schedule([model, heads], rates, num_steps)
    order = _endless(len(train), rng)
    losses, reads = list[float](), list[float]()
    for step in range(num_steps):
        rendered = rendered_edits(rng, rates.num_rendered, inputs.grid)
        drawn = [train[next(order)] for _ in range(rates.batch_size - rates.num_rendered)]
        loss, asked = _loss(model, heads, inputs, rendered, drawn)
        schedule.step(step, sum(loss, start=torch.zeros(())))
        losses.append(float(loss[0].detach()))
        reads.append(asked)
        if (step + 1) % _SAY_EVERY == 0 or step + 1 == num_steps:
            said = score_edits(model, inputs, held_out)
            rank = spearman(said, [edit.scores["total"] for edit in held_out])
            recent = slice(-_SAY_EVERY, None)
            yield Point(
                step + 1, schedule.seconds, float(np.mean(losses[recent])), rank, float(np.nanmean(reads[recent]))
            )


def score_edits(
    model: Qwen2_5_VLForConditionalGeneration, inputs: JudgeInputs, edits: Sequence[ScoredEdit]
) -> NDArray[np.float32]:
    """What the judge says of edits, read as ``VLMJudge`` does: [B], in [0, 1]."""
    said = []
    with torch.no_grad():
        for start in range(0, len(edits), _SCORED_AT_ONCE):
            part = edits[start : start + _SCORED_AT_ONCE]
            batch = edits_batch(inputs, part)
            states = model.model(**batch, use_cache=False).last_hidden_state
            said.append(digit_scores(answer_logits(model, states, batch), inputs.label_ids).numpy())
    return np.concatenate(said).astype(np.float32)


class CellHeads(nn.Module):
    """What stands at each token: answers to every question, read off the states before the last layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cells = nn.Linear(width, len(MOMENTS) * sum(CHOICES))
        self.match = nn.Linear(width, 2)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, N, W] -> answers [B, N, choices] and whether the cell is as asked [B, N, 2]."""
        normed = self.norm(states)
        return self.cells(normed), self.match(normed)


def _loss(
    model: Qwen2_5_VLForConditionalGeneration,
    heads: CellHeads,
    inputs: JudgeInputs,
    rendered: Sequence[RenderedEdit],
    drawn: Sequence[ScoredEdit],
) -> tuple[list[Tensor], float]:
    """Digits' and cells' losses, and the share of the changed cells that is read as asked."""
    edits: list[RenderedEdit | ScoredEdit] = [*rendered, *drawn]
    batch = edits_batch(inputs, edits)
    output = model.model(**batch, use_cache=False, output_hidden_states=True)
    totals = torch.tensor([edit.scores["total"] for edit in edits])
    logits = answer_logits(model, output.last_hidden_state, batch)
    # The last layer only gathers what the cells know, so they have to know it before.
    is_picture = batch["mm_token_type_ids"] == 1
    after = output.hidden_states[-2][is_picture].view(len(edits), 2, inputs.grid**2, -1)[:, 1]
    answers, match = heads(after)
    cells = [edit.cells for edit in rendered]
    labels = torch.from_numpy(np.concatenate([cells, drawn_cells(drawn, inputs.grid)]))  # [B, 3, 2, G * G]
    is_asked = (labels[:, 1] == labels[:, 2]).all(1).long()
    is_known = ((labels[:, 1] != UNKNOWN) & (labels[:, 2] != UNKNOWN)).all(1)
    matches = torch.where(is_known, is_asked, UNKNOWN)
    changed = _changed_only(labels).flatten(1, 2)
    losses = [
        digit_loss(logits, totals, inputs.label_ids),
        cell_loss(answers, labels.flatten(1, 2)),
        cell_loss(answers, changed),
        nn.functional.cross_entropy(match.transpose(1, 2), matches, ignore_index=UNKNOWN),
    ]
    return losses, share_right(answers.detach(), changed, len(MOMENTS) - 1)


def _changed_only(labels: Tensor) -> Tensor:
    """Labels [B, 3, 2, N] of the cells that the instruction changes, as it would have them; the others are unknown.

    Fifteen cells of sixteen stay as they are, so without a term of their own a model that passes over the instruction
    is right nearly everywhere, and for long learns no more.
    """
    before, asked = labels[:, 0], labels[:, 2]
    changes = (before != asked).any(1, keepdim=True) & (before != UNKNOWN) & (asked != UNKNOWN)
    kept = torch.full_like(labels, UNKNOWN)
    kept[:, 2] = torch.where(changes, asked, UNKNOWN)
    return kept


def _width(model: Qwen2_5_VLForConditionalGeneration) -> int:
    text: Any = model.config.text_config
    return int(text.hidden_size)


def edits_batch(inputs: JudgeInputs, edits: Sequence[RenderedEdit | ScoredEdit]) -> dict[str, Tensor]:
    """The judge's inputs of edits."""
    sources: list[Images] = [edit.source for edit in edits]
    return inputs([edit.instruction for edit in edits], sources, [edit.image for edit in edits])


def _random_scene(rng: np.random.Generator) -> Scene:
    """One to four objects of any kinds: there is seldom room for more."""
    return place_all(rng, [(pick(rng, list(COLORS)), pick(rng, SHAPES)) for _ in range(rng.integers(1, 5))])


def _endless(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Indices below ``count``, in a new order each time around."""
    while True:
        yield from map(int, rng.permutation(count))
