"""A run that is killed at random moments and resumed ends with the bits of one that was never stopped."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.policies.scenes import ScenesPolicy
from pdtr.checkpoint import checkpoints, load_state
from pdtr.logbook import read_scores

ITERATIONS = 8
LAST = f"checkpoints/step-{2 * ITERATIONS:06d}"
DEADLINE = 120.0
# What runs in the process that is killed; FOLDER, BASE, KIND and RESUME are put before it.
SCRIPT = f"""
import signal
from pathlib import Path
import numpy as np
from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from agents.policies.weights import LoraSettings
from agents.samplers import ODE, FlowSDE
from envs.prompts import FixedPool
from pdtr.config import EvaluationConfig, TrainConfig
from pdtr.curriculum import pdtr_curriculum
from pdtr.launch import train
from pdtr.tasks import Task
from rewards.base import Prompt
from rewards.pixel import redness

signal.signal(signal.SIGINT, signal.default_int_handler)

def prompts(task, count, first):
    rng = np.random.default_rng(first)
    sources = [(rng.integers(0, 256, (48, 48, 3), np.uint8),) if task == "edit" else () for _ in range(count)]
    words = ["a red circle", "two squares", "the blue square"]
    return [Prompt(words[i % 3], sources[i], {{"tag": words[i % 3]}}, f"{{task}}/{{first + i}}") for i in range(count)]

tasks = {{
    name: Task(name, FixedPool(prompts(name, 6, 0)), redness, prompts(name, 3, 10), prompts(name, 5, 20), (48, 48))
    for name in ("edit", "t2i")
}}
config = TrainConfig(
    output_dir=Path(FOLDER),
    base=Path(BASE),
    algorithm=DiffusionNFT(ODE(2), old_rate=0.2) if KIND == "DiffusionNFT" else FlowGRPO(FlowSDE(3)),
    curriculum=pdtr_curriculum({ITERATIONS}, {ITERATIONS}, rehearsal=0.5),
    num_prompts=2,
    group_size=4,
    chunk_size=4,
    learning_rate=1e-3,
    lora=LoraSettings(2, 4) if KIND == "LoRA" else None,
    evaluation=EvaluationConfig(3, 5, every=3, sampler=ODE(2), chunk_size=4, num_grid=2),
    checkpoint_every=2,
    num_threads=1,
)
train(config, tasks, resume=RESUME)
"""
_IMPORTS = ("agents.algorithms", "pdtr.trainer", "pdtr.launch", "pdtr.report", "agents.policies.scenes", "peft")
# Forked where the imports are done already: each restart is a process of its own, and takes no seconds to come up.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([*_IMPORTS, "torch.utils.tensorboard"])


def code(folder: Path, kind: str, resume: bool) -> str:
    values = {"FOLDER": str(folder), "BASE": str(folder.parent / "base"), "KIND": kind, "RESUME": resume}
    return "\n".join(f"{name} = {value!r}" for name, value in values.items()) + SCRIPT


def start(folder: Path, kind: str, resume: bool) -> Any:
    process = _forks.Process(target=exec, args=(code(folder, kind, resume), {"__name__": "run"}))
    process.start()
    return process


def finish(folder: Path, kind: str) -> None:
    """Resume a run and let it end."""
    process = start(folder, kind, resume=True)
    process.join(DEADLINE)
    assert process.exitcode == 0


def wait_until(process: Any, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process.is_alive(), f"ended by itself with {process.exitcode}"
        assert time.monotonic() < end
        time.sleep(0.002)


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be being written."""
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines]


def has_come_to(folder: Path, iteration: int) -> Callable[[], bool]:
    """Whether the sitting that is about to start has logged an iteration."""
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0

    def condition() -> bool:
        # What an earlier sitting logged is cut off at the start, which changes the file's time too.
        if not metrics.exists() or metrics.stat().st_mtime_ns == before:
            return False
        found = rows(metrics)
        return bool(found) and found[-1]["iteration"] >= iteration

    return condition


def has_evaluated(folder: Path, label: str) -> Callable[[], bool]:
    return lambda: any(row["label"] == label for row in rows(folder / "evaluations.jsonl"))


