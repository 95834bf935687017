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
from agents.policies.tiny.sd3 import make_tiny_sd3
from agents.processes import Processes
from experiments.metaquery_phases import SETTINGS
from pdtr.pretraining_data import ScenesSource
from pdtr.pretraining_loop import LOG
from pdtr.pretraining_objective import trained_modules
from pdtr.pretraining_run import StageRun
from pdtr.pretraining_stages import Stage
from pdtr.processes import Sharding
from tests.envs.record_files import png, write_rows
from tests.pdtr.launched import launch
from tests.pdtr.stage_jobs import SIZES, StageJob, clip_job, counted_job, main, make_base, run_job, save_metaquery, told
from tests.pdtr.sums import sums

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
    for name in ("B none", "C fsdp2"):
        jobs[f"{name} again"] = stopped(jobs[name], folder / "again" / name.replace(" ", "-"))
    launch(main, told([job for job in jobs.values() if job.resume]), 2)
    return {name: job.folder for name, job in jobs.items()}


@pytest.fixture(scope="module")
def records(folder: Path) -> Path:
    """Pictures of two shapes, more than a run sees, and a tiny SD3."""
    make_tiny_sd3(folder / "sd3")
    pictures = [(png(n, *shape), png(n + 300, *shape)) for n in range(60) for shape in [((64, 64), (96, 54))[n % 2]]]
    write_rows(folder / "t2i.jsonl", [{"prompt": f"a red {n}", "image": one} for n, (one, _) in enumerate(pictures)])
    edits = [
        {"instruction": f"make {n} blue", "input_image": one, "output_image": other}
        for n, (one, other) in enumerate(pictures)
    ]
    write_rows(folder / "edit.jsonl", edits)
    return folder


def stopped(job: StageJob, into: Path) -> StageJob:
    """A copy of a run as it was after ``RESUMED_AT`` steps, to be gone on with."""
    shutil.copytree(job.folder, into)
    for step in range(RESUMED_AT + 1, 5):
        shutil.rmtree(into / f"step-{step:06d}")
    shutil.rmtree(into / "policy")
    return replace(job, folder=into, resume=True)


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


def test_gradients_of_cut_weights_may_be_summed_once_a_step(folder: Path, shared: dict[str, Path]) -> None:
    """Two batches a process and step, two blocks and the rest: half as many sums to the same weights."""
    job = StageJob(folder / "often", "B", folder / "B", "fsdp2")
    jobs = {24: job, 12: replace(job, folder=folder / "once", sum_gradients_once=True)}
    for count, counted in jobs.items():
        launch(counted_job, told([counted])[0], 2)
        assert sums(counted.folder) == [count, count]
        assert distance(shared["B fsdp2"], counted.folder) < RELATIVE


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


def distance(run: Path, other: Path) -> float:
    """Of all weights together at the end, relative to their size."""
    ends = [tensors(path, 4) for path in (run, other)]
    names = [name for name in ends[0] if not name.startswith("optimizer")]
    flat = [torch.cat([end[name].flatten() for name in names]) for end in ends]
    return float((flat[1] - flat[0]).norm() / flat[0].norm())


@pytest.mark.parametrize(("stage", "sharding"), [("B", "none"), ("C", "fsdp2")])
def test_another_number_of_processes_goes_on_to_the_same_weights(
    stage: Stage, sharding: Sharding, folder: Path, alone: dict[str, Path], shared: dict[str, Path]
) -> None:
    """The embedded world's batches are numbered, so they are the same ones."""
    name = f"{stage}-{sharding}"
    one = StageJob(alone[stage], stage, folder / stage)
    two = StageJob(shared[f"{stage} {sharding}"], stage, folder / stage, sharding)
    more = replace(stopped(one, folder / "more" / name), sharding=sharding)
    launch(main, told([more]), 2)
    fewer = replace(stopped(two, folder / "fewer" / name), sharding="none")
    run_job(fewer)
    assert distance(alone[stage], more.folder) < RELATIVE
    assert distance(two.folder, fewer.folder) < RELATIVE


def texts(folder: Path, count: int, steps: range) -> list[str]:
    """What all of ``count`` processes had in some steps."""
    found = [json.loads((folder / f"texts-{count}-{rank}.json").read_text()) for rank in range(count)]
    return [text for had in found for step in steps for text in had[str(step)]]


def test_another_number_of_processes_goes_on_with_the_rows_that_are_left_of_files(records: Path) -> None:
    base = StageJob(records / "files" / "one", "B", records / "sd3", records=records)
    one, two = base, replace(base, folder=records / "files" / "two")
    run_job(one)
    launch(main, told([two]), 2)
    more, fewer = stopped(one, records / "files" / "more"), stopped(two, records / "files" / "fewer")
    launch(main, told([more]), 2)
    run_job(fewer)
    before, after = range(RESUMED_AT), range(RESUMED_AT, 4)
    for job, count, now in ((more, 1, 2), (fewer, 2, 1)):
        had = [*texts(job.folder, count, before), *texts(job.folder, now, after)]
        assert len(had) == 4 * job.config.global_batch_size
        assert len(set(had)) == len(had)
        assert tensors(job.folder, 4).keys() == tensors(one.folder, 4).keys()
        assert not torch.equal(*(tensors(job.folder, step)["transformer.proj_out.weight"] for step in (2, 4)))


def test_muon_and_weights_that_are_cut_up_are_refused(folder: Path) -> None:
    config = replace(StageJob(folder / "x", "B", folder / "B").config, muon_learning_rate=1e-3)
    with pytest.raises(ValueError, match="Muon needs whole matrices"):
        StageRun(config, make_base(), ScenesSource(SIZES), processes=Processes(0, 2, is_sharded=True))
