"""``pdtr edit-reward``: its data, the pictures it learns to read from, its commands and its benchmark."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from envs.scenes.detector import detect
from envs.scenes.edit_reading import CONFIDENT
from envs.scenes.edits import sample_edit, split_operations
from envs.scenes.render import render
from envs.scenes.rewards import edit_reward
from envs.scenes.world import COLORS, SHAPES, SceneObject, place_all
from experiments.benchmarks.edit_reward import Figure, format_figures
from experiments.cli import main
from experiments.edit_reward import edit_reward as edit_reward_command
from experiments.edit_reward_check import check_reward_on, format_found
from experiments.edit_reward_data import EditDataConfig, make_data, split_prompts
from experiments.edit_reward_reading import (
    NOTHING,
    UNKNOWN,
    candidate,
    detected_cells,
    drawn_cells,
    rendered_edits,
    scene_cells,
)
from experiments.reward import load_reward
from rewards.base import Prompt
from rewards.edit_reward import EditReward
from rewards.edit_reward_data import ScoredEdit, read_edits, shard_path

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> EditDataConfig:
    """Edits of the base policy for nine prompts, each at two qualities."""
    config = EditDataConfig(
        tmp_path_factory.mktemp("data"),
        num_train=5,
        num_validation=2,
        num_test=2,
        num_inference_steps=(2, 3),
        guidance_scales=(1.0, 1.0),
        prompts_a_shard=3,
        held_out_share=0.4,
    )
    make_data(config, lambda _: None)
    return config


def test_every_prompt_is_drawn_at_every_quality(made: EditDataConfig) -> None:
    edits = list(read_edits(made.output_dir, "train"))
    assert [e.prompt_id for e in edits] == [p.id for p in split_prompts(made, "train") for _ in range(2)]
    assert [e.metadata["num_inference_steps"] for e in edits] == [2, 3] * 5
    assert not np.array_equal(edits[0].image, edits[1].image)
    prompts = {p.id: p for p in split_prompts(made, "train")}
    again = edit_reward(np.stack([e.image for e in edits]), [prompts[e.prompt_id] for e in edits])
    assert [e.scores["total"] for e in edits] == pytest.approx(again.total.tolist())
    assert shard_path(made.output_dir, "train", 1).is_file()


def test_splits_share_no_prompt(made: EditDataConfig) -> None:
    names = {split: {p.id for p in split_prompts(made, split)} for split in ("train", "validation", "test")}
    assert [len(ids) for ids in names.values()] == [5, 2, 2]
    assert len(set.union(*names.values())) == 9
    assert all("held_out" in name for split in ("validation", "test") for name in names[split])


def test_a_share_of_the_training_prompts_is_of_the_held_out_split(made: EditDataConfig) -> None:
    assert ["held_out" in prompt.id for prompt in split_prompts(made, "train")] == [False, False, True, False, True]
    for share, count in ((0.0, 0), (0.2, 1), (1.0, 5)):
        prompts = split_prompts(replace(made, held_out_share=share), "train")
        assert sum("held_out" in prompt.id for prompt in prompts) == count
    with pytest.raises(ValueError, match=r"held_out_share: expected a share from 0 to 1, got 1\.5"):
        replace(made, held_out_share=1.5)


def test_data_are_resumed_and_not_mixed(made: EditDataConfig) -> None:
    path = shard_path(made.output_dir, "train", 1)
    before, kept = path.read_bytes(), shard_path(made.output_dir, "train", 0).stat().st_mtime_ns
    path.unlink()
    make_data(made, lambda _: None)
    assert path.read_bytes() == before
    assert shard_path(made.output_dir, "train", 0).stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="same settings"):
        make_data(EditDataConfig(made.output_dir), lambda _: None)


def test_cells_say_what_stands_where() -> None:
    scene = (SceneObject("circle", "red", 5, 5, 6), SceneObject("cross", "black", 40, 20, 6))
    cells = scene_cells(scene, 4)
    assert cells[:, 0].tolist() == [1, 1]
    assert cells[:, 4 + 3].tolist() == [6, 5]
    assert (cells != NOTHING).sum() == 4


def test_the_detector_reads_the_same_cells_and_is_as_unsure_as_the_ground_truth() -> None:
    scene = (SceneObject("circle", "red", 9, 9, 7), SceneObject("cross", "black", 38, 22, 7))
    clear = render([scene])[0]
    faint = np.rint(255 - 0.6 * (255 - clear.astype(np.float64))).astype(np.uint8)
    found = detected_cells(np.stack([clear, faint]), 4)
    assert np.array_equal(found[0], scene_cells(scene, 4))
    for row, detections in zip(found, detect(np.stack([clear, faint])), strict=True):
        assert (row[1] != NOTHING).sum() == sum(d.confidence > CONFIDENT for d in detections)
    assert (found[1, 1] != NOTHING).sum() < 2
    assert detected_cells(np.empty((0, 48, 48, 3), np.uint8), 4).shape == (0, 2, 16)


def test_the_detector_has_every_shape_in_the_cell_of_its_scene() -> None:
    rng = np.random.default_rng(2)
    scenes = [place_all(rng, [(str(rng.choice(list(COLORS))), shape)]) for shape in SHAPES for _ in range(60)]
    found = detected_cells(render(scenes), 4)
    same = [np.array_equal(cells, scene_cells(scene, 4)) for cells, scene in zip(found, scenes, strict=True)]
    # One at the border of two cells may be read in the other.
    assert np.mean(same) > 0.98


def test_cells_of_a_drawn_edit_leave_open_what_was_asked() -> None:
    sources = render([(SceneObject("circle", "red", 9, 9, 7),), (SceneObject("cross", "blue", 30, 30, 7),)])
    edits = [ScoredEdit(str(i), "p", "make it blue", sources[i], sources[1 - i], {"total": 0.0}) for i in range(2)]
    cells = drawn_cells(edits, 4)
    assert cells.shape == (2, 3, 2, 16)
    assert np.array_equal(cells[:, 0], cells[::-1, 1])
    assert (cells[:, 2] == UNKNOWN).all()


def test_rendered_instructions_are_of_both_splits() -> None:
    combinations = split_operations("remove")["held_out"]
    rng = np.random.default_rng(0)
    asked = [edit.instruction for _ in range(4) for edit in rendered_edits(rng, 100, 4)]
    removals = [text for text in asked if text.startswith(("remove", "delete", "take away")) and " and " not in text]
    held_out = [text for text in removals if any(f"{c} {s}" in text for c, s in combinations)]
    assert 0.05 < len(held_out) / len(removals) < 0.5


def test_rendered_edits_are_what_they_say() -> None:
    edits = rendered_edits(np.random.default_rng(0), 40, 4)
    assert len(edits) > 30
    totals = np.array([edit.scores["total"] for edit in edits])
    assert (totals > 0.8).any()
    assert (totals < 0.1).any()
    known = [edit.cells[1] for edit in edits if (edit.cells[1] != UNKNOWN).all()]
    assert len(known) >= 20
    again = rendered_edits(np.random.default_rng(0), 40, 4)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(edits, again, strict=True))


@pytest.mark.parametrize("kind", ["right", "careless", "miss", "other", "untouched"])
def test_candidates_earn_what_their_kind_says(kind: str) -> None:
    rng = np.random.default_rng(1)
    tasks = [sample_edit(rng, "train", skill) for skill in ("recolor", "remove", "replace") for _ in range(8)]
    prompts = [Prompt(t.text, (s,), t.metadata) for t, s in zip(tasks, render([t.source for t in tasks]), strict=True)]
    scores = edit_reward(render([candidate(rng, task, kind) for task in tasks]), prompts)
    mean = float(np.nanmean(scores.total))
    assert mean > 0.9 if kind == "right" else mean < 0.8
    assert kind != "untouched" or mean < 0.01


def test_a_checkpoint_is_named_in_one_word(tmp_path: Path) -> None:
    reward = load_reward(f"rewards.edit_reward:EditReward={tmp_path}")
    assert isinstance(reward, EditReward)
    assert str(reward.checkpoint) == str(tmp_path)
    for name in ("rewards.edit_reward:EditReward", "rewards.edit_reward:EditReward="):
        with pytest.raises(ValueError, match="ARGUMENT"):
            load_reward(name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["edit-reward"], "data, train, check"),
        (["edit-reward", "trian"], "pdtr edit-reward train"),
        (["edit-reward", "train", "--base", "/nowhere", "--data", "/nowhere"], "owner/name"),
        (["edit-reward", "check", "/nowhere", "--data", "/nowhere"], "pdtr edit-reward data"),
        (["edit-reward", "data", "--num-train", "0"], "num_train"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_the_ground_truth_agrees_with_itself(made: EditDataConfig) -> None:
    edits = list(read_edits(made.output_dir, "train"))
    prompts = {p.id: p for p in split_prompts(made, "train")}

    def truth(images: np.ndarray, asked: list[Prompt]) -> np.ndarray:
        return edit_reward(images, [prompts[prompt.id] for prompt in asked]).total

    found = check_reward_on(truth, edits, 20)
    assert found[0].what == "total"
    assert found[0].agreement.spearman.value == pytest.approx(1)
    assert found[0].agreement.calibration.value == pytest.approx(0, abs=1e-6)
    assert "pairs in order" in format_found(found)


def test_figures_are_averaged_over_seeds() -> None:
    figures = [Figure(seed, "total", "Spearman", 0.75 + 0.1 * seed, 0.7, 0.9, 8, 1.0, "here") for seed in (0, 1)]
    text = format_figures(figures)
    assert "0.800" in text
    assert "1 of 2 seeds" in text
    assert "0.750 [0.700, 0.900]" in format_figures(figures[:1])


def judged(index: int, size: int, **changes: object) -> ScoredEdit:
    """An edit of one colour, whose brightness is its total."""
    total = index / 10
    picture = np.full((size, size, 3), round(255 * total), np.uint8)
    made = ScoredEdit(
        str(index), str(index // 2), "make it bright", picture, picture, {"detail": 0.5, "overall": total}
    )
    return replace(made, **changes)


def brightness(images: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
    """Of images that are their sources: each call has those of one size, with the prompts that they belong to."""
    assert all(np.array_equal(image, prompt.source_images[0]) for image, prompt in zip(images, prompts, strict=True))
    return images.mean((1, 2, 3)) / 255


def test_edits_of_several_sizes_are_compared_in_their_order() -> None:
    edits = [judged(index, (8, 12, 16)[index % 3]) for index in range(10)]
    found = check_reward_on(brightness, edits, 10)
    assert [row.what for row in found] == ["total"]
    assert found[0].agreement.spearman.value == pytest.approx(1)
    assert found[0].agreement.calibration.value < 0.01
    assert (found[0].agreement.count, found[0].agreement.num_pairs) == (10, 5)


def test_ranks_are_compared_within_a_prompt_alone() -> None:
    edits = [judged(index, 8, scores={}, rank=2 - index % 2) for index in range(10)]
    (found,) = check_reward_on(brightness, edits, 10)
    assert found.agreement.pairwise.value == 1
    assert np.isnan(found.agreement.spearman.value)
    assert "nan" not in format_found([found])
    with pytest.raises(ValueError, match="'3' without a rank"):
        check_reward_on(brightness, [*edits[:3], judged(3, 8), *edits[4:]], 10)


def test_several_processes_share_the_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="edit-reward check: expected one process, got 2"):
        edit_reward_command(["check", "/nowhere"])
    with pytest.raises(ValueError, match="owner/name"):
        edit_reward_command(["train", "--base", "/nowhere"])
