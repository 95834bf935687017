"""``pdtr pretrain stage-a|stage-b|stage-c``: files and folders in, a policy out, by one process or two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.policies.loading import load_backbone
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.tiny.sd3 import make_tiny_sd3
from envs.data.batches import BatchSettings
from envs.data.buckets import ProgressiveResolution
from experiments.benchmarks.world_size_runs import environment
from experiments.cli import main
from experiments.pretrain_checks import check
from experiments.pretrain_stage import StageOptions, published
from pdtr.pretraining_stages import PUBLISHED, Stage
from tests.agents.tiny_metaquery import make_metaquery
from tests.pdtr.test_pretraining_files import SETTINGS, write_records

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pdtr"]
SMALL = [
    *("--stage.num-steps", "2", "--stage.global-batch-size", "8", "--stage.evaluate-every", "1"),
    *("--batches.batch-size", "2", "--batches.resolution.sizes", "64", "--batches.window", "4"),
    *("--batches.num-workers", "0", "--backbone.height", "64", "--backbone.width", "64"),
    *("--backbone.dtype", "float32", "--first-size", "32"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3, a tiny Qwen2.5-VL, a MetaQuery policy of both, and records."""
    root = tmp_path_factory.mktemp("stage")
    make_metaquery(root, SETTINGS)
    write_records(root)
    for task in ("t2i", "edit"):
        shutil.copy(root / f"{task}.jsonl", root / f"held-out-{task}.jsonl")
    return root


def files(folder: Path, *tasks: str) -> list[str]:
    flags = [(f"--{kind}{task}", f"{folder}/{kind}{task}.jsonl") for task in tasks for kind in ("", "held-out-")]
    return [argument for flag in flags for argument in flag]


