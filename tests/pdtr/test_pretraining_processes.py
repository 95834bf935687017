"""Stages of pre-training that several processes share: the weights of one, cut up or not, and on again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.scenes import ScenesPolicy
from agents.processes import Processes
from experiments.metaquery_phases import SETTINGS
from pdtr.pretraining_data import ScenesSource
from pdtr.pretraining_loop import LOG
from pdtr.pretraining_objective import trained_modules
from pdtr.pretraining_run import StageRun
from tests.pdtr.launched import launch
from tests.pdtr.stage_jobs import SIZES, StageJob, clip_job, main, make_base, run_job, save_metaquery, told

# Of all weights together after four steps; of each weight and of each of Adam's moments after the first.
RELATIVE, FIRST_WEIGHT, FIRST_MOMENT = 1e-5, 1e-5, 1e-3
RESUMED_AT = 2
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the embedded world and a MetaQuery policy on it."""
    root = tmp_path_factory.mktemp("stages")
    make_base().save(root / "B")
    save_metaquery(root / "B", root / "C")
    return root


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Path]:
    jobs = [StageJob(folder / "one" / stage, stage, folder / stage) for stage in ("B", "C")]
    for job in jobs:
        run_job(job)
    return {job.stage: job.folder for job in jobs}


@pytest.fixture(scope="module")
def shared(folder: Path) -> dict[str, Path]:
    """By two processes, with and without sharding; then the last two steps of one of them once more."""
    jobs = {
        f"{stage} {sharding}": StageJob(folder / "two" / f"{stage}-{sharding}", stage, folder / stage, sharding)
        for stage in ("B", "C")
        for sharding in ("none", "fsdp2")
    }
    launch(main, told(list(jobs.values())), 2)
    again = []
    for name in ("B none", "C fsdp2"):
        parts = replace(jobs[name], folder=folder / "again" / name.replace(" ", "-"), resume=True)
        shutil.copytree(jobs[name].folder, parts.folder)
        for step in (3, 4):
            shutil.rmtree(parts.folder / f"step-{step:06d}")
        shutil.rmtree(parts.folder / "policy")
        again.append(parts)
        jobs[f"{name} again"] = parts
    launch(main, told(again), 2)
    return {name: job.folder for name, job in jobs.items()}


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / f"step-{step:06d}" / "tensors.safetensors")


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
@pytest.mark.parametrize("stage", ["B", "C"])
def test_two_processes_end_with_the_weights_of_one(
    stage: str, sharding: str, alone: dict[str, Path], shared: dict[str, Path]
) -> None:
    one, two = alone[stage], shared[f"{stage} {sharding}"]
    first, other = tensors(one, 1), tensors(two, 1)
    assert first.keys() == other.keys()
    for name, tensor in first.items():
        if name.startswith("optimizer"):
            # Adam's step does not tell how large a gradient is; its moments do.
            # A key's bias has a gradient of nothing but rounding.
            assert (other[name] - tensor).abs().max() <= max(FIRST_MOMENT * tensor.abs().max(), 1e-10)
        else:
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=FIRST_WEIGHT)
    last, end = tensors(one, 4), tensors(two, 4)
    names = [name for name in last if not name.startswith("optimizer")]
    flat = [torch.cat([part[name].flatten() for name in names]) for part in (first, last, end)]
    moved = (flat[1] - flat[0]).norm() / flat[1].norm()
    relative = (flat[2] - flat[1]).norm() / flat[1].norm()
    assert relative < RELATIVE < moved / 10
    rows = [[json.loads(line) for line in (run / LOG).read_text().splitlines()] for run in (one, two)]
    for row, same in zip(*rows, strict=True):
        assert row["step"] == same["step"]
        for kind in ("loss", "held_out"):
            assert row[kind] == pytest.approx(same[kind], rel=1e-4)


@pytest.mark.parametrize("name", ["B none", "C fsdp2"])
def test_two_processes_go_on_to_the_same_bits(name: str, shared: dict[str, Path]) -> None:
    whole, parts = tensors(shared[name], 4), tensors(shared[f"{name} again"], 4)
    assert all(torch.equal(whole[key], parts[key]) for key in whole | parts)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
@pytest.mark.parametrize("stage", ["B", "C"])
def test_the_policy_is_saved_whole(stage: str, sharding: str, shared: dict[str, Path]) -> None:
    run = shared[f"{stage} {sharding}"]
    saved = ScenesPolicy.load(run / "policy") if stage == "B" else MetaQueryPolicy.load(run / "policy", SETTINGS)
    trained = tensors(run, 4)
    modules = trained_modules(saved, "B" if stage == "B" else "C")
    for module, network in modules.items():
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, trained[f"{module}.{name}"])


def test_clipping_sees_the_norm_of_whole_and_cut_gradients_together(folder: Path) -> None:
    launch(clip_job, str(folder / "clipped"), 2)
    for rank in range(2):
        found = load_file(folder / f"clipped-{rank}.safetensors")
        whole, cut = torch.full((3,), 2.0), torch.full((4, 2), 3.0)
        norm = torch.cat([whole.flatten(), cut.flatten()]).norm()
        torch.testing.assert_close(found["norm"], norm)
        torch.testing.assert_close(found["whole"], whole / norm * 0.5)
        torch.testing.assert_close(found["cut"], cut / norm * 0.5)


def test_another_number_of_processes_is_refused(folder: Path, shared: dict[str, Path]) -> None:
    job = StageJob(folder / "refused", "B", folder / "B", resume=True)
    shutil.copytree(shared["B none"], job.folder)
    with pytest.raises(ValueError, match="expected the places in the data of 1 processes, got those of 2"):
        run_job(job)


def test_muon_and_weights_that_are_cut_up_are_refused(folder: Path) -> None:
    config = replace(StageJob(folder / "x", "B", folder / "B").config, muon_learning_rate=1e-3)
    with pytest.raises(ValueError, match="Muon needs whole matrices"):
        StageRun(config, make_base(), ScenesSource(SIZES), processes=Processes(0, 2, is_sharded=True))