def kill(folder: Path, kind: str, moment: Callable[[], bool], delay: float) -> None:
    """Start or resume a run, and kill it some seconds after a moment."""
    process = start(folder, kind, resume=(folder / "config.json").exists())
    wait_until(process, moment)
    time.sleep(delay)
    process.kill()
    process.join(DEADLINE)
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"


def last_step(folder: Path) -> int:
    found = checkpoints(folder / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def base(runs: Path, tiny_policy: ScenesPolicy) -> Path:
    tiny_policy.save(runs / "base")
    return runs


@pytest.fixture(scope="module")
def never_stopped() -> Callable[[Path, str], Path]:
    """Runs in one sitting, one a kind, each in a fresh interpreter: with another hash seed than the forked ones."""

    @functools.cache
    def run(base: Path, kind: str) -> Path:
        folder = base / f"whole-{kind}"
        environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code(folder, kind, False)], check=True, env=environment, timeout=DEADLINE)
        return folder

    return run


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("seconds")}


def assert_same_bits(folder: Path, whole: Path) -> None:
    weights = "policy/model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
    resumed, expected = load_state(folder / LAST), load_state(whole / LAST)
    assert resumed.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert without_seconds(resumed.meta) == without_seconds(expected.meta)
    for name, count in (("metrics.jsonl", 2 * ITERATIONS), ("evaluations.jsonl", 18)):
        found = [without_seconds(row) for row in rows(folder / name)]
        assert len(found) == count
        assert found == [without_seconds(row) for row in rows(whole / name)]
    for row in rows(whole / "evaluations.jsonl"):
        # Text, since NaN is not equal to itself.
        assert str(read_scores(folder, row)) == str(read_scores(whole, row))
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(("kind", "kills"), [("FlowGRPO", 5), ("DiffusionNFT", 4), ("LoRA", 1)])
def test_killed_and_resumed(base: Path, never_stopped: Callable[[Path, str], Path], kind: str, kills: int) -> None:
    whole, folder = never_stopped(base, kind), base / f"killed-{kind}"
    found = rows(whole / "metrics.jsonl")
    one_iteration = found[-1]["seconds"] / len(found)
    untrained, trained = ScenesPolicy.load(base / "base"), ScenesPolicy.load(whole / "policy")
    moved = zip(untrained.parts.parameters(), trained.parts.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in moved) > 1e-4

    rng = random.Random(kind)
    # While the base is being measured, before there is any checkpoint.
    kill(folder, kind, has_evaluated(folder, "base"), rng.uniform(0, one_iteration))
    # Anywhere in the run, in order; the last one leaves time enough to strike before the end.
    for iteration in sorted(rng.randint(1, 2 * ITERATIONS - 4) for _ in range(kills)):
        moment = has_come_to(folder, max(iteration, last_step(folder) + 1))
        kill(folder, kind, moment, rng.uniform(0, 1.5 * one_iteration))
    # After the last iteration, while the policy and the report are being written.
    kill(folder, kind, has_evaluated(folder, "after t2i"), rng.uniform(0, one_iteration))
    assert last_step(folder) == 2 * ITERATIONS
    finish(folder, kind)
    assert_same_bits(folder, whole)


def test_interrupted_and_then_damaged(base: Path, never_stopped: Callable[[Path, str], Path]) -> None:
    kind = "DiffusionNFT"
    whole, folder = never_stopped(base, kind), base / "interrupted"
    process = start(folder, kind, resume=False)
    wait_until(process, has_come_to(folder, 5))
    os.kill(process.pid, signal.SIGINT)
    process.join(DEADLINE)
    assert process.exitcode not in (0, None)
    earlier, last = checkpoints(folder / "checkpoints")[-2:]

    # A disk that lost the end of a file: the checkpoint is named, and the one before it.
    damaged = last / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    metrics = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"tensors\.safetensors is truncated") as caught:
        exec(code(folder, kind, resume=True), {"__name__": "run"})
    assert type(caught.value).__name__ == "CheckpointError"
    assert str(last) in str(caught.value)
    assert f"to go on from {earlier}, delete {last} and resume" in str(caught.value)
    assert (folder / "metrics.jsonl").read_bytes() == metrics

    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    finish(folder, kind)
    assert_same_bits(folder, whole)
