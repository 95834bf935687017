"""The runs of ``world_size.py``, each in as many processes as are asked for, and what two of them differ by.

``torchrun --nproc-per-node 2 -m experiments.benchmarks.world_size_runs JOBS`` does jobs (JSON) one after another.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.benchmarks.entry import run_benchmark

if TYPE_CHECKING:
    from torch import Tensor

    from agents.algorithms.base import Algorithm
    from pdtr.config import TrainConfig

ITERATIONS = 3
_MODULE = "experiments.benchmarks.world_size_runs"
_DEADLINE = 600.0


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        folder: its output directory.
        algorithm: "flow_grpo" or "diffusion_nft".
        weights: "full" or "lora".
        sharding: see ``pdtr.processes.ProcessSettings``.
        resume: go on with the run that is in the folder.
        sum_at_last_chunk: see ``agents.learner.LearnerSettings``.
    """

    folder: Path
    algorithm: str = "diffusion_nft"
    weights: str = "full"
    sharding: str = "none"
    resume: bool = False
    sum_at_last_chunk: bool = False


@dataclass(frozen=True)
class Difference:
    """How far apart two runs have ended.

    Attributes:
        max_abs: the largest difference of two weights.
        relative: ``|a - b| / |a|`` over all weights that are trained, Euclidean.
        moved: ``|a - a_0| / |a|``: how far training has taken them from where they began.
        moments: the largest difference of two of the optimiser's moments, over the largest of their tensor.
    """

    max_abs: float
    relative: float
    moved: float
    moments: float


def make_config(job: Job) -> TrainConfig:
    """The ``smoke`` recipe, smaller: eight chunks an iteration, four of each minibatch; both tasks in the end."""
    from agents.learner import LearnerSettings
    from agents.policies.weights import LoraSettings
    from agents.samplers import ODE
    from experiments.recipes.scenes import smoke
    from pdtr.config import EvaluationConfig
    from pdtr.curriculum import pdtr_curriculum
    from pdtr.processes import ProcessSettings

    config = smoke()
    return replace(
        config,
        output_dir=job.folder,
        algorithm=_algorithm(job.algorithm),
        curriculum=pdtr_curriculum(ITERATIONS - 2, 2, rehearsal=0.5),
        num_prompts=8,
        group_size=2,
        chunk_size=2,
        learner=LearnerSettings(num_minibatches=2, ema_decay=0.9, sum_at_last_chunk=job.sum_at_last_chunk),
        lora=LoraSettings(4, 8) if job.weights == "lora" else None,
        # Two chunks a task: of four processes two have none.
        evaluation=EvaluationConfig(3, 4, every=2, sampler=ODE(2, shift=4.0), chunk_size=2, num_grid=3),
        keep_checkpoints=ITERATIONS,
        processes=ProcessSettings("fsdp2" if job.sharding == "fsdp2" else "none", timeout=120.0),
        num_threads=1,
    )


def _algorithm(name: str) -> Algorithm:
    from agents.algorithms.diffusion_nft import DiffusionNFT
    from agents.algorithms.flow_grpo import FlowGRPO
    from agents.samplers import ODE, FlowSDE

    if name == "flow_grpo":
        return FlowGRPO(FlowSDE(num_inference_steps=3, shift=4.0))
    return DiffusionNFT(ODE(num_inference_steps=3, shift=4.0), old_rate=0.1)


def command(jobs: Sequence[Job], num_processes: int) -> list[str]:
    """What does the jobs in as many processes."""
    # A port of its own, whatever else runs on the machine.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [sys.executable, *(launcher if num_processes > 1 else []), "-m", _MODULE, told(jobs)]


def told(jobs: Sequence[Job]) -> str:
    """Jobs as JSON."""
    return json.dumps([{**asdict(job), "folder": str(job.folder)} for job in jobs])


