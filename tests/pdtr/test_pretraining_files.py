"""Stage C from files to a folder: streamed records of several shapes, a policy in the published form, resumed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

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
