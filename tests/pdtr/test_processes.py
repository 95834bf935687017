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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agents.processes import Processes
from experiments.benchmarks.world_size_runs import (
    ITERATIONS,
    Job,
    begun,
    checkpoint_tensors,
    difference,
    environment,
    main,
    make_config,
    told,
)
from experiments.flags import Usage, parse_run
from experiments.pretrain_checks import check
from experiments.pretrain_stage import STAGES, published
from experiments.recipes import find_recipe
from pdtr.config import TrainConfig
from pdtr.curriculum import SingleTask
from pdtr.launch import run
from pdtr.processes import ProcessLost, ProcessSettings, check_shares, launcher, losses_explained
from tests.pdtr.launched import launch
from tests.pdtr.sums import counted_run, sums

KINDS = [(algorithm, weights) for algorithm in ("flow_grpo", "diffusion_nft") for weights in ("full", "lora")]
FULL, LORA = ("diffusion_nft", "full"), ("diffusion_nft", "lora")
# Of all weights together at the end; of each, and of the moments, after an iteration. See docs/processes.md.
RELATIVE, FIRST_WEIGHT, FIRST_MOMENT = 1e-5, 1e-5, 1e-3
STOP = 2
DEADLINE = 180.0
# A fixture does eight runs: more than the usual limit on a machine that is busy.
pytestmark = pytest.mark.timeout(900)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Without a GPU too: the flag chooses how processes are started, and ours find their device by themselves.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", "0", "-m", "pdtr"]


def do_jobs(jobs: Sequence[Job], num_processes: int) -> None:
    launch(main, [told(jobs)], num_processes)


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
        run(make_config(job))
    return {kind: job.folder for kind, job in jobs.items()}


@pytest.fixture(scope="module")
def shared(folder: Path, alone: dict[tuple[str, str], Path]) -> dict[str, Path]:
    """The same by two processes, with and without sharding, and one run of one process that two go on with."""
    jobs = {"-".join(kind): Job(folder / "two" / "-".join(kind), *kind) for kind in KINDS}
    jobs |= {
        f"{kind[1]} fsdp2": Job(folder / "two" / f"{kind[1]}-fsdp2", *kind, sharding="fsdp2") for kind in (FULL, LORA)
    }
    more = Job(folder / "two" / "more", *FULL)
    jobs["1 -> 2"] = begun(more, alone[FULL], STOP)
    cut = replace(more, folder=folder / "two" / "more-fsdp2", sharding="fsdp2")
    jobs["1 -> 2 fsdp2"] = begun(cut, alone[FULL], STOP)
    do_jobs(list(jobs.values()), 2)
    return {name: job.folder for name, job in jobs.items()}


def assert_same_run(whole: Path, other: Path) -> None:
    """Weights and moments to rounding, and all that was decided and logged."""
    found, first = difference(whole, other), difference(whole, other, iteration=1)
    assert found.relative < RELATIVE < found.moved / 10
    assert first.max_abs < FIRST_WEIGHT
    assert first.moments < FIRST_MOMENT
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
    stage_ends = [sorted((run / "checkpoints").glob("stage-*/tensors.safetensors")) for run in (whole, other)]
    assert [path.parent.name for path in stage_ends[0]] == [path.parent.name for path in stage_ends[1]]
    assert len(stage_ends[0]) == 2
    ends = zip(*stage_ends, strict=True)
    for paths in [*ends, [folder / "policy/model.safetensors" for folder in (whole, other)]]:
        tensors = [load_file(path) for path in paths]
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][name], tensor, rtol=0, atol=4e-4)
    assert {path.name for path in (whole / "evaluations").iterdir()} == {
        path.name for path in (other / "evaluations").iterdir()
    }


@pytest.mark.parametrize("kind", KINDS, ids=map("-".join, KINDS))
def test_two_processes_end_with_the_weights_of_one(
    alone: dict[tuple[str, str], Path], shared: dict[str, Path], kind: tuple[str, str]
) -> None:
    assert_same_run(alone[kind], shared["-".join(kind)])


@pytest.mark.parametrize("kind", [FULL, LORA], ids=map("-".join, [FULL, LORA]))
def test_sharded_weights_are_those_of_one_process(
    alone: dict[tuple[str, str], Path], shared: dict[str, Path], kind: tuple[str, str]
) -> None:
    assert_same_run(alone[kind], shared[f"{kind[1]} fsdp2"])


def test_gradients_of_cut_weights_may_be_summed_at_a_steps_last_chunk(
    folder: Path, alone: dict[tuple[str, str], Path]
) -> None:
    """Two chunks a process and step: half as many sums to the same weights."""
    often = Job(folder / "often", *FULL, sharding="fsdp2")
    late = replace(often, folder=folder / "late", sum_at_last_chunk=True)
    for job in (often, late):
        launch(counted_run, told([job]), 2)
    assert sums(late.folder) == [count // 2 for count in sums(often.folder)] != [0, 0]
    assert_same_run(alone[FULL], late.folder)


def test_four_processes_end_with_the_weights_of_one(folder: Path, alone: dict[tuple[str, str], Path]) -> None:
    job = Job(folder / "four", *LORA)
    do_jobs([job], 4)
    assert_same_run(alone[LORA], job.folder)


@pytest.mark.parametrize("name", ["1 -> 2", "1 -> 2 fsdp2"])
def test_two_processes_go_on_with_the_run_of_one(
    alone: dict[tuple[str, str], Path], shared: dict[str, Path], name: str
) -> None:
    assert_same_run(alone[FULL], shared[name])


@pytest.mark.parametrize("name", ["diffusion_nft-full", "full fsdp2"])
def test_one_process_goes_on_with_the_run_of_two(folder: Path, shared: dict[str, Path], name: str) -> None:
    job = begun(Job(folder / f"fewer {name}", *FULL), shared[name], STOP)
    run(make_config(job), resume=True)
    assert_same_run(shared[name], job.folder)


def test_as_many_processes_go_on_to_the_same_bits(folder: Path, shared: dict[str, Path]) -> None:
    names = {"flow_grpo-full": "none", "full fsdp2": "fsdp2"}
    jobs = {
        name: begun(Job(folder / f"again {name}", *kind, sharding=names[name]), shared[name], STOP)
        for name, kind in zip(names, (("flow_grpo", "full"), FULL), strict=True)
    }
    do_jobs(list(jobs.values()), 2)
    for name, job in jobs.items():
        whole, resumed = checkpoint_tensors(shared[name]), checkpoint_tensors(job.folder)
        assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())


