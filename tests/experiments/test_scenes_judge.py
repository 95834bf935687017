"""The digit judge: targets by hand, the prompt as transformers' processor has it, and a training at its smallest."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.benchmarks.tables import read_csv
from experiments.cli import main
from experiments.edit_reward_reading import rendered_edits
from experiments.scenes_judge import CURVE, ScenesJudgeConfig, make_judge
from experiments.scenes_judge_heads import look_across, new_judge
from experiments.scenes_judge_model import (
    JudgeInputs,
    answer_logits,
    digit_loss,
    digit_scores,
    judge_inputs,
    load_judge,
    picture_patches,
    two_hot,
)
from experiments.scenes_judge_reward import TEMPLATE
from experiments.scenes_judge_schedule import Rates, Schedule
from experiments.scenes_judge_training import Point, score_edits
from experiments.served_rewards import find_template
from rewards.edit_reward_data import ScoredEdit, read_edits, shard_path, write_shard
from rewards.judges.tiny import TinyVLM, save_tiny_vlm, tiny_model

SHAPE = TinyVLM(width=64, num_layers=2, vision_width=32, vision_layers=1, patch_size=6, min_pixels=144, rope_theta=1.5)
CONFIG = ScenesJudgeConfig(width=32, num_layers=1, vision_width=32, vision_layers=1, num_measured=4, batch_size=4)


@pytest.fixture(scope="module")
def inputs() -> JudgeInputs:
    return judge_inputs(SHAPE)


def edits(count: int, seed: int = 0) -> list[ScoredEdit]:
    found = rendered_edits(np.random.default_rng(seed), count, 4)
    return [ScoredEdit(str(i), str(i // 2), e.instruction, e.source, e.image, e.scores) for i, e in enumerate(found)]


def test_two_hot_by_hand() -> None:
    expected = [[1, 0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 0.25, 0.75], [0, 0, 0, 0, 0, 1]]
    assert torch.allclose(two_hot(torch.tensor([0.0, 0.3, 0.95, 1.0])), torch.tensor(expected), atol=1e-6)


def test_the_target_has_the_truth_as_its_expectation() -> None:
    totals = torch.linspace(0, 1, 23)
    targets = two_hot(totals)
    assert torch.allclose(targets.sum(-1), torch.ones(23))
    # Logits that are the target's logarithms are read as the truth.
    assert torch.allclose(digit_scores(targets.log(), range(6)), totals, atol=1e-6)


def test_the_loss_is_over_the_whole_vocabulary() -> None:
    loss = digit_loss(torch.zeros(3, 10), torch.tensor([0.0, 0.5, 1.0]), [2, 3, 4, 5, 6, 7])
    assert loss.item() == pytest.approx(math.log(10))


def test_the_template_grades_in_digits() -> None:
    template = find_template(TEMPLATE)
    assert template.name == "scenes_edit.v1"
    assert template.readout.kind == "digits"
    assert template.placeholders == ("prompt", "source", "image")


def test_the_prompt_is_that_of_the_processor(inputs: JudgeInputs, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    save_tiny_vlm(tmp_path, SHAPE, inputs.tokenizer)
    processor: Any = AutoProcessor.from_pretrained(str(tmp_path))
    (edit,) = edits(1)
    ours = inputs([edit.instruction], [edit.source], [edit.image])
    text = inputs.text(edit.instruction)
    theirs = processor(text=[text], images=[edit.source, edit.image], return_tensors="pt")
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert ours["image_grid_thw"].tolist() == theirs["image_grid_thw"].tolist()
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], atol=1e-5)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert f"Instruction: {edit.instruction}\nBefore: <|vision_start|>" in text


def test_labels_are_single_tokens_and_words_are_known(inputs: JudgeInputs) -> None:
    assert inputs.tokenizer.convert_ids_to_tokens(inputs.label_ids) == list("012345")
    assert len(inputs.tokenizer(" purple")["input_ids"]) == 1


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 12 .* got 50 x 48"):
        picture_patches(np.zeros((50, 48, 3), np.uint8), SHAPE)


def test_a_new_judge_looks_at_the_same_place_of_the_other_picture(inputs: JudgeInputs) -> None:
    model = tiny_model(replace(SHAPE, initializer_range=0.1), inputs.tokenizer)
    look_across(model, inputs)
    model.set_attn_implementation("eager")
    (edit,) = edits(1)
    batch = inputs([edit.instruction], [edit.source], [edit.image])
    with torch.no_grad():
        seen = model.model(**batch, use_cache=False, output_attentions=True).attentions[0][0]
    places = torch.where(batch["mm_token_type_ids"][0] == 1)[0]
    assert seen[0, places[16:], places[:16]].min() > 0.5
    # The second head reads the word before, wherever there are words alone.
    assert torch.diagonal(seen[1], -1)[: places[0] - 1].min() > 0.5


def test_one_step_lowers_the_loss(inputs: JudgeInputs) -> None:
    model = new_judge(inputs)
    some = edits(6)
    batch = inputs([e.instruction for e in some], [e.source for e in some], [e.image for e in some])
    totals = torch.tensor([e.scores["total"] for e in some])

    def loss() -> torch.Tensor:
        states = model.model(**batch, use_cache=False).last_hidden_state
        return digit_loss(answer_logits(model, states, batch), totals, inputs.label_ids)

    before = loss()
    # The first step of a warm-up is a fiftieth of the rate.
    Schedule([model], Rates(learning_rate=0.1, other_learning_rate=0.05), 10).step(0, before)
    assert loss().item() < before.item()


def test_a_training_from_data_to_checkpoint_and_on(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_shard(shard_path(data, "train", 0), edits(6))
    write_shard(shard_path(data, "validation", 0), edits(6, seed=1))
    said: list[str] = []
    config = replace(CONFIG, output_dir=tmp_path / "judge", data=data, vision_steps=1, num_steps=2, readout_steps=2)
    folder = make_judge(config, said.append)
    assert "step 2: loss" in said[-2]
    assert said[-1].startswith("readouts, step 2: losses digits ")
    (point,) = read_csv(folder / CURVE, Point)
    assert point.step == 2
    model, inputs = load_judge(folder)
    held_out = list(read_edits(data, "validation"))
    scores = score_edits(model, inputs, held_out)
    assert ((scores > 0) & (scores < 1)).all()
    more = replace(config, start=folder, output_dir=tmp_path / "more", num_steps=0, readout_steps=1, vision_steps=0)
    again = make_judge(more, said.append)
    assert not np.array_equal(score_edits(*load_judge(again), held_out), scores)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "pdtr edit-reward data"),
        (["--width", "33"], "multiples of 32"),
        (["--num-steps", "0"], "num_steps, readout_steps: expected 0 or more each, and 1 or more together"),
        (["--readout-steps", "-1"], "num_steps, readout_steps: expected 0 or more each"),
        (["--learning-rate", "0"], "above 0"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["scenes-judge", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_start_that_is_no_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pdtr scenes-judge"):
        load_judge(tmp_path)
