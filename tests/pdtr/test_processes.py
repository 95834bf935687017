"""A run that several processes share: the weights of one, one line for a mistake, and on again after a kill."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.processes import Processes
from experiments.benchmarks.world_size_runs import (
    ITERATIONS,
    Job,
    begun,
    difference,
    do_jobs,
    environment,
    kill_one,
    last_checkpoint,
    make_config,
)
from experiments.flags import Usage, parse_run
from experiments.recipes import find_recipe
from pdtr.config import TrainConfig
from pdtr.curriculum import SingleTask
from pdtr.launch import train
from pdtr.processes import ProcessLost, ProcessSettings, check_shares, launcher, losses_explained

KINDS = [(algorithm, weights) for algorithm in ("flow_grpo", "diffusion_nft") for weights in ("full", "lora")]
# What the bound is made of: see docs/processes.md.
RELATIVE, MOMENTS = 1e-5, 1e-3
STOP = 2
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[tuple[str, str], Path]:
    """One run of each kind in this process."""
    jobs = {kind: Job(folder / "alone" / "-".join(kind), *kind) for kind in KINDS}
    for job in jobs.values():
        train(make_config(job))
    return {kind: job.folder for kind, job in jobs.items()}


@pytest.fixture(scope="module")
def shared(folder: Path, alone: dict[tuple[str, str], Path]) -> dict[str, Path]:
    """The same by two processes, with and without sharding, and one run of one process that two go on with."""
    jobs = {"-".join(kind): Job(folder / "two" / "-".join(kind), *kind) for kind in KINDS}
    for kind in (("flow_grpo", "full"), ("diffusion_nft", "full"), ("diffusion_nft", "lora")):
        name = "-".join((*kind, "fsdp2"))
        jobs[name] = Job(folder / "two" / name, *kind, sharding="fsdp2")
    kind = ("diffusion_nft", "full")
    jobs["1 -> 2"] = begun(Job(folder / "two" / "more", *kind), alone[kind], STOP)
    jobs["1 -> 2 fsdp2"] = begun(Job(folder / "two" / "more-fsdp2", *kind, sharding="fsdp2"), alone[kind], STOP)
    do_jobs(list(jobs.values()), 2)
    return {name: job.folder for name, job in jobs.items()}


def assert_same_run(whole: Path, other: Path) -> None:
    """Weights and moments to rounding, and all that was decided and logged."""
    found = difference(whole, other)
    assert found.moved > 1e-3
    assert found.relative < RELATIVE
    assert found.moments < MOMENTS
    metas = [json.loads((run / f"checkpoints/step-{ITERATIONS:06d}/meta.json").read_text()) for run in (whole, other)]
    for key in ("iteration", "num_updates", "stage_name", "curriculum", "missing"):
        assert metas[0][key] == metas[1][key]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        pairs = list(zip(rows(whole / name), rows(other / name), strict=True))
        for row, same in pairs:
            assert row.keys() == same.keys()
            assert [row.get(key) for key in ("stage_name", "tasks", "label", "count")] == [
                same.get(key) for key in ("stage_name", "tasks", "label", "count")
            ]
            for key in (key for key in row if key.startswith(("reward/", "missing_ratio/", "grad_norm"))):
                assert row[key] == pytest.approx(same[key], rel=1e-3, abs=1e-5)
    for name in ("report.html", "before_after.png", "policy/model.safetensors", "evaluations/prompts-edit.json"):
        assert (other / name).is_file()


@pytest.mark.parametrize("kind", KINDS, ids=map("-".join, KINDS))
def test_two_processes_end_with_the_weights_of_one(
    alone: dict[tuple[str, str], Path], shared: dict[str, Path], kind: tuple[str, str]
) -> None:
    assert_same_run(alone[kind], shared["-".join(kind)])


@pytest.mark.parametrize("kind", [("flow_grpo", "full"), ("diffusion_nft", "full"), ("diffusion_nft", "lora")])
def test_sharded_weights_are_those_of_one_process(
    alone: dict[tuple[str, str], Path], shared: dict[str, Path], kind: tuple[str, str]
) -> None:
    assert_same_run(alone[kind], shared["-".join((*kind, "fsdp2"))])


def test_four_processes_end_with_the_weights_of_one(folder: Path, alone: dict[tuple[str, str], Path]) -> None:
    kind = ("diffusion_nft", "lora")
    job = Job(folder / "four", *kind)
    do_jobs([job], 4)
    assert_same_run(alone[kind], job.folder)


@pytest.mark.parametrize("name", ["1 -> 2", "1 -> 2 fsdp2"])
def test_two_processes_go_on_with_the_run_of_one(
    alone: dict[tuple[str, str], Path], shared: dict[str, Path], name: str
) -> None:
    assert_same_run(alone["diffusion_nft", "full"], shared[name])


@pytest.mark.parametrize("name", ["flow_grpo-full", "diffusion_nft-full-fsdp2"])
def test_one_process_goes_on_with_the_run_of_two(folder: Path, shared: dict[str, Path], name: str) -> None:
    job = begun(Job(folder / f"fewer-{name}", *name.split("-")[:2]), shared[name], STOP)
    train(make_config(job), resume=True)
    assert_same_run(shared[name], job.folder)


def test_a_process_that_is_killed_stops_the_others_and_the_run_goes_on(folder: Path, shared: dict[str, Path]) -> None:
    job = Job(folder / "killed", "flow_grpo", "full")
    started = time.monotonic()
    said = kill_one(job, 2, STOP)
    assert time.monotonic() - started < 60
    lines = [line for line in said.splitlines() if "expected all 2 processes to go on" in line]
    assert len(lines) == 1
    assert "--resume" in lines[0]
    assert "SIGKILL" in said
    do_jobs([replace(job, resume=True)], 2)
    # As many processes: to the bit.
    whole, resumed = last_checkpoint(shared["flow_grpo-full"]), last_checkpoint(job.folder)
    assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())


FLAGS = ["--num-prompts", "4", "--group-size", "2", "--chunk-size", "2", "--evaluation.num-prompts", "2"]
FLAGS += ["--evaluation.num-final-prompts", "2", "--evaluation.num-grid", "0", "--processes.timeout", "60"]


def start(launch: list[str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launch, *arguments],
        env={**environment(), "PDTR_TRACEBACK": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    run = start([*TORCHRUN, "-m", "pdtr"], "train", "smoke", "--output-dir", str(tmp_path / "run"))
    out, said = run.communicate(timeout=120)
    assert run.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("pdtr: ")]
    assert (
        "2 processes: expected the iteration's chunks to be a multiple of num_minibatches x processes = 2 x 2" in line
    )
    assert "--chunk-size 6 or --num-prompts 8 would do" in line
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_ctrl_c_is_answered_once_with_the_way_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = start([*TORCHRUN, "-m", "experiments.cli"], "train", "smoke", "--output-dir", str(folder), *FLAGS)
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=120)
    (line,) = [line for line in said.splitlines() if line.startswith("pdtr: ")]
    way = line.partition("go on with: ")[2]
    assert way == shlex.join(
        [
            "torchrun",
            "--nproc-per-node",
            "2",
            "-m",
            "pdtr",
            "train",
            "smoke",
            "--output-dir",
            str(folder),
            *FLAGS,
            "--resume",
        ]
    )
    # By accelerate's launcher, and in one process.
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "pdtr"]
    again = start(accelerate, *shlex.split(way)[5:])
    out, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert out.count("report: ") == 1
    assert len(rows(folder / "metrics.jsonl")) == 4


def test_only_training_is_shared(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pdtr", "pretrain", "scenes", "--output-dir", str(tmp_path / "base")],
        env={**environment(), "WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("pdtr: pretrain: expected one process, got 2;")


def sizes(num_minibatches: int, **changes: Any) -> TrainConfig:
    config = make_config(Job(Path("run")))
    return replace(config, learner=replace(config.learner, num_minibatches=num_minibatches), **changes)


@pytest.mark.parametrize(
    ("config", "count", "fixes"),
    [
        (sizes(1), 16, "--chunk-size 2 or --num-prompts 16 would do"),
        (sizes(2), 8, "--chunk-size 2 or --num-prompts 16 would do"),
        (sizes(2, num_prompts=9, curriculum=SingleTask("t2i", 1)), 4, "got 9; --num-prompts 8 would do"),
    ],
)
def test_chunks_that_do_not_divide_are_refused_with_what_would(config: TrainConfig, count: int, fixes: str) -> None:
    num_chunks = config.num_prompts * config.group_size // config.chunk_size
    with pytest.raises(ValueError, match=re.escape(fixes)):
        check_shares(num_chunks, config, Processes(0, count))
    check_shares(num_chunks, config, Processes())


def test_every_launch_of_the_docs_divides() -> None:
    text = (Path(__file__).parents[2] / "docs/processes.md").read_text()
    launches = re.findall(
        r"^(torchrun|accelerate launch) (.*?) -m (?:pdtr|experiments\.cli) train (\w+)(.*)$", text, re.M
    )
    assert len(launches) >= 5
    for _, options, recipe, flags in launches:
        numbers = dict(re.findall(r"--(nnodes|nproc-per-node|num_processes) (\d+)", options))
        count = int(numbers.get("nnodes", 1)) * int(numbers.get("nproc-per-node", numbers.get("num_processes")))
        config, _ = parse_run(find_recipe(recipe)(), Usage("pdtr train"), shlex.split(flags))
        check_shares(config.num_prompts * config.group_size // config.chunk_size, config, Processes(0, count))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"sharding: expected one of \['none', 'fsdp2'\], got 'fsdp'"):
        ProcessSettings("fsdp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout: expected more than 0 seconds, got 0"):
        ProcessSettings(timeout=0)


def test_only_a_lost_process_is_explained() -> None:
    gone = "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
    with (
        pytest.raises(ProcessLost, match="expected all 2 processes to go on"),
        losses_explained(Processes(0, 2), ProcessSettings()),
    ):
        raise RuntimeError(gone)
    with pytest.raises(RuntimeError, match="shapes"), losses_explained(Processes(0, 2), ProcessSettings()):
        raise RuntimeError("shapes differ")


def test_the_launcher_is_named_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher() == ["pdtr"]
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert launcher() == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8", "-m", "pdtr"]
