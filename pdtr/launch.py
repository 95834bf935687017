"""Start, resume and finish a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pdtr.processes import check_shares, losses_explained, start
from pdtr.run_settings import FILE, check_settings, write_settings

if TYPE_CHECKING:
    from agents.policies.base import FlowPolicy
    from agents.policies.weights import PolicyWeights, Version
    from agents.processes import Processes
    from pdtr.config import TrainConfig
    from pdtr.progress import Progress
    from pdtr.tasks import Task
    from pdtr.trainer import Trainer

BASE = Path(__file__).parent / "base"


def train(
    config: TrainConfig, tasks: Mapping[str, Task] | None = None, resume: bool = False, recipe: str = "custom"
) -> Path:
    """Train, then write the policy, a published model's adapters, a picture of before and after, and the report.

    In several processes (see ``docs/processes.md``) each calls this alike; the first one writes.

    Args:
        config: the run.
        tasks: what is practised and measured, with its rewards; those of ``config.tasks`` by default.
        resume: go on from the last checkpoint in ``config.output_dir``.
        recipe: the name that the report shows.

    Returns:
        The report's path.

    Raises:
        ValueError: the folder already holds a run and ``resume`` is not asked for; or it holds none and it is; or
            ``config.base`` is neither a policy nor a finished run; or the rewards of ``config.rewards`` cannot be made,
            or ``tasks`` has others; or a resumed run was started with other settings or rewards; or the processes
            cannot share the iteration's chunks.
        ProcessLost: another process of the run has ended.
    """
    from pdtr.picture import write_picture
    from pdtr.report import write_report

    processes = run(config, tasks, resume, recipe).processes
    with losses_explained(processes, config.processes):
        if processes.is_first and config.evaluation.num_grid:
            write_picture(config.output_dir)
        path = processes.agree(lambda: str(write_report(config.output_dir)))
    return Path(path)


def run(
    config: TrainConfig, tasks: Mapping[str, Task] | None = None, resume: bool = False, recipe: str = "custom"
) -> Trainer:
    """As :func:`train`, without the picture and the report. -> the trainer, at the end of its run."""
    import torch

    from pdtr.sampling import load_policy, policy_folder
    from pdtr.trainer import Trainer

    processes, device = start(config.processes)
    torch.set_num_threads(config.num_threads)
    check_shares(config.num_prompts * config.group_size // config.chunk_size, config, processes)
    with losses_explained(processes, config.processes):
        last = processes.agree(lambda: _prepare(config.output_dir, resume))
        base = policy_folder(config.base)
        # A file that is missing is said before billions of weights are read.
        tasks = _tasks(config, tasks)
        if resume and processes.is_first:
            check_settings(config, tasks)
        policy = load_policy(base, config.backbone)
        if not processes.is_sharded:
            policy.to(device)
        with _display(config, processes) as progress:
            trainer = Trainer(config, tasks, policy, progress, processes)
            # What is cut up came to the device block by block, as it may not fit there whole; the rest follows.
            policy.to(device)
            if last:
                trainer.restore(Path(last))
            elif resume:
                trainer.records.truncate(0)
            # Only now, for a checkpoint may refuse the curriculum.
            if processes.is_first:
                write_settings(config, recipe, tasks, goes_on=bool(last))
            trainer.train()
        _write_policy(trainer)
    return trainer


def _tasks(config: TrainConfig, tasks: Mapping[str, Task] | None) -> Mapping[str, Task]:
    from pdtr.reward_source import GroundTruth

    if tasks is None:
        return config.tasks.make_tasks(config.evaluation, config.rewards.make_rewards())
    if config.rewards != GroundTruth():
        raise ValueError("rewards: expected either tasks with their rewards or config.rewards, got both; drop one")
    return tasks


@contextmanager
def _display(config: TrainConfig, processes: Processes) -> Iterator[Progress]:
    """The progress of the run, shown by its first process."""
    from rich.console import Console

    from pdtr.progress import Progress

    if not processes.is_first:
        yield Progress(config, Console(quiet=True))
        return
    with Progress(config) as progress:
        yield progress


def _write_policy(trainer: Trainer) -> None:
    """Write the policy that is evaluated, whole; by the first process."""
    from agents.policies.sharding import gathered
    from pdtr.sampling import load_policy, policy_folder
    from pdtr.trainer import make_weights

    config, processes = trainer.config, trainer.processes
    policy, weights = trainer.policy, trainer.weights
    state = gathered(weights.state(), processes.is_first) if processes.is_sharded else {}
    if not processes.is_first:
        return
    if processes.is_sharded:
        # A network that was cut up stays so; another one takes its whole weights, on the CPU.
        policy = load_policy(policy_folder(config.base), config.backbone)
        weights = make_weights(config, policy)
        weights.load_state(state)
    save_policy(policy, weights, trainer.evaluated_version, config.output_dir)


def save_policy(policy: FlowPolicy, weights: PolicyWeights, version: Version, folder: Path) -> None:
    """Write ``policy/``, adapters merged, and a published model's adapters in ``lora/``.

    Args:
        policy: it is not for training after that.
        weights: its own.
        version: which of them is written.
        folder: of a run, or of what is exported of one.
    """
    from agents.policies.backbone import BackbonePolicy
    from agents.policies.weights import LoraWeights

    if isinstance(weights, LoraWeights):
        if isinstance(policy, BackbonePolicy):
            weights.save_lora(folder / "lora", version)
        weights.merge(version)
        policy.save(folder / "policy")
        return
    with weights.use(version):
        policy.save(folder / "policy")


def _prepare(folder: Path, resume: bool) -> str:
    """The checkpoint to go on from, empty where there is none; refuses to write over a run."""
    from pdtr import checkpoint

    started = (folder / FILE).is_file()
    if started and not resume:
        raise ValueError(
            f"{folder}: expected a new folder, got one that holds a run; pass --resume, or another --output-dir"
        )
    if resume and not started:
        raise ValueError(f"{folder}: expected a run to resume, found none; leave --resume out to start it")
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        return ""
    checkpoint.clean_up(folder / "checkpoints")
    return str(checkpoint.latest(folder / "checkpoints") or "")
