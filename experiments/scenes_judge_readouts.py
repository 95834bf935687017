"""The judge's other readouts: yes or no, a rubric in JSON, and the better of two, learnt on top of its digits.

Each has a template of its own. Yes or no and the rubric have a first line that says how to answer, and then the
question of the digits; the better of two is that question twice, once for each edit. A batch asks in all these ways, so
that none is forgotten. The words of the answers are learnt first and alone, by the last layer: a model that is to say
what it has never said would else unlearn to see. As in the digits' training the vision tower stays as it is.

That a pair repeats instruction and source is what makes it learnable here: where both edits follow one source the
second one is at another distance from it, and a judge of this size did not learn to compare them (LOG.md, 2026-11-28).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from envs.scenes.world import pick
from experiments.edit_reward_reading import RenderedEdit, rendered_edits, rendered_pairs
from experiments.scenes_judge_model import (
    OTHER_TEMPLATES,
    JudgeInputs,
    answer_logits,
    digit_loss,
)
from experiments.scenes_judge_schedule import Rates, Schedule
from experiments.scenes_judge_training import edits_batch
from experiments.served_rewards import find_template
from rewards.judges.rubrics import RubricReadout

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from rewards.edit_reward_data import ScoredEdit

Pair: TypeAlias = "tuple[RenderedEdit, RenderedEdit] | tuple[ScoredEdit, ScoredEdit]"
_SAY_EVERY = 50
# Of the steps: those in which only the last layer learns.
_WORDS_SHARE = 0.15
# Their peak rate: a digit judge gives other words log-probabilities of -20.
_WORDS_RATE = 3e-3


def train_readouts(
    model: Qwen2_5_VLForConditionalGeneration,
    inputs: JudgeInputs,
    edits: Sequence[ScoredEdit],
    rates: Rates,
    num_steps: int,
    say: Callable[[str], None],
) -> None:
    """Teach a digit judge to answer in the other forms too, and keep its digits.

    Args:
        model: that answers in digits.
        inputs: of the digits' template.
        edits: the policy's.
        rates: their peaks are of a training on: lower than those of the digits.
        num_steps: optimiser steps; each asks about a third of a batch in each form, and of half a batch of pairs.
        say: told the losses.
    """
    rng = np.random.default_rng((rates.seed, 3))
    groups = _groups(edits)
    model.model.requires_grad_(False)
    num_words = round(_WORDS_SHARE * num_steps)
    schedule = Schedule([model], replace(rates, other_learning_rate=_WORDS_RATE), max(1, num_words))
    others = [JudgeInputs(inputs.tokenizer, inputs.shape, find_template(name)) for name in OTHER_TEMPLATES]
    by_kind = {asked.template.readout.kind: asked for asked in (inputs, *others)}
    losses: list[dict[str, float]] = []
    for step in range(num_steps):
        if step == num_words:
            model.model.language_model.requires_grad_(True)
            schedule = Schedule([model], rates, num_steps - num_words)
        found = {
            kind: _LOSSES[kind](model, asked, _mixed(rng, edits, rates, inputs.grid))
            for kind, asked in by_kind.items()
            if kind in _LOSSES
        }
        found["pairwise"] = _pairwise(model, by_kind["pairwise"], _pairs(rng, groups, rates, inputs.grid))
        schedule.step(step if step < num_words else step - num_words, sum(found.values(), start=torch.zeros(())))
        losses.append({kind: float(loss.detach()) for kind, loss in found.items()})
        if (step + 1) % _SAY_EVERY == 0 or step + 1 == num_steps:
            recent = losses[-_SAY_EVERY:]
            means = {kind: float(np.mean([entry[kind] for entry in recent])) for kind in found}
            told = ", ".join(f"{kind} {mean:.3f}" for kind, mean in means.items())
            say(f"readouts, step {step + 1}: losses {told}, {schedule.seconds:.0f} s")


def rubric_answer(scores: Mapping[str, float], readout: RubricReadout) -> str:
    """The rubric as it should be filled in: each dimension's truth in [0, 1], on its scale, to the nearest.

    Without spaces: ``pdtr judge serve`` has vLLM's grammar allow none.
    """
    grades = {d.name: d.low + math.floor(scores[d.name] * (d.high - d.low) + 0.5) for d in readout.dimensions}
    return json.dumps({"reasoning": "", **grades}, separators=(",", ":"))


def _digits(
    model: Qwen2_5_VLForConditionalGeneration, inputs: JudgeInputs, edits: Sequence[RenderedEdit | ScoredEdit]
) -> Tensor:
    return digit_loss(_first_token(model, inputs, edits), _totals(edits), inputs.label_ids)


def _yes_no(
    model: Qwen2_5_VLForConditionalGeneration, inputs: JudgeInputs, edits: Sequence[RenderedEdit | ScoredEdit]
) -> Tensor:
    """Cross-entropy to the first label with the probability that is the truth, over the whole vocabulary."""
    said = _first_token(model, inputs, edits).float().log_softmax(-1)[:, inputs.label_ids]
    truths = _totals(edits)
    return -(truths * said[:, 0] + (1 - truths) * said[:, 1]).mean()


def _rubric(
    model: Qwen2_5_VLForConditionalGeneration, inputs: JudgeInputs, edits: Sequence[RenderedEdit | ScoredEdit]
) -> Tensor:
    """Cross-entropy of every token of the filled-in rubric, summed: nearly all of it is of the grades."""
    readout = inputs.template.readout
    assert isinstance(readout, RubricReadout)
    answers = [rubric_answer(edit.scores, readout) for edit in edits]
    pictures = [(edit.source, edit.image) for edit in edits]
    batch = inputs.batch([edit.instruction for edit in edits], pictures, answers)
    lengths = torch.tensor([len(inputs.answer(answer)) for answer in answers])
    states = model.model(**batch, use_cache=False).last_hidden_state
    ends = batch["attention_mask"].sum(1)
    # Of each row the states before its answer's tokens: they are to say them.
    rows = torch.arange(len(edits)).repeat_interleave(lengths)
    places = torch.cat([torch.arange(int(end - count), int(end)) for end, count in zip(ends, lengths, strict=True)])
    logits = model.lm_head(states[rows, places - 1])
    return nn.functional.cross_entropy(logits, batch["input_ids"][rows, places], reduction="sum") / len(edits)


def _pairwise(model: Qwen2_5_VLForConditionalGeneration, inputs: JudgeInputs, pairs: Sequence[Pair]) -> Tensor:
    """Cross-entropy to the first label with :func:`preference`, over the whole vocabulary."""
    pictures = [
        [{"source": first.source, "first": first.image, "second": second.image}[name] for name in inputs.pictures]
        for first, second in pairs
    ]
    batch = inputs.batch([first.instruction for first, _ in pairs], pictures)
    states = model.model(**batch, use_cache=False).last_hidden_state
    said = answer_logits(model, states, batch).float().log_softmax(-1)[:, inputs.label_ids]
    preferred = preference(*(_totals(side) for side in zip(*pairs, strict=True)))
    return -(preferred * said[:, 0] + (1 - preferred) * said[:, 1]).mean()


def preference(first: Tensor, second: Tensor) -> Tensor:
    """How sure it is that the first of two grades is the better one: 0.5 for equals, 1 from a tenth of the scale on."""
    return (0.5 + 5 * (first - second)).clamp(0, 1)


_LOSSES = {"digits": _digits, "yes_no": _yes_no, "rubric": _rubric}


def _first_token(
    model: Qwen2_5_VLForConditionalGeneration, inputs: JudgeInputs, edits: Sequence[RenderedEdit | ScoredEdit]
) -> Tensor:
    batch = edits_batch(inputs, edits)
    return answer_logits(model, model.model(**batch, use_cache=False).last_hidden_state, batch)


def _mixed(
    rng: np.random.Generator, edits: Sequence[ScoredEdit], rates: Rates, grid: int
) -> list[RenderedEdit | ScoredEdit]:
    """A third of a batch: rendered edits, and at least one of the policy's."""
    count = max(2, rates.batch_size // 3)
    num_rendered = min(round(rates.rendered_share * count), count - 1)
    chosen = rng.choice(len(edits), count - num_rendered)
    return [*rendered_edits(rng, num_rendered, grid), *(edits[int(index)] for index in chosen)]


def _pairs(rng: np.random.Generator, groups: Sequence[Sequence[ScoredEdit]], rates: Rates, grid: int) -> list[Pair]:
    """Half a batch of pairs: rendered ones, and at least one of the policy's, if it has any; in a random order each."""
    count = max(2, rates.batch_size // 2)
    num_rendered = min(round(rates.rendered_share * count), count - 1) if groups else count
    pairs: list[Pair] = list(rendered_pairs(rng, num_rendered, grid))
    for index in rng.integers(len(groups), size=count - num_rendered) if groups else ():
        group = groups[int(index)]
        first = pick(rng, group)
        other = pick(rng, [edit for edit in group if edit.scores["total"] != first.scores["total"]])
        pairs.append((first, other))
    return pairs


def _groups(edits: Sequence[ScoredEdit]) -> list[list[ScoredEdit]]:
    """The edits of each prompt that has different ones: others have no better."""
    by_prompt: dict[str, list[ScoredEdit]] = {}
    for edit in edits:
        by_prompt.setdefault(edit.prompt_id, []).append(edit)
    return [group for group in by_prompt.values() if np.ptp([edit.scores["total"] for edit in group]) > 0]


def _totals(edits: Sequence[RenderedEdit | ScoredEdit]) -> Tensor:
    return torch.tensor([edit.scores["total"] for edit in edits])
