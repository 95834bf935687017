"""Data, pairs and the trainer of the learnt edit reward: a few steps of the real ones."""

import logging
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.base import Prompt
from rewards.edit_reward import EditReward, template_of
from rewards.edit_reward_data import read_edits, shard_path, write_shard
from rewards.edit_reward_inputs import EditInputs
from rewards.edit_reward_model import load_model
from rewards.edit_reward_pairs import collate, make_pairs, stream_pairs
from rewards.edit_reward_trainer import make_trainer
from rewards.edit_reward_training import TrainingConfig, calibrate, predict, train_edit_reward
from rewards.scoring import score
from tests.rewards.tiny_edit_base import make_base
from tests.rewards.tiny_edits import edit, edits

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shard(shard_path(folder, "train", 0), edits(4))
    write_shard(shard_path(folder, "train", 1), edits(8)[16:])
    write_shard(shard_path(folder, "validation", 0), edits(6))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def test_data_come_back_as_they_were(data: Path) -> None:
    found = list(read_edits(data, "train"))
    assert [e.id for e in found] == [e.id for e in edits(8)]
    for mine, theirs in zip(edits(8), found, strict=True):
        assert np.array_equal(mine.image, theirs.image)
        assert np.array_equal(mine.source, theirs.source)
        assert theirs.scores == pytest.approx(mine.scores)
        assert (theirs.instruction, theirs.tag, theirs.metadata) == (mine.instruction, "recolor", {"n": 1})


def test_rows_that_cannot_be_used_are_reported_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shard_path(tmp_path, "train", 0)
    write_shard(path, edits(1))
    rows = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[1]["image"] = {"bytes": rows[1]["image"]["bytes"][:60], "path": None}
    rows[2]["scores"]["total"] = float("nan")
    rows[3]["image"] = None
    features = datasets.Dataset.from_parquet(str(path)).features
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))
    with caplog.at_level(logging.WARNING):
        found = list(read_edits(tmp_path, "train"))
    assert [e.id for e in found] == ["0#0"]
    assert "row 1 is left out: image" in caplog.text
    assert "row 2 is left out: scores.total" in caplog.text
    assert "3 of 4 rows were left out" in caplog.text


def test_missing_and_damaged_data_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train, validation"):
        next(read_edits(data, "test"))
    shard_path(tmp_path, "train", 0).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read"):
        next(read_edits(tmp_path, "train"))
    with pytest.raises(ValueError, match="at least one edit"):
        write_shard(tmp_path / "x.parquet", [])


def test_every_edit_is_in_one_pair_and_the_better_one_is_chosen() -> None:
    group = edits(1, 4)
    pairs = make_pairs(group, np.random.default_rng(0))
    assert Counter(e.id for pair in pairs for e in (pair.chosen, pair.rejected)) == Counter(e.id for e in group)
    assert all(pair.chosen.scores["total"] >= pair.rejected.scores["total"] for pair in pairs)
    tie = make_pairs([edit(0, 0, 0.5), edit(0, 1, 0.52)], np.random.default_rng(0))
    assert [pair.weight for pair in tie] == [0.0]
    assert [pair.weight for pair in make_pairs([edit(0, 0, 0.5)], np.random.default_rng(0))] == [0.0]
    assert len(make_pairs(edits(1, 3), np.random.default_rng(0))) == 2


def test_each_pass_pairs_anew_and_follows_from_the_seed(data: Path) -> None:
    first, again, other = (
        [(p.chosen.id, p.rejected.id) for p in islice(stream_pairs(data, "train", seed), 32)] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert sorted(first[:16]) != sorted(first[16:])
    assert {name for pair in first[:16] for name in pair} == {e.id for e in edits(8)}


def test_a_batch_has_the_chosen_first(base: Path) -> None:
    pairs = make_pairs(edits(1, 4), np.random.default_rng(0))
    batch = collate(
        [{"pair": pair} for pair in pairs],
        EditInputs.load(base, template_of(base)),
        ("success", "preservation", "total"),
    )
    totals = [pair.chosen.scores["total"] for pair in pairs] + [pair.rejected.scores["total"] for pair in pairs]
    assert batch["scores"][:, 2].tolist() == pytest.approx(totals)
    assert batch["input_ids"].shape[0] == batch["scores"].shape[0] == 4
    assert batch["pair_weights"].shape == (2,)


def test_the_trainer_learns_a_handful_of_pairs(data: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    config = TrainingConfig(data, str(base), tmp_path, num_epochs=30, batch_size=8, learning_rate=3e-3)
    torch.manual_seed(0)
    model, inputs = load_model(base), EditInputs.load(base, template_of(base))
    found = list(read_edits(data, "train"))
    totals = np.array([e.scores["total"] for e in found])
    before = np.abs(predict(model, inputs, found, 16)[:, 2] - totals).mean()
    trainer = make_trainer(model, inputs, config, len(found))
    trainer.train()
    after = predict(model, inputs, found, 16)[:, 2]
    assert np.abs(after - totals).mean() < 0.4 * before
    assert np.corrcoef(after, totals)[0, 1] > 0.9
    entry = trainer.state.log_history[-2]
    assert entry["accuracy"] > 0.8
    assert {"regression", "bradley_terry", "loss"} <= set(entry)
    calibrate(model, inputs, config)
    assert (tmp_path / "calibration.json").is_file()


def test_a_trained_checkpoint_is_a_reward(data: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    config = TrainingConfig(data, str(base), tmp_path, num_epochs=1, batch_size=8)
    reward = EditReward(train_edit_reward(config), device="cpu")
    chosen = edits(2)
    prompts = [Prompt(e.instruction, (e.source,)) for e in chosen]
    scores = score(reward, np.stack([e.image for e in chosen]), prompts)
    assert not np.isnan(scores.total).any()
    assert not (tmp_path / "trainer").exists()
