"""Stage C from files to a folder: streamed records of several shapes, a policy in the published form, resumed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.policies.backbone import BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.metaquery import MetaQueryPolicy
from envs.data.batches import BatchSettings
from envs.data.buckets import ProgressiveResolution
from envs.data.records import RecordSet
from envs.data.stream import StreamBatches
from pdtr.pretraining_loop import pretrain_stage
from pdtr.pretraining_run import StageRun
from pdtr.pretraining_stages import PUBLISHED
from tests.agents.tiny_metaquery import make_metaquery
from tests.envs.record_files import png, write_rows

SETTINGS = BackboneSettings(height=64, width=64, dtype="float32")
BATCHES = BatchSettings(batch_size=2, resolution=ProgressiveResolution((64,)), window=4, num_workers=0, prefetch=0)


def write_records(folder: Path) -> dict[str, list[RecordSet]]:
    """Squares and pictures of 16:9, of both tasks."""
    shapes = [(64, 64), (64, 64), (96, 54), (96, 54)] * 2
    pictures = [(png(number, *shape), png(number + 300, *shape)) for number, shape in enumerate(shapes)]
    write_rows(folder / "t2i.jsonl", [{"prompt": f"a red {n}", "image": one} for n, (one, _) in enumerate(pictures)])
    edits = [
        {"instruction": f"make the {n} blue", "input_image": one, "output_image": other}
        for n, (one, other) in enumerate(pictures)
    ]
    write_rows(folder / "edit.jsonl", edits)
    return {task: [RecordSet((f"{folder}/{task}.jsonl",))] for task in ("t2i", "edit")}


def test_the_largest_batches_are_tried_first_and_change_nothing(tmp_path: Path) -> None:
    """S is 64 from the third batch on, where 3:2 has the most pixels; the run is that which tries nothing."""
    make_metaquery(tmp_path, SETTINGS)
    sets = write_records(tmp_path)
    growing = replace(BATCHES, resolution=ProgressiveResolution((32, 64), (0, 2)))
    said: dict[str, list[str]] = {"tried": [], "untried": []}
    sizes: list[Any] = []
    runs = {}
    for name, lines in said.items():
        policy = load_backbone(tmp_path / "policy", SETTINGS)
        patches: Any = policy.transformer.pos_embed
        if name == "tried":
            patches.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
        source = StreamBatches(sets, growing)
        config = replace(PUBLISHED["C"], output_dir=tmp_path / name, num_steps=2, global_batch_size=4)
        runs[name] = StageRun(config, policy, source, largest=source.largest_batches() if name == "tried" else {})
        torch.manual_seed(0)
        pretrain_stage(runs[name], report=lines.append)
        assert torch.initial_seed() == 0
        source.close()
    assert said["tried"][0] == "memory holds the largest batches: 2 of t2i at 64 x 96 and 2 of edit at 64 x 96"
    assert len(said["tried"]) == len(said["untried"]) + 1
    # A picture of text-to-image, one of the edit with its source, and all again, before those of 32 come.
    assert sizes[:6] == [(2, 4, 8, 12)] * 6
    assert max(size[2] * size[3] for size in sizes[6:8]) < 64
    for name, module in runs["untried"].modules.items():
        tried = runs["tried"].modules[name].state_dict()
        assert all(torch.equal(tensor, tried[key]) for key, tensor in module.state_dict().items())


def test_too_little_memory_for_the_largest_batch_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_metaquery(tmp_path, SETTINGS)
    growing = replace(BATCHES, resolution=ProgressiveResolution((32, 64), (0, 2), (4, 2)))
    source = StreamBatches(write_records(tmp_path), growing)
    config = replace(PUBLISHED["C"], output_dir=tmp_path / "run", num_steps=2, global_batch_size=4)
    run = StageRun(config, load_backbone(tmp_path / "policy", SETTINGS), source, largest=source.largest_batches())

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")

    monkeypatch.setattr(run, "_loss", full)
    with pytest.raises(
        ValueError, match=r"largest batch, 2 of t2i at 64 x 96, got too little \(CUDA out of memory\.\)"
    ):
        pretrain_stage(run)
    assert run.step == 0
    source.close()


def test_only_resolutions_that_grow_have_a_largest_batch(tmp_path: Path) -> None:
    source = StreamBatches(write_records(tmp_path), BATCHES)
    assert source.largest_batches() == {}
    source.close()
    # Few large ones may be less than many small ones; 3:2 has the most pixels at 512.
    assert replace(BATCHES, resolution=ProgressiveResolution((512, 1024), (0, 1), (8, 1))).largest() == (8, (416, 640))
    assert replace(BATCHES, resolution=ProgressiveResolution((256, 512), (0, 1), (2, 2))).largest() == (2, (416, 640))


def test_batches_of_several_sizes_from_files_train_and_resume_to_the_bit(tmp_path: Path) -> None:
    made = make_metaquery(tmp_path, SETTINGS)
    sets = write_records(tmp_path)
    sizes: list[Any] = []

    def run(name: str) -> StageRun:
        policy = load_backbone(made, SETTINGS)
        assert isinstance(policy, MetaQueryPolicy)
        patches: Any = policy.transformer.pos_embed
        patches.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[2:])))
        config = replace(
            PUBLISHED["C"],
            output_dir=tmp_path / name,
            num_steps=4,
            learning_rate=1e-3,
            global_batch_size=4,
            checkpoint_every=2,
        )
        return StageRun(config, policy, StreamBatches(sets, BATCHES))

    whole = run("whole")
    folder = pretrain_stage(whole, report=lambda line: None)
    assert len(set(sizes)) == 2
    assert (8, 8) in sizes
    assert load_backbone(folder).image_size == whole.policy.image_size == (64, 64)
    pretrain_stage(run("parts"), report=lambda line: None)
    shutil.rmtree(tmp_path / "parts" / "step-000004")
    resumed = run("parts")
    pretrain_stage(resumed, resume=True, report=lambda line: None)
    assert resumed.step == 4
    for name, module in whole.modules.items():
        again = resumed.modules[name].state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in module.state_dict().items())
