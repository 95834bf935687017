"""Pre-training of the tiny model: the vision tower learns what stands where, then the whole learns to judge.

Scores alone, one number an edit, teach a small model slowly to look. So it is also asked, at each token of a picture,
for the colour and shape that stand there before the edit, after it, and as the instruction would have it. The heads
that answer are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from envs.scenes.render import render
from experiments.edit_reward_cells import CHOICES, MOMENTS, cell_loss, share_right
from experiments.edit_reward_reading import (
    DIMENSIONS,
    RenderedEdit,
    rendered_edits,
    scene_cells,
    scene_pairs,
)
from experiments.scenes_judge_schedule import Rates, Schedule
from rewards.agreement import spearman
from rewards.edit_reward_inputs import image_patches
from rewards.edit_reward_model import make_head

if TYPE_CHECKING:
    from experiments.edit_reward_base import TinyConfig
    from rewards.edit_reward_inputs import EditInputs
    from rewards.edit_reward_model import EditRewardModel

_DECAY_SHARE = 0.4
_SAY_EVERY = 50
# The squared error of scores in [0, 1] is small beside a cross-entropy.
_SCORE_WEIGHT = 5.0
Say = Callable[[str], None]


def train_vision(model: EditRewardModel, inputs: EditInputs, config: TinyConfig, say: Say) -> None:
    """Teach the vision tower the colours and shapes of both frames at each token, on scenes of any kind."""
    visual, rng = model.model.visual, np.random.default_rng((config.seed, 1))
    head = nn.Linear(config.width, 2 * sum(CHOICES))
    schedule, grid = _schedule([visual, head], config, config.vision_steps), grid_side(inputs)
    right: list[float] = []
    for step in range(config.vision_steps):
        pairs = scene_pairs(rng, config.batch_size)
        frames = zip(render([before for before, _ in pairs]), render([after for _, after in pairs]), strict=True)
        cut = [image_patches(pair, inputs.settings) for pair in frames]
        pixels = torch.from_numpy(np.concatenate([patches for patches, _ in cut]))
        states = visual(pixels, torch.tensor([shape for _, shape in cut])).pooler_output
        labels = np.stack([np.concatenate([scene_cells(scene, grid) for scene in pair]) for pair in pairs])
        answers, known = (
            head(states).view(len(pairs), grid * grid, -1),
            torch.from_numpy(labels),
        )  # labels [B, 4, G * G]
        schedule.step(step, cell_loss(answers, known))
        right.append(float(np.mean([share_right(answers.detach(), known, moment) for moment in (0, 1)])))
        if (step + 1) % _SAY_EVERY == 0:
            say(f"vision, step {step + 1}: read rightly {np.mean(right[-_SAY_EVERY:]):.3f}, {schedule.seconds:.0f} s")


def train_edits(model: EditRewardModel, inputs: EditInputs, config: TinyConfig, say: Say) -> None:
    """Teach the whole model scores and cells on rendered edits."""
    rng, half = np.random.default_rng((config.seed, 2)), config.batch_size // 2
    heads = nn.Linear(config.width, len(MOMENTS) * sum(CHOICES))
    # Not Muon, whose steps are of one size however little there is to learn: with it the last token's state, the same
    # in every edit, grew until attention saturated, in the one run that was looked at. Whether that is why is unknown.
    schedule = _schedule([model, heads], config, config.num_steps, with_muon=False)
    grid, said, reads = grid_side(inputs), list[tuple[float, float]](), list[list[float]]()
    # Half of a step's edits are those that the step before saw first: drawing them costs as much as a third of a step.
    seen = rendered_edits(rng, half, grid) if config.num_steps else []
    if seen:
        make_head(model, [float(np.mean([edit.scores[name] for edit in seen])) for name in DIMENSIONS])
    for step in range(config.num_steps):
        edits = [*rendered_edits(rng, half, grid), *seen]
        seen = edits[:half]
        rewards, answers = answered(model, heads, inputs, edits)
        scores = torch.tensor([[edit.scores[name] for name in DIMENSIONS] for edit in edits])
        labels = torch.from_numpy(np.stack([edit.cells for edit in edits]))
        known = labels.flatten(1, 2)  # [B, 6, G * G]
        schedule.step(step, _SCORE_WEIGHT * (rewards - scores).square().mean() + cell_loss(answers, known))
        said += zip(rewards[:half, -1].tolist(), scores[:half, -1].tolist(), strict=True)
        reads.append([share_right(answers.detach(), known, moment) for moment in range(len(MOMENTS))])
        if (step + 1) % _SAY_EVERY == 0:
            recent = np.array(said[-_SAY_EVERY * half :])
            read = ", ".join(f"{m} {v:.2f}" for m, v in zip(MOMENTS, np.mean(reads[-_SAY_EVERY:], 0), strict=True))
            rank, error = spearman(recent[:, 0], recent[:, 1]), np.mean((recent[:, 0] - recent[:, 1]) ** 2)
            say(
                f"edits, step {step + 1}: Spearman {rank:.3f}, squared error {error:.4f}, {read}, "
                f"{schedule.seconds:.0f} s"
            )


def grid_side(inputs: EditInputs) -> int:
    """Tokens along a side of a picture of the embedded world."""
    settings = inputs.settings
    return 48 // (settings.patch_size * settings.merge_size)


def answered(
    model: EditRewardModel, heads: nn.Module, inputs: EditInputs, edits: Sequence[RenderedEdit]
) -> tuple[Tensor, Tensor]:
    """Rewards [B, D] and answers at the tokens of the pictures [B, G * G, choices]."""
    batch = inputs([e.instruction for e in edits], [e.source for e in edits], [e.image for e in edits])
    states = model.model(**batch, use_cache=False).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    rewards = model.score(states[torch.arange(len(edits)), last])
    pictures = states[batch["mm_token_type_ids"] == 1].view(len(edits), -1, states.shape[-1])
    return rewards, heads(pictures)


def _schedule(modules: Sequence[nn.Module], config: TinyConfig, num_steps: int, with_muon: bool = True) -> Schedule:
    rates = Rates(config.learning_rate, config.other_learning_rate, config.batch_size, config.seed, _DECAY_SHARE)
    return Schedule(modules, rates, num_steps, with_muon)