FLAGS = ["--num-prompts", "4", "--group-size", "2", "--chunk-size", "2", "--evaluation.num-prompts", "2"]
FLAGS += ["--evaluation.num-final-prompts", "2", "--evaluation.num-grid", "0", "--processes.timeout", "100"]


def start(launch: Sequence[str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launch, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("pdtr: ")]


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def workers(process: subprocess.Popen[str]) -> dict[str, int]:
    """The processes that a launcher has started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments: dict[str, list[bytes]] = {}
    for pid in children:
        # Launchers start others too, which may be gone by now.
        with suppress(OSError):
            environments[pid] = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return {
        entry.removeprefix(b"RANK=").decode(): int(pid)
        for pid, entries in environments.items()
        for entry in entries
        if entry.startswith(b"RANK=")
    }


def has_logged(folder: Path, count: int) -> Callable[[], bool]:
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= count


def test_killed_and_interrupted_from_outside_and_ended_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["train", "smoke", "--output-dir", str(folder), *FLAGS]
    process = start([*TORCHRUN, "-m", "experiments.cli"], *arguments)
    wait_until(process, has_logged(folder, 2))
    killed = time.monotonic()
    os.kill(workers(process)["1"], signal.SIGKILL)
    _, said = process.communicate(timeout=DEADLINE)
    assert time.monotonic() - killed < 60
    (line,) = lines(said)
    assert "expected all 2 processes to go on, but one has ended or was silent for 100 s" in line
    assert "Signal 9 (SIGKILL) received" in said

    process = start([*TORCHRUN, "-m", "pdtr"], *arguments, "--resume")
    wait_until(process, has_logged(folder, 3))
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE)
    (line,) = lines(said)
    way = shlex.split(line.partition("pdtr: stopped; go on with: ")[2])
    assert way == ["torchrun", "--nproc-per-node", "2", "-m", "pdtr", *arguments, "--resume"]

    process = start(ACCELERATE, *arguments, "--resume")
    wait_until(process, lambda: set(workers(process)) == {"0", "1"})
    out, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, said
    assert out.count("report: ") == 1
    assert [row["iteration"] for row in rows(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (folder / "report.html").is_file()


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    process = start([*TORCHRUN, "-m", "pdtr"], "train", "smoke", "--output-dir", str(tmp_path / "run"))
    out, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    (line,) = lines(said)
    assert (
        "2 processes: expected the iteration's chunks to be a multiple of num_minibatches x processes = 2 x 2" in line
    )
    assert "got 2; --chunk-size 6 or --num-prompts 8 would do" in line
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_pretraining_of_the_base_is_not_shared(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pdtr", "pretrain", "scenes", "--output-dir", str(tmp_path / "base")],
        env={**environment(), "WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pdtr: pretrain scenes: expected one process, got 2;")


def sizes(num_minibatches: int, **changes: Any) -> TrainConfig:
    config = make_config(Job(Path("run")))
    return replace(config, learner=replace(config.learner, num_minibatches=num_minibatches), **changes)


@pytest.mark.parametrize(
    ("config", "count", "fixes"),
    [
        (sizes(1), 16, "got 8; --chunk-size 1 or --num-prompts 16 would do"),
        (sizes(2), 8, "got 8; --chunk-size 1 or --num-prompts 16 would do"),
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


def test_every_launch_of_pre_training_in_the_docs_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files stand for nothing here: a launch that is cut short with dots has what it needs otherwise."""
    pages = [path.read_text() for path in (Path(__file__).parents[2] / "docs").rglob("*.md")]
    pattern = r"(?:torchrun|accelerate launch) ([^`\n]*?) -m pdtr pretrain (stage-[abc])([^`\n]*)"
    launches = [match for page in pages for match in re.findall(pattern, page)]
    assert launches
    for options, name, flags in launches:
        monkeypatch.setenv("WORLD_SIZE", re.findall(r"--(?:nproc-per-node|num_processes) (\d+)", options)[0])
        default = published(STAGES[name])
        given, _ = parse_run(default, Usage("pdtr pretrain"), shlex.split(flags.replace("...", "")))
        files = dict.fromkeys(default.stage.cycle, ("x.jsonl",))
        check(replace(given, model=given.model or Path("m"), **files), resume=False)


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
    with (
        pytest.raises(ProcessLost, match="goes on with --resume"),
        losses_explained(Processes(0, 2), ProcessSettings()),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(RuntimeError, match="shapes"), losses_explained(Processes(0, 2), ProcessSettings()):
        raise RuntimeError("shapes differ")


def test_the_launcher_is_named_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher() == ["pdtr"]
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert launcher() == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8", "-m", "pdtr"]
