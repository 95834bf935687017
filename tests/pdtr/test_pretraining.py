"""Joint pre-training: it learns, and a resumed run repeats the one that was never stopped, to the bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.policies.scenes import ScenesPolicy
from pdtr.pretraining import PretrainConfig, held_out_losses, learning_rate_scale, make_policy, pretrain

SMALL = PretrainConfig(
    num_steps=6,
    t2i_batch_size=4,
    edit_batch_size=4,
    warmup_steps=2,
    checkpoint_every=2,
    evaluate_every=3,
    num_evaluated=16,
)


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = PretrainConfig(num_steps=100, warmup_steps=10, decay_share=0.4)
    assert learning_rate_scale(config, 0) == pytest.approx(0.1)
    assert learning_rate_scale(config, 30) == 1
    assert learning_rate_scale(config, 80) == pytest.approx(0.5)
    assert learning_rate_scale(config, 99) == pytest.approx(0.025)


def test_a_resumed_run_equals_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole = pretrain(replace(SMALL, output_dir=tmp_path / "whole"))
    parts = replace(SMALL, output_dir=tmp_path / "parts")
    lines: list[str] = []
    pretrain(replace(parts, num_steps=6), report=lines.append)
    # Throw the last steps away: what is left is the checkpoint of step 4.
    shutil.rmtree(parts.output_dir / "step-000006")
    (parts.output_dir / "policy" / "model.safetensors").unlink()
    resumed = pretrain(parts, resume=True, report=lines.append)
    assert any("resumed at step 4" in line for line in lines)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_both_tasks_are_learnt(tmp_path: Path) -> None:
    rare = {"checkpoint_every": 100, "evaluate_every": 100}
    config = replace(SMALL, num_steps=40, num_evaluated=32, output_dir=tmp_path, **rare)
    before = held_out_losses(config, make_policy(config))
    after = held_out_losses(config, ScenesPolicy.load(pretrain(config, report=lambda line: None)))
    assert after["t2i"] < 0.85 * before["t2i"]
    assert after["edit"] < 0.85 * before["edit"]


def test_settings_that_cannot_run_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        PretrainConfig(num_steps=0)
    with pytest.raises(ValueError, match="text_dropout"):
        PretrainConfig(text_dropout=1.5)
