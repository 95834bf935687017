"""Stages of pre-training as several processes run them; in a module of its own, for the processes import it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from agents.policies.backbone import BackboneSettings
from agents.policies.loading import load_backbone
from agents.policies.metaquery import MetaQueryPolicy
from agents.policies.scenes import ScenesPolicy, ScenesPolicyConfig
from agents.policies.sharding import clip_gradients, whole
from agents.processes import Processes
from envs.data.batches import BatchSettings
from envs.data.buckets import ProgressiveResolution
from envs.data.records import RecordSet
from envs.data.stream import StreamBatches
from envs.scenes.pretraining import SupervisedBatch
from experiments.metaquery_phases import SETTINGS, assemble
from experiments.metaquery_scenes import MetaQueryScenesConfig
from experiments.metaquery_vlm import new_vlm, vlm_shape
from pdtr.pretraining_data import ScenesSource
from pdtr.pretraining_loop import pretrain_stage
from pdtr.pretraining_run import StageRun
from pdtr.pretraining_stages import PUBLISHED, Stage, StageConfig
from pdtr.processes import ProcessSettings, Sharding, start
from tests.pdtr.sums import sums_counted

SIZES = {"edit": 3, "t2i": 5}


@dataclass(frozen=True)
class StageJob:
    """One stage: where it goes, which, from what policy, how it is shared, whether it goes on, on which records."""

    folder: Path
    stage: Stage
    base: Path
    sharding: Sharding = "none"
    resume: bool = False
    records: Path | None = None
    sum_gradients_once: bool = False

    @property
    def config(self) -> StageConfig:
        """Four steps of two cycles."""
        sizes = {"num_steps": 4, "global_batch_size": 16, "checkpoint_every": 1, "keep_checkpoints": 9}
        rates: dict[str, Any] = {"learning_rate": 1e-3, "warmup_share": 0.0}
        rates["sum_gradients_once"] = self.sum_gradients_once
        return replace(PUBLISHED[self.stage], output_dir=self.folder, evaluate_every=2, **sizes, **rates)


def make_base() -> ScenesPolicy:
    """A tiny policy of the embedded world whose every weight is random."""
    policy = ScenesPolicy(ScenesPolicyConfig(("a", "red"), latent_channels=8, width=32, num_layers=2, num_heads=1))
    torch.manual_seed(0)
    for parameter in policy.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return policy


def save_metaquery(base: Path, folder: Path) -> None:
    """A tiny MetaQuery policy of the embedded world on a base, its language model random."""
    config = MetaQueryScenesConfig(base=base, width=32, num_layers=2, num_queries=4, connector_layers=1)
    lmm, tokenizer, pictures = new_vlm(vlm_shape(32, 2, seed=0))
    assemble(config, lmm, tokenizer, pictures).save(folder)


def held_out() -> dict[str, SupervisedBatch]:
    """A fixed batch a task."""
    source = ScenesSource({"edit": 6, "t2i": 6}, seed=9, split="held_out")
    return {task: source.next_batch(task) for task in SIZES}


def run_job(job: StageJob) -> None:
    """Run a stage in this process, or this process's part of it."""
    processes, _ = start(ProcessSettings(job.sharding))
    torch.set_num_threads(1)
    if job.records is not None:
        run_on_files(job, job.records, processes)
        return
    policy = ScenesPolicy.load(job.base) if job.stage == "B" else MetaQueryPolicy.load(job.base, SETTINGS)
    shares = ScenesSource(SIZES, seed=3, rank=processes.rank, world_size=processes.count)
    run = StageRun(job.config, policy, shares, held_out(), processes)
    pretrain_stage(run, job.resume, report=lambda line: None)


def run_on_files(job: StageJob, records: Path, processes: Processes) -> None:
    """A stage of a published model on records; each process writes the texts that it has had, by steps done before."""
    settings = BatchSettings(2, ProgressiveResolution((64,)), window=8, num_workers=2)
    sets = {task: [RecordSet((f"{records}/{task}.jsonl",))] for task in ("t2i", "edit")}
    source = StreamBatches(sets, settings, processes.rank, processes.count)
    policy = load_backbone(job.base, BackboneSettings(height=64, width=64, dtype="float32"))
    run = StageRun(job.config, policy, source, processes=processes)
    had: dict[str, list[str]] = {}
    give = source.next_batch

    def next_batch(task: str) -> SupervisedBatch:
        batch = give(task)
        had.setdefault(str(run.step), []).extend(batch.texts)
        return batch

    source.next_batch = next_batch  # type: ignore[method-assign]
    pretrain_stage(run, job.resume, report=lambda line: None)
    source.close()
    (job.folder / f"texts-{run.processes.count}-{processes.rank}.json").write_text(json.dumps(had))


def told(jobs: Sequence[StageJob]) -> list[dict[str, Any]]:
    """Jobs as JSON, which processes are told."""
    return [{name: str(v) if isinstance(v, Path) else v for name, v in asdict(job).items()} for job in jobs]


def main(jobs: Sequence[dict[str, Any]]) -> None:
    """What each process does."""
    for job in jobs:
        paths = {name: Path(job[name]) for name in ("folder", "base", "records") if job[name] is not None}
        run_job(StageJob(**{**job, **paths}))


def counted_job(job: dict[str, Any]) -> None:
    """Run a stage with cut weights and write how often this process took part in a sum of gradients."""
    with sums_counted(Path(job["folder"])):
        main([job])


def clip_job(file: str) -> None:
    """Clip two gradients of norm above 0.5, one whole and one cut up over the processes, and save them."""
    processes, _ = start(ProcessSettings("fsdp2"))
    mesh = init_device_mesh("cpu", (processes.count,))
    values = {"whole": (torch.zeros(3), 2.0), "cut": (distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]), 3.0)}
    parameters = {name: torch.nn.Parameter(tensor) for name, (tensor, _) in values.items()}
    for name, parameter in parameters.items():
        parameter.grad = torch.full_like(parameter, values[name][1])
    norm = clip_gradients(list(parameters.values()), 0.5)
    gradients = {name: whole(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None}
    save_file({"norm": norm, **gradients}, f"{file}-{processes.rank}.safetensors")
