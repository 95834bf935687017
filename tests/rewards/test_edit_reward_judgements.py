"""What is said of edits: scores on dimensions of one's own, ranks without scores, pictures of several sizes."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from rewards.base import Prompt
from rewards.edit_reward import EditReward
from rewards.edit_reward_calibration import CALIBRATION, load_curves
from rewards.edit_reward_data import (
    ScoredEdit,
    ordered_dimensions,
    read_dimensions,
    read_edits,
    shard_path,
    write_shard,
)
from rewards.edit_reward_inputs import EditInputs, EditTemplate
from rewards.edit_reward_pairs import count_edits, make_pairs, stream_pairs
from rewards.edit_reward_training import TrainingConfig, train_edit_reward
from rewards.scoring import score
from tests.rewards.tiny_edit_base import make_base
from tests.rewards.tiny_edits import edit, edits

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def renamed(one: ScoredEdit) -> ScoredEdit:
    """On two dimensions of its own, the last of which is the total."""
    return replace(one, scores={"realism": 1 - one.scores["total"], "overall": one.scores["total"]})


def ranked(one: ScoredEdit, rank: int) -> ScoredEdit:
    return replace(one, scores={}, rank=rank)


def ranked_pairs(num_prompts: int) -> list[ScoredEdit]:
    """A bright and a dark edit of each prompt, of two sizes, the bright one better."""
    found = []
    for prompt in range(num_prompts):
        bright, dark = ranked(edit(prompt, 0, 0.9), 1), ranked(edit(prompt, 1, 0.1), 2)
        if prompt % 2:
            bright, dark = (replace(e, image=e.image[:36], source=e.source[:36]) for e in (bright, dark))
        found += [dark, bright]
    return found


def rewrite(path: Path, change: dict[int, dict[str, object]], features: object = None) -> None:
    """Change cells of a file that is there."""
    known = datasets.Dataset.from_parquet(str(path))
    rows = known.cast_column("image", datasets.Image(decode=False)).to_list()
    for row, cells in change.items():
        rows[row] |= cells
    datasets.Dataset.from_list(rows, features=features or known.features).to_parquet(str(path))


def test_the_total_is_the_last_dimension() -> None:
    assert ordered_dimensions(["total", "a", "b"]) == ("a", "b", "total")
    assert ordered_dimensions(["a", "b"]) == ("a", "b")
    assert renamed(edit(0, 0, 0.25)).total == 0.25
    assert np.isnan(ranked(edit(0, 0, 0.25), 1).total)


def test_dimensions_are_those_of_the_data(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_shard(shard_path(data, "train", 0), [renamed(e) for e in edits(4)])
    write_shard(shard_path(data, "validation", 0), [renamed(e) for e in edits(4)])
    assert read_dimensions(data, "train") == ("realism", "overall")
    assert next(read_edits(data, "train")).scores == pytest.approx(renamed(edits(1)[0]).scores)
    pytest.importorskip("trl")
    config = TrainingConfig(data, str(base), tmp_path / "model", batch_size=8)
    reward = EditReward(train_edit_reward(config), device="cpu")
    chosen = edits(1)
    scores = score(reward, np.stack([e.image for e in chosen]), [Prompt(e.instruction, (e.source,)) for e in chosen])
    assert list(scores.components) == ["realism"]
    assert load_curves(tmp_path / "model").keys() == {"realism", "overall"}
    # The head that is there says something else than other data do.
    write_shard(shard_path(tmp_path / "other", "train", 0), edits(2))
    write_shard(shard_path(tmp_path / "other", "validation", 0), edits(2))
    other = replace(config, data=tmp_path / "other", base=str(tmp_path / "model"), output_dir=tmp_path / "more")
    with pytest.raises(ValueError, match=r"expected scores realism, overall as the head of .* without a head"):
        train_edit_reward(other)
    write_shard(shard_path(data, "validation", 0), edits(4))
    with pytest.raises(ValueError, match="split validation: expected the dimensions of train, realism, overall"):
        train_edit_reward(config)


def test_files_of_a_split_have_the_same_dimensions(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, "train", 0), edits(1))
    write_shard(shard_path(tmp_path, "train", 1), [renamed(e) for e in edits(1)])
    with pytest.raises(ValueError, match=r"train-00001.parquet: expected the dimensions success.*got realism, overall"):
        read_dimensions(tmp_path, "train")
    with pytest.raises(ValueError, match=r"0#1: expected scores .* got none for success"):
        write_shard(tmp_path / "x.parquet", [edit(0, 0, 0.5), replace(edit(0, 1, 0.5), scores={"total": 0.5})])
    with pytest.raises(ValueError, match="0#0: expected scores or a rank, got neither; give it a rank"):
        write_shard(tmp_path / "x.parquet", [replace(edit(0, 0, 0.5), scores={})])


def test_ranks_say_which_is_better_before_totals_do() -> None:
    first, second = replace(edit(0, 0, 0.9), rank=2), replace(edit(0, 1, 0.2), rank=1)
    rng = np.random.default_rng(0)
    (pair,) = make_pairs([first, second], rng)
    assert (pair.chosen.id, pair.weight) == ("0#1", 1.0)
    (tie,) = make_pairs([replace(first, rank=1), second], rng)
    assert tie.weight == 0
    (unknown,) = make_pairs([ranked(first, 1), replace(second, rank=None)], rng)
    assert unknown.weight == 0
    (by_total,) = make_pairs([first, replace(second, rank=None)], rng)
    assert (by_total.chosen.id, by_total.weight) == ("0#0", 1.0)


def test_ranks_come_back_and_only_pairs_that_differ_are_streamed(tmp_path: Path) -> None:
    tied = [ranked(e, 1) for e in edits(1)]
    write_shard(shard_path(tmp_path, "train", 0), [*ranked_pairs(4), *(replace(e, prompt_id="tied") for e in tied)])
    found = list(read_edits(tmp_path, "train", scored=False))
    assert [e.rank for e in found] == [2, 1] * 4 + [1] * 4
    assert [dict(e.scores) for e in found] == [{}] * 12
    assert count_edits(tmp_path, "train", scored=False) == 8
    pairs = list(islice(stream_pairs(tmp_path, "train", 0, scored=False), 8))
    assert all((pair.chosen.rank, pair.rejected.rank, pair.weight) == (1, 2, 1.0) for pair in pairs)
    assert sorted(pair.chosen.prompt_id for pair in pairs[:4]) == ["0", "1", "2", "3"]


def test_pairs_alone_train_a_reward(base: Path, tmp_path: Path) -> None:
    """Pictures of two sizes, no scores, no validation: it learns the order, and what it says is on no scale."""
    pytest.importorskip("trl")
    write_shard(shard_path(tmp_path, "train", 0), ranked_pairs(8))
    config = TrainingConfig(tmp_path, str(base), tmp_path / "model", num_epochs=15, batch_size=8, learning_rate=3e-3)
    reward = EditReward(train_edit_reward(replace(config, regression_weight=0.0)), device="cpu")
    assert not (tmp_path / "model" / CALIBRATION).exists()
    dark, bright = ([edit(p, 7, total) for p in range(4)] for total in (0.1, 0.9))
    said = [
        score(reward, np.stack([e.image for e in chosen]), [Prompt(e.instruction, (e.source,)) for e in chosen])
        for chosen in (dark, bright)
    ]
    assert not said[0].components
    assert (said[1].total > said[0].total).all()


def test_scores_that_validation_has_calibrate_a_reward_of_pairs(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    write_shard(shard_path(tmp_path, "train", 0), ranked_pairs(4))
    write_shard(shard_path(tmp_path, "validation", 0), edits(4))
    config = TrainingConfig(tmp_path, str(base), tmp_path / "model", batch_size=8, regression_weight=0.0)
    assert load_curves(train_edit_reward(config)).keys() == {"total"}


def test_what_is_missing_is_named_before_training(base: Path, tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, "train", 0), ranked_pairs(2))
    config = TrainingConfig(tmp_path, str(base), tmp_path / "model")
    with pytest.raises(ValueError, match=r"expected edits with scores, got a split without.*--regression-weight 0"):
        train_edit_reward(config)
    with pytest.raises(ValueError, match=r"none of them usable; row 0: scores: expected .*--regression-weight 0"):
        list(read_edits(tmp_path, "train"))
    write_shard(shard_path(tmp_path, "train", 0), [ranked(e, 1) for e in edits(2)])
    with pytest.raises(ValueError, match=r"expected prompts with a better and a worse edit, got none; write the edits"):
        train_edit_reward(replace(config, regression_weight=0.0))
    write_shard(shard_path(tmp_path, "train", 0), edits(2))
    with pytest.raises(ValueError, match="expected files validation-"):
        train_edit_reward(config)


def test_rows_that_say_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shard_path(tmp_path, "train", 0)
    write_shard(path, ranked_pairs(2))
    features = datasets.Dataset.from_parquet(str(path)).features | {"rank": datasets.Value("float64")}
    changes: dict[int, dict[str, object]] = {1: {"rank": float("nan")}, 2: {"rank": 1.5}}
    rewrite(path, changes, datasets.Features(features))
    with caplog.at_level(logging.WARNING):
        assert [e.rank for e in read_edits(tmp_path, "train", scored=False)] == [2, 1]
    assert "row 1 is left out: scores and rank: expected one of them, got neither; give it a rank" in caplog.text
    assert "row 2 is left out: rank: expected a whole number, got 1.5; give it a rank" in caplog.text


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    path = shard_path(tmp_path, "train", 0)
    write_shard(path, edits(1))
    datasets.Dataset.from_parquet(str(path)).remove_columns(["id", "tag", "metadata"]).to_parquet(str(path))
    assert len(list(read_edits(tmp_path, "train"))) == 4
    datasets.Dataset.from_parquet(str(path)).remove_columns(["instruction"]).to_parquet(str(path))
    with pytest.raises(ValueError, match="row 0: expected a column 'instruction', got none"):
        list(read_edits(tmp_path, "train"))


def test_an_edit_that_the_template_cannot_show_is_named_at_load(base: Path, tmp_path: Path) -> None:
    wrong = replace(edit(0, 1, 0.5), image=edit(0, 1, 0.5).image[:36])
    write_shard(shard_path(tmp_path, "train", 0), [edit(0, 0, 0.5), wrong])
    frames = EditInputs.load(base, EditTemplate.load("edit_reward_frames.v1"))
    with pytest.raises(ValueError, match=r"edit '?0#1'? cannot be read: frames: .*template of two pictures"):
        count_edits(tmp_path, "train", inputs=frames)
    assert count_edits(tmp_path, "train", inputs=EditInputs.load(base)) == 2
