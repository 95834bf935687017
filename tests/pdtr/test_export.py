"""The policy of a checkpoint and of a stage's end: the one that a run of so many iterations would have ended with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from agents.policies.scenes import ScenesPolicy
from agents.policies.tiny.sd3 import make_tiny_sd3
from agents.policies.weights import LoraSettings
from agents.samplers import ODE
from experiments.cli import main
from pdtr.checkpoint import CheckpointError, checkpoints, load_state
from pdtr.config import TrainConfig
from pdtr.curriculum import Staged
from pdtr.evaluate import evaluate
from pdtr.export import Kept, choose, export_policy, kept
from pdtr.launch import run
from pdtr.logbook import read_evaluations, read_scores
from pdtr.sampling import evaluation_sampler, load_policy, policy_folder
from pdtr.stage_ends import StageEnd, drop_stage_ends, folder_part, save_stage_end, stage_ends
from pdtr.stages import Stage
from tests.pdtr.test_trainer import make_config, make_tasks

EDIT, T2I = Stage("edit", {"edit": 1}, 2), Stage("t2i", {"t2i": 1}, 2)
CHUNK = 4
KINDS = [(kind, averaged) for kind in ("full", "lora") for averaged in (True, False)]
Complain = Callable[..., str]


def config_of(folder: Path, kind: str = "full", *stages: Stage, **changes: Any) -> TrainConfig:
    config = make_config(folder, Staged(stages or (EDIT, T2I)), learning_rate=1e-2, checkpoint_every=1)
    evaluation = replace(config.evaluation, num_grid=CHUNK, sampler=ODE(2, 1.5, shift=2.0))
    lora = LoraSettings(2, 4) if kind == "lora" else None
    return replace(config, **{"lora": lora, "evaluation": evaluation, "keep_checkpoints": 2, **changes})


def averaged(config: TrainConfig, is_averaged: bool) -> TrainConfig:
    return config if is_averaged else replace(config, learner=replace(config.learner, ema_decay=0.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture
def runs(folder: Path, tiny_policy: ScenesPolicy) -> dict[tuple[str, bool], Path]:
    """One run of both stages of each kind, made once."""
    found = {}
    for kind, is_averaged in KINDS:
        root = folder / f"{kind}-{is_averaged}"
        if not root.exists():
            tiny_policy.save(root / "base")
            run(averaged(config_of(root, kind), is_averaged), make_tasks())
        found[kind, is_averaged] = root / "run"
    return found


@pytest.fixture
def whole(runs: dict[tuple[str, bool], Path]) -> Path:
    return runs["full", True]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("kind", "is_averaged"), KINDS)
def test_a_stages_policy_is_the_one_that_the_run_measured_at_its_end(
    runs: dict[tuple[str, bool], Path], kind: str, is_averaged: bool, tmp_path: Path
) -> None:
    folder = runs[kind, is_averaged]
    for stage, iteration in (("edit", 2), ("t2i", 4)):
        exported = export_policy(folder, stage=stage, output_dir=tmp_path / stage)
        policy, sampler = load_policy(policy_folder(exported)), evaluation_sampler(exported)
        assert sampler == evaluation_sampler(exported / "policy") == ODE(2, 1.5, shift=2.0)
        for name, task in make_tasks().items():
            row = next(r for r in read_evaluations(folder) if (r["task"], r["label"]) == (name, f"after {stage}"))
            assert row["iteration"] == iteration
            with torch.no_grad():
                found = evaluate(policy, task.make_envs(CHUNK), task.final, sampler)
            strip = np.asarray(Image.open((folder / row["file"]).with_suffix(".png")))
            drawn = np.concatenate(list(found.images), axis=1)
            logged = read_scores(folder, row)
            if kind == "full":
                assert np.array_equal(drawn, strip)
                assert np.array_equal(found.reward, np.asarray(logged["reward"], np.float32))
            else:
                # Adapters are merged, which rounds another sum.
                assert np.abs(drawn.astype(int) - strip).max() <= 1
                np.testing.assert_allclose(found.reward, logged["reward"], atol=1e-3)
    # What is compared is not always the same.
    assert files(tmp_path / "edit/policy") != files(tmp_path / "t2i/policy")


@pytest.mark.parametrize(("kind", "is_averaged"), KINDS)
def test_a_stages_policy_is_to_the_bit_the_one_of_a_run_that_ends_there(
    runs: dict[tuple[str, bool], Path], kind: str, is_averaged: bool, tmp_path: Path
) -> None:
    folder = runs[kind, is_averaged]
    shutil.copytree(folder.parent / "base", tmp_path / "base")
    first = averaged(config_of(tmp_path, kind, EDIT), is_averaged)
    run(first, make_tasks())
    ended = {"edit": first.output_dir, "t2i": folder}
    for stage, other in ended.items():
        exported = export_policy(folder, stage=stage, output_dir=tmp_path / stage)
        assert files(exported / "policy") == files(other / "policy")
    assert files(ended["edit"] / "policy") != files(ended["t2i"] / "policy")


def test_a_stages_end_takes_one_version_of_the_weights(runs: dict[tuple[str, bool], Path]) -> None:
    for (kind, is_averaged), folder in runs.items():
        version = "ema" if is_averaged else "current"
        for end in stage_ends(folder / "checkpoints"):
            tensors, meta = load_state(end.folder)
            assert {name.split(".")[1] for name in tensors} == {version}
            assert all(("lora_" in name) == (kind == "lora") for name in tensors)
            assert (meta["iteration"], meta["stage_name"], meta["version"]) == (end.iteration, end.stage, version)
        # They stay, where checkpoints go.
        assert [entry[:2] for entry in kept(folder)] == [(2, "edit"), (3, ""), (4, ""), (4, "t2i")]


def test_a_policy_of_any_step_and_of_a_run_that_goes_on(whole: Path, tmp_path: Path) -> None:
    going_on = tmp_path / "run"
    shutil.copytree(whole, going_on, ignore=shutil.ignore_patterns("policy", "stage-000004-t2i", "step-000004"))
    with pytest.raises(ValueError, match=rf"finish it with --resume, or .*: pdtr export {going_on}"):
        policy_folder(going_on)
    before = files(going_on)
    exported = export_policy(going_on)
    assert exported == going_on / "exports" / "step-000003"
    assert {name: content for name, content in files(going_on).items() if not name.startswith("exports")} == before
    policy = load_policy(policy_folder(exported))
    prefix = "weights.ema."
    state = load_state(going_on / "checkpoints" / "step-000003", prefix).tensors
    own = policy.transformer.state_dict()
    assert all(torch.equal(own[name.removeprefix(prefix)], tensor) for name, tensor in state.items())
    assert json.loads((exported / "config.json").read_text())["exported"]["iteration"] == 3
    assert export_policy(going_on, step=2, output_dir=tmp_path / "deep/two") == tmp_path / "deep/two"


def test_a_resumed_run_keeps_no_stage_that_it_has_not_come_to(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    tiny_policy.save(tmp_path / "base")
    config = config_of(tmp_path, "full", keep_checkpoints=9)
    run(config, make_tasks())
    folder = config.output_dir / "checkpoints"
    names = [end.folder.name for end in stage_ends(folder)]
    saved = {end.folder.name: files(end.folder) for end in stage_ends(folder)}
    for path in checkpoints(folder)[1:]:
        shutil.rmtree(path)
    shutil.copytree(folder / names[0], folder / "stage-000003-other")
    run(config, make_tasks(), resume=True)
    assert {end.folder.name: files(end.folder) for end in stage_ends(folder)} == saved
    assert names == ["stage-000002-edit", "stage-000004-t2i"]


def test_a_published_models_adapters_come_with_it(tmp_path: Path) -> None:
    from agents.policies.backbone import BackboneSettings

    base = make_tiny_sd3(tmp_path / "sd3")
    settings = BackboneSettings(64, 64, dtype="float32", negative_prompt="dull")
    tasks = {name: replace(task, image_size=(64, 64)) for name, task in make_tasks().items() if name == "t2i"}
    config = config_of(tmp_path, "lora", T2I, base=base, backbone=settings)
    run(config, tasks)
    exported = export_policy(config.output_dir, stage="t2i")
    found, expected = (
        {name: content for name, content in files(folder).items() if name.endswith((".safetensors", "_settings.json"))}
        for folder in (exported, config.output_dir)
    )
    expected = {name: content for name, content in expected.items() if name.startswith(("policy/", "lora/"))}
    assert found == expected
    assert {"lora/pytorch_lora_weights.safetensors", "policy/pdtr_settings.json"} <= set(found)


# The command


def test_what_is_exported_loads_everywhere(whole: Path, tmp_path: Path, capsys: Any) -> None:
    exported = tmp_path / "exported"
    assert main(["export", str(whole), "--stage", "edit", "--output-dir", str(exported)]) == 0
    assert capsys.readouterr().out == f"policy: {exported / 'policy'}\n"
    for path in (exported, exported / "policy"):
        picture = tmp_path / "grid.png"
        assert main(["sample", "a red circle", "--policy", str(path), "--output", str(picture)]) == 0
        assert picture.is_file()
        flags = ["--num-prompts", "1", "--task", "t2i", "--num-threads", "1"]
        assert main(["eval", str(path), *flags]) == 0
        assert "2 steps, guidance 1.5, shift 2" in capsys.readouterr().out
    further = config_of(tmp_path, "full", T2I, base=exported, output_dir=tmp_path / "further")
    run(further, make_tasks())
    (row,) = (r for r in read_evaluations(further.output_dir) if (r["task"], r["label"]) == ("t2i", "base"))
    (end,) = (r for r in read_evaluations(whole) if (r["task"], r["label"]) == ("t2i", "after edit"))
    assert str(read_scores(further.output_dir, row)) == str(read_scores(whole, end))


@pytest.fixture
def complain(capsys: pytest.CaptureFixture[str]) -> Complain:
    def ask(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    return ask


def test_what_there_is_not_is_answered_with_what_there_is(whole: Path, tmp_path: Path, complain: Complain) -> None:
    there_is = "expected one of --step 3 4, --stage edit (iteration 2), --stage t2i (iteration 4), got"
    assert f"{there_is} --step 1;" in complain(whole, "--step", 1)
    assert f"{there_is} --stage edits;" in complain(whole, "--stage", "edits")
    assert "expected --step or --stage, got both" in complain(whole, "--step", 3, "--stage", "edit")
    assert f"{tmp_path}: expected the folder of a run of pdtr train" in complain(tmp_path)
    assert "expected a new folder, got one that is there" in complain(whole, "--output-dir", tmp_path)
    shutil.copy(whole / "config.json", tmp_path)
    assert f"{tmp_path}: expected a run that has kept weights, got one without" in complain(tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"base": null}}')
    assert "config.json: expected the configuration of a run of pdtr train" in complain(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_damaged_weights_and_another_base_are_named(whole: Path, tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    shutil.copytree(whole, tmp_path / "run")
    end = tmp_path / "run/checkpoints/stage-000002-edit"
    (end / "tensors.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"truncated or was changed.*; take another one: --step 3 4, --stage t2i"):
        export_policy(tmp_path / "run", stage="edit")
    content = json.loads((whole / "config.json").read_text())
    for base, said in (
        (tmp_path / "away", r"base of .*: .*away: expected the folder of a run or of a policy"),
        (tmp_path / "other", r"expected the weights of the run's base .*other, got those of another model"),
    ):
        content["config"]["base"] = str(base)
        (tmp_path / "run/config.json").write_text(json.dumps(content))
        ScenesPolicy(replace(tiny_policy.config, width=64)).save(tmp_path / "other")
        with pytest.raises(ValueError, match=said):
            export_policy(tmp_path / "run", stage="t2i")
    assert not (tmp_path / "run/exports").exists()


def test_of_several_ends_of_one_stage_the_last_is_taken(tmp_path: Path) -> None:
    found = [Kept(2, "edit", Path("a")), Kept(4, "", Path("b")), Kept(4, "t2i", Path("c")), Kept(6, "edit", Path("d"))]
    assert choose(found, None, "edit", tmp_path) == found[3]
    assert choose(found, 4, None, tmp_path) == found[2]
    assert choose(found, None, None, tmp_path) == found[3]


@pytest.mark.parametrize("name", ["a/b: c", "../up", "写真", "x" * 500])
def test_a_stage_of_any_name_has_a_folder(name: str, tmp_path: Path) -> None:
    folder = save_stage_end(tmp_path / "checkpoints", {"weights.ema.a": torch.ones(2)}, 7, name, "ema")
    assert folder.parent == tmp_path / "checkpoints"
    (end,) = stage_ends(folder.parent)
    assert end == StageEnd(folder, 7, folder_part(name))
    assert choose([Kept(7, end.stage, folder)], None, name, tmp_path).folder == folder
    drop_stage_ends(folder.parent, 7)
    assert folder.exists()
    drop_stage_ends(folder.parent, 6)
    assert stage_ends(folder.parent) == stage_ends(tmp_path / "nowhere") == []