@pytest.mark.timeout(300)
def test_stage_a_and_then_c_by_two_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folder / "a", folder / "c"
    flags = ["--model", str(folder / "policy"), *files(folder, "t2i"), *SMALL, "--stage.output-dir", str(first)]
    assert main(["pretrain", "stage-a", *flags]) == 0
    said = capsys.readouterr()
    assert f"policy: {first / 'policy'}" in said.out
    rows = [json.loads(line) for line in (first / "losses.jsonl").read_text().splitlines()]
    assert [(row["step"], set(row["loss"]), set(row["held_out"])) for row in rows] == [
        (1, {"t2i"}, {"t2i"}),
        (2, {"t2i"}, {"t2i"}),
    ]
    assert main(["pretrain", "stage-a", *flags]) == 2
    assert "expected a new folder, got one with step-000002; pass --resume" in capsys.readouterr().err
    assert main(["pretrain", "stage-a", "--resume", *flags]) == 0
    assert (first / "problems" / "t2i_problems.jsonl").is_file()

    parts = ["--generator", str(folder / "sd3"), "--lmm", str(folder / "qwen")]
    parts += ["--connector", str(first / "policy" / "conditioner")]
    command = [*TORCHRUN, "pretrain", "stage-c", *parts, *files(folder, "t2i", "edit"), *SMALL]
    done = subprocess.run(
        [*command, "--stage.output-dir", str(second), "--processes.sharding", "fsdp2"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"policy: {second / 'policy'}") == 1
    aligned, joint = (load_backbone(run / "policy", SETTINGS) for run in (first, second))
    assert isinstance(aligned, MetaQueryPolicy)
    assert isinstance(joint, MetaQueryPolicy)
    pairs = [(aligned.connector, joint.connector), (aligned.transformer, joint.transformer)]
    for one, other in pairs:
        assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(p.isnan().any() for _, module in pairs for p in module.parameters())


def test_stage_b_teaches_sd3_and_keeps_its_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_sd3(tmp_path / "sd3")
    flags = ["--model", str(model), *files(folder, "t2i", "edit"), *SMALL, "--stage.output-dir", str(tmp_path / "b")]
    assert main(["pretrain", "stage-b", *flags]) == 0, capsys.readouterr().err
    seen = json.loads((tmp_path / "b" / "step-000002" / "meta.json").read_text())["data"][0]["tasks"]
    assert {task: state["batches"] for task, state in seen.items()} == {"t2i": 4, "edit": 4}
    policies = [load_backbone(path, SETTINGS) for path in (model, tmp_path / "b" / "policy")]
    states = [policy.transformer.state_dict() for policy in policies]
    assert states[0].keys() == states[1].keys()
    assert any(not torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_list_of_sets_with_different_columns_trains_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (folder / "t2i.jsonl").read_text().splitlines()]
    renamed = [{"words": row["prompt"], "drawn": row["image"]} for row in rows]
    (tmp_path / "renamed.json").write_text(json.dumps(renamed))
    sets = [
        {"files": [f"{folder}/t2i.jsonl"], "weight": 2},
        {"files": ["renamed.json"], "fields": {"text": "words", "target": "drawn"}, "image_root": str(folder)},
    ]
    (tmp_path / "mix.json").write_text(json.dumps({"sets": sets}))
    model = make_tiny_sd3(tmp_path / "sd3")
    arguments = ["--model", str(model), "--t2i", str(tmp_path / "mix.json"), "--edit", f"{folder}/edit.jsonl", *SMALL]
    output = tmp_path / "b"
    assert main(["pretrain", "stage-b", *arguments, "--stage.output-dir", str(output)]) == 0, capsys.readouterr().err
    data = json.loads((output / "step-000002" / "meta.json").read_text())["data"][0]
    assert data["identity"]["t2i"]["weights"] == [2.0, 1.0]
    problems = json.loads((output / "problems" / "t2i_problems.jsonl").read_text().splitlines()[0])
    assert problems["bad"] == 0
    capsys.readouterr()
    held_out = ["--held-out-t2i", f"{folder}/t2i.jsonl", "--stage.output-dir", str(tmp_path / "c")]
    assert main(["pretrain", "stage-b", *arguments, *held_out]) == 2
    assert "--held-out-t2i: expected files that are not trained on, got" in capsys.readouterr().err


@pytest.mark.parametrize(("letter", "start"), [("A", 16_000_000), ("B", 3_200_000), ("C", 3_200_000)])
def test_stages_balance_ratios_and_begin_with_half_of_the_steps_at_256(letter: Stage, start: int) -> None:
    """A step of stage B has 128 examples, and so 32 batches of 2 of each task."""
    options = published(letter)
    for task in options.stage.cycle:
        batches = options.task_batches(task)
        assert batches.balanced
        assert batches.resolution == ProgressiveResolution((256, 512), (0, start))
    assert replace(options, first_share=0.0).task_batches("t2i") == options.batches
    assert not options.backbone.offload_encoders


@pytest.mark.parametrize("letter", ["A", "B", "C"])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_published_steps_are_made_up_of_the_defaults_by_up_to_32_processes(
    letter: Stage, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(count))
    files = dict.fromkeys(PUBLISHED[letter].cycle, ("x.jsonl",))
    options = replace(published(letter), model=tmp_path, **files)
    check(replace(options, stage=replace(options.stage, output_dir=tmp_path / "new")), resume=False)
    assert options.backbone.gradient_checkpointing


@pytest.mark.parametrize(
    ("count", "flags", "said"),
    [
        (64, [], "got 2; --batches.batch-size 1 would do"),
        (8, ["--batches.batch-size", "16"], "got 16; --batches.batch-size 8 would do"),
        (
            8,
            [
                *("--batches.resolution.sizes", "512", "1024", "--batches.resolution.starts", "0", "9"),
                *("--batches.resolution.batch-sizes", "16", "3"),
            ],
            "--batches.resolution.batch-sizes: expected sizes that times cycle x processes = 2 x 8 = 16 divide "
            "--stage.global-batch-size 128, got 16 3; --batches.resolution.batch-sizes 8 2 would do",
        ),
        (3, [], "no batch size would do with 3 processes: start 2, or give --stage.global-batch-size 126"),
    ],
)
def test_what_does_not_add_up_names_the_size_of_a_batch_before_what_is_published(
    count: int, flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(count))
    arguments = ["--model", "m", "--t2i", "x", "--edit", "y", "--stage.output-dir", "/nowhere/new"]
    assert main(["pretrain", "stage-b", *arguments, *flags]) == 2
    assert said in capsys.readouterr().err


def test_tasks_that_come_more_often_change_their_resolution_at_the_same_step() -> None:
    stage = replace(PUBLISHED["B"], num_steps=100, global_batch_size=48, cycle=("edit", "t2i", "t2i"))
    own = BatchSettings(4, ProgressiveResolution((512, 1024), (0, 80), (4, 2)))
    options = StageOptions(stage=stage, batches=own, first_share=0.25)
    # 25 steps of 4 cycles; then the schedule's own, counted from there.
    assert options.task_batches("edit").resolution == ProgressiveResolution((256, 512, 1024), (0, 100, 180), (4, 4, 2))
    assert options.task_batches("t2i").resolution == ProgressiveResolution((256, 512, 1024), (0, 200, 280), (4, 4, 2))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of scenes, stage-a, stage-b, stage-c, got none"),
        (["stage-d"], "one of scenes, stage-a, stage-b, stage-c, got stage-d; type: pdtr pretrain stage-"),
        (["stage-b", "--t2i", "x", "--edit", "y"], "--model: expected a policy's folder to train, got none"),
        (["stage-b", "--model", "m", "--t2i", "x"], "--edit: expected files for stage B's cycle"),
        (["stage-b", "--generator", "g", "--lmm", "l"], "expected a --model in stage B, which has no connector"),
        (["stage-c", "--model", "m", "--generator", "g"], "expected either --model, or --generator and --lmm"),
        (["stage-c", "--lmm", "l"], "expected either --model, or --generator and --lmm, got --lmm"),
        (["stage-a", "--t2i", "x"], "--model: expected a policy's folder to train, or --generator and --lmm"),
        (["stage-a", "--model", "m", "--t2i", "x", "--held-out-edit", "y"], "--edit: expected no files, for stage A"),
        (
            ["stage-a", "--model", "m", "--t2i", "x", "--held-out-t2i", "x"],
            "--held-out-t2i: expected files that are not trained on, got x in both",
        ),
        (["stage-a", "--resume", "--model", "m", "--t2i", "x"], "expected a run to resume, found no checkpoint"),
        (["stage-a", "--stage.output-dir", __file__], "expected a folder, got a file"),
        (["stage-c", "--model", "m", "--connector", "c"], "expected a --generator with it"),
        (["stage-c", "--stage.stage", "B"], "expected C, which stage-c is, got B; type: pdtr pretrain stage-b"),
        (
            ["stage-b", "--model", "m", "--t2i", "x", "--edit", "y", "--batches.batch-size", "24"],
            "--batches.batch-size: expected sizes that times cycle x processes = 2 x 1 = 2 divide "
            "--stage.global-batch-size 128, got 24; --batches.batch-size 16 would do",
        ),
        (
            ["stage-b", "--batches.resolution.sizes", "256"],
            "--first-size: expected 32 or more and less than --batches.resolution.sizes, 256, got 256; --first-share 0",
        ),
        (["stage-b", "--first-share", "1"], "--first-share: expected a share of at least 0 and below 1, got 1.0"),
        (["stage-b", "--model", "/nowhere", "--t2i", "y", "--edit", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