def environment() -> dict[str, str]:
    """Of the processes: one thread each, which finds what this one finds."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def do_jobs(jobs: Sequence[Job], num_processes: int) -> None:
    """Do jobs and wait for them.

    Raises:
        ValueError: one of them failed; with what it said.
    """
    done = subprocess.run(
        command(jobs, num_processes), env=environment(), capture_output=True, text=True, timeout=_DEADLINE, check=False
    )
    if done.returncode:
        raise ValueError(
            f"{num_processes} processes: expected runs that end, got exit code {done.returncode}:\n{done.stderr}"
        )


def kill_one(job: Job, num_processes: int, iteration: int) -> str:
    """Start a job, kill its last process after an iteration, and wait for the others. -> what they said."""
    started = subprocess.Popen(
        command([job], num_processes),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, end = job.folder / "metrics.jsonl", time.monotonic() + _DEADLINE
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < iteration:
        if started.poll() is not None or time.monotonic() > end:
            raise ValueError(f"{job.folder}: expected a run that comes to iteration {iteration}, got one that does not")
        time.sleep(0.01)
    os.kill(int(_pid_file(job, num_processes - 1).read_text()), signal.SIGKILL)
    _, said = started.communicate(timeout=_DEADLINE)
    return said


def begun(job: Job, whole: Path, iteration: int) -> Job:
    """A copy of a whole run as it was when it was killed after an iteration; the job that resumes it."""
    from pdtr.checkpoint import checkpoints

    shutil.copytree(whole, job.folder)
    for path in checkpoints(job.folder / "checkpoints"):
        if int(path.name.removeprefix("step-")) > iteration:
            shutil.rmtree(path)
    shutil.rmtree(job.folder / "policy", ignore_errors=True)
    return replace(job, resume=True)


def checkpoint_tensors(folder: Path, iteration: int = ITERATIONS) -> dict[str, Tensor]:
    """The tensors of a run's checkpoint, by default of the last one."""
    from pdtr.checkpoint import checkpoint_name, load_state

    return load_state(folder / "checkpoints" / checkpoint_name(iteration)).tensors


def _before(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Current weights as they were when the last stage began, which is what the reference is.

    Without a KL none is kept: of adapters their second halves, which begin at 0, are known to have moved, and no more.
    """
    reference = tensors.get(name.replace(".current.", ".reference.", 1))
    if reference is not None:
        return reference
    return tensors[name] * 0 if ".lora_B." in name else tensors[name]


def difference(folder: Path, other: Path, iteration: int = ITERATIONS) -> Difference:
    """Compare the checkpoints of two runs of one configuration, by default the last ones."""
    import torch

    a, b = checkpoint_tensors(folder, iteration), checkpoint_tensors(other, iteration)
    if a.keys() != b.keys():
        raise ValueError(f"{other}: expected the tensors of {folder}, got others: {sorted(a.keys() ^ b.keys())[:3]}")
    names = [name for name in a if name.startswith("weights.current.")]
    before = {name: _before(a, name) for name in names}
    moments = [name for name in a if name.startswith("optimizer.") and a[name].numel() > 1]

    def norm(tensors: Sequence[Tensor]) -> float:
        return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())

    size = norm([a[name] for name in names])
    return Difference(
        max_abs=max(float((a[name] - b[name]).abs().max()) for name in names),
        relative=norm([a[name] - b[name] for name in names]) / size,
        moved=norm([a[name] - before[name] for name in names]) / size,
        moments=max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-30)) for n in moments),
    )


def _pid_file(job: Job, rank: int) -> Path:
    return job.folder.with_name(f"{job.folder.name}.pid-{rank}")


def main(arguments: Sequence[str]) -> int:
    """Do the jobs."""
    from pdtr.launch import run
    from pdtr.processes import finish

    for entry in json.loads(arguments[0]):
        job = Job(**{**entry, "folder": Path(entry["folder"])})
        pid_file = _pid_file(job, int(os.environ.get("RANK", "0")))
        pid_file.parent.mkdir(parents=True, exist_ok=True)
        pid_file.write_text(str(os.getpid()))
        run(make_config(job), resume=job.resume)
    finish()
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
