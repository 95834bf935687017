"""The judge's other readouts: answers by hand, prompts as transformers' processor has them, and a training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.edit_reward_reading import rendered_edits, rendered_pairs
from experiments.scenes_judge_heads import new_judge
from experiments.scenes_judge_model import OTHER_TEMPLATES, JudgeInputs, judge_inputs
from experiments.scenes_judge_readouts import preference, rubric_answer, train_readouts
from experiments.scenes_judge_schedule import Rates
from experiments.served_rewards import find_template
from rewards.edit_reward_data import ScoredEdit
from rewards.judges.rubrics import RubricReadout, read_rubric
from rewards.judges.tiny import IMAGE_PAD, TinyVLM, save_tiny_vlm

SHAPE = TinyVLM(width=64, num_layers=2, vision_width=32, vision_layers=1, patch_size=6, min_pixels=144, rope_theta=1.5)


@pytest.fixture(scope="module")
def inputs() -> JudgeInputs:
    return judge_inputs(SHAPE)


def edits(count: int) -> list[ScoredEdit]:
    found = rendered_edits(np.random.default_rng(0), count, 4)
    return [ScoredEdit(str(i), str(i), e.instruction, e.source, e.image, e.scores) for i, e in enumerate(found)]


def asked_by(inputs: JudgeInputs, name: str) -> JudgeInputs:
    return JudgeInputs(inputs.tokenizer, inputs.shape, find_template(name))


def test_the_rubric_is_filled_in_to_the_nearest_grade_and_read_back() -> None:
    readout = find_template("scenes_rubric.v1").readout
    assert isinstance(readout, RubricReadout)
    said = rubric_answer({"success": 0.5, "preservation": 0.29, "total": 0.145}, readout)
    assert said == '{"reasoning":"","success":3,"preservation":1}'
    reading = read_rubric({"choices": [{"message": {"content": said}}]}, readout)
    assert (reading.components, reading.value) == ({"success": 3, "preservation": 1}, pytest.approx((0.6 * 0.2) ** 0.5))


@pytest.mark.parametrize("name", OTHER_TEMPLATES)
def test_the_prompts_are_those_of_the_processor(inputs: JudgeInputs, tmp_path: Path, name: str) -> None:
    from transformers import AutoProcessor

    save_tiny_vlm(tmp_path, SHAPE, inputs.tokenizer)
    processor: Any = AutoProcessor.from_pretrained(str(tmp_path))
    asked, (one,) = asked_by(inputs, name), edits(1)
    shown = {"source": one.source, "image": one.image, "first": one.image, "second": one.source}
    pictures = [shown[name] for name in asked.pictures]
    ours = asked.batch([one.instruction], [pictures])
    theirs = processor(text=[asked.text(one.instruction)], images=pictures, return_tensors="pt")
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], atol=1e-5)
    # The turn that is learnt goes on where the question ends.
    answered = asked.batch([one.instruction], [pictures], ["yes"])
    assert answered["input_ids"][0].tolist() == [*ours["input_ids"][0].tolist(), *asked.answer("yes")]


def test_the_better_of_two_is_sure_from_a_tenth_of_the_scale_on() -> None:
    first, second = torch.tensor([0.5, 0.5, 0.5, 0.9, 0.1]), torch.tensor([0.5, 0.45, 0.54, 0.2, 0.2])
    assert torch.allclose(preference(first, second), torch.tensor([0.5, 0.75, 0.3, 1.0, 0.0]), atol=1e-6)
    assert torch.allclose(preference(first, second) + preference(second, first), torch.ones(5))


def test_a_pair_is_two_candidates_of_one_task() -> None:
    pairs = rendered_pairs(np.random.default_rng(3), 20, 4)
    assert 15 <= len(pairs) <= 20
    for first, second in pairs:
        assert first.instruction == second.instruction
        assert np.array_equal(first.source, second.source)
    assert sum(not np.array_equal(first.image, second.image) for first, second in pairs) > 15


def test_a_pair_asks_of_each_edit_behind_its_own_source(inputs: JudgeInputs) -> None:
    """What makes it learnable: each edit stands to its source as in the digits' question."""
    asked = asked_by(inputs, "scenes_better.v1")
    assert asked.pictures == ["source", "first", "source", "second"]
    digits, pair = inputs.text("move the red circle"), asked.text("move the red circle")
    question = digits[digits.index("Instruction") : digits.rindex(IMAGE_PAD)]
    assert pair.count(question) == 2


def test_every_readout_is_learnt_and_the_vision_tower_stays(inputs: JudgeInputs) -> None:
    model, said, some = new_judge(inputs), list[str](), edits(16)
    before = {name: tensor.clone() for name, tensor in model.model.visual.state_dict().items()}
    train_readouts(model, inputs, some, Rates(4e-3, 1e-3, 16, rendered_share=0.25), 100, said.append)
    first, last = (dict(re.findall(r"(\w+) (\d+\.\d+)", line)) for line in said)
    kinds = ("digits", "yes_no", "rubric", "pairwise")
    assert set(first) >= set(kinds)
    assert all(float(last[kind]) < 0.8 * float(first[kind]) for kind in kinds)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.model.visual.state_dict().items())
