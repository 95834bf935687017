"""An edit reward that two real processes train, and what of it is trained: adapters, and all but the vision tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rewards.base import Prompt
from rewards.edit_reward import EditReward
from rewards.edit_reward_adapters import choose_trained, merged
from rewards.edit_reward_calibration import load_curves
from rewards.edit_reward_data import shard_path, write_shard
from rewards.edit_reward_model import EditRewardModel, load_model
from rewards.edit_reward_training import TrainingConfig, train_edit_reward
from rewards.scoring import score
from tests.pdtr.launched import launch
from tests.rewards.edit_reward_jobs import EditRewardJob, config_of, main, told
from tests.rewards.tiny_edit_base import make_base
from tests.rewards.tiny_edits import edits

pytest.importorskip("datasets")
pytest.importorskip("trl")
pytestmark = pytest.mark.timeout(600)
# Of all weights together, against what training moved them by: the order of a sum is all that may differ.
RELATIVE = 1e-5
PER_PROCESS = 4
RANKS = (0, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and 32 edits of 8 prompts."""
    root = tmp_path_factory.mktemp("processes")
    write_shard(shard_path(root / "data", "train", 0), edits(8))
    write_shard(shard_path(root / "data", "validation", 0), edits(5, 3))
    make_base(root / "base")
    return root


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[int, EditRewardJob]:
    """Trained here, with as many pairs a step as two processes have."""
    jobs = {
        rank: EditRewardJob(str(folder / "data"), str(folder / "base"), str(folder / f"one-{rank}"), 8, rank)
        for rank in RANKS
    }
    main(told(list(jobs.values())))
    return jobs


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[int, EditRewardJob]) -> dict[int, EditRewardJob]:
    """The same by two processes."""
    jobs = {
        rank: replace(job, output_dir=str(folder / f"two-{rank}"), batch_size=PER_PROCESS) for rank, job in one.items()
    }
    launch(main, told(list(jobs.values())), 2)
    return jobs


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    shared = first.keys() & second.keys()
    return float(sum((first[name] - second[name]).double().square().sum() for name in shared) ** 0.5)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("rank", RANKS)
def test_two_processes_train_what_one_trains(
    folder: Path, one: dict[int, EditRewardJob], two: dict[int, EditRewardJob], rank: int
) -> None:
    alone, shared = weights(one[rank].output_dir), weights(two[rank].output_dir)
    assert alone.keys() == shared.keys()
    moved = distance(weights(folder / "base"), alone)
    assert moved > 0.05
    assert distance(alone, shared) < RELATIVE * moved
    curves = [load_curves(Path(jobs[rank].output_dir)) for jobs in (one, two)]
    assert curves[0].keys() == curves[1].keys() == {"success", "preservation", "total"}
    for name, curve in curves[0].items():
        np.testing.assert_allclose(curve.x, curves[1][name].x, atol=2e-6)
        np.testing.assert_allclose(curve.y, curves[1][name].y, atol=2e-6)
    assert not (Path(two[rank].output_dir) / "trainer").exists()


def test_adapters_are_merged_into_a_checkpoint_like_any_other(folder: Path, one: dict[int, EditRewardJob]) -> None:
    full, adapted = weights(one[0].output_dir), weights(one[4].output_dir)
    assert adapted.keys() == full.keys()
    names = changed(weights(folder / "base"), adapted)
    assert names
    assert all(name.startswith("model.layers.") and name.endswith("_proj.weight") for name in names)
    assert changed(weights(folder / "base"), full) > names
    # All seven linear layers of a block, each by a matrix of rank 4 at most.
    assert {name.split(".")[-2] for name in names} == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    base = weights(folder / "base")
    for name in names:
        values = torch.linalg.svdvals((adapted[name] - base[name]).double())
        assert values[4:].max() < 1e-4 * values[0]
    reward = EditReward(one[4].output_dir, device="cpu")
    chosen = edits(2)
    scores = score(reward, np.stack([e.image for e in chosen]), [Prompt(e.instruction, (e.source,)) for e in chosen])
    assert not np.isnan(scores.total).any()


def test_merging_says_what_the_adapters_said(folder: Path) -> None:
    model = load_model(folder / "base")
    config = TrainingConfig(lora_rank=2, lora_alpha=8)
    before = outputs(model)
    adapted = choose_trained(model, config)
    assert torch.equal(outputs(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("score.") for name in trained)
    assert not any("visual" in name for name in trained)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with_adapters = outputs(model)
    assert not torch.allclose(with_adapters, before, atol=1e-3)
    plain = merged(model, adapted)
    assert type(plain) is EditRewardModel
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(outputs(plain), with_adapters, atol=1e-5, rtol=1e-4)


def test_a_vision_tower_that_is_frozen_stays_as_it_was(folder: Path, one: dict[int, EditRewardJob]) -> None:
    """And gradient checkpointing computes the same gradients."""
    job = replace(one[0], output_dir=str(folder / "frozen"), batch_size=16)
    config = replace(config_of(job), freeze_vision=True)
    base = weights(folder / "base")
    frozen = weights(train_edit_reward(config))
    names = changed(base, frozen)
    assert names
    assert not any(name.startswith("visual.") for name in names)
    assert {name for name in base if not name.startswith(("visual.", "lm_head"))} == names
    again = replace(config, output_dir=folder / "again", gradient_checkpointing=True)
    assert distance(weights(train_edit_reward(again)), frozen) < RELATIVE * distance(base, frozen)


def test_adapters_train_over_weights_in_bfloat16(folder: Path, one: dict[int, EditRewardJob]) -> None:
    job = replace(one[4], output_dir=str(folder / "bf16"), batch_size=16)
    config = replace(config_of(job), bf16=True, gradient_checkpointing=True)
    found = weights(train_edit_reward(config))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert found.keys() == weights(one[0].output_dir).keys()
    chosen = edits(1)
    reward = EditReward(folder / "bf16", device="cpu", dtype="bfloat16")
    scores = score(reward, np.stack([e.image for e in chosen]), [Prompt(e.instruction, (e.source,)) for e in chosen])
    assert not np.isnan(scores.total).any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_rank": -1}, "lora_rank and lora_alpha: expected 0 .no adapters. or more, and above 0, got -1"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"regression_weight": -1.0}, "regression_weight"),
        ({"regression_weight": 0.0, "bradley_terry_weight": 0.0}, "expected one above 0"),
    ],
)
def test_settings_that_cannot_be_are_named(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(TrainingConfig(), **changes)


def outputs(model: EditRewardModel) -> Tensor:
    from rewards.edit_reward_inputs import EditInputs

    inputs = EditInputs.load(Path(model.name_or_path))
    chosen = edits(1)
    return torch.from_numpy(
        model.rewards(inputs([e.instruction for e in chosen], [e.source for e in chosen], [e.image for e in chosen]))
    )
