"""The training loop: propose, collect, learn, observe; evaluate, log and checkpoint around it.

Every draw is seeded by (run seed, iteration), so all the state that a run has is weights, optimiser, curriculum and
counters: a run that was killed goes on to the same bits as one that was not.

Several processes share the chunks of every rollout and evaluation; from the gathered rewards each decides the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.base import changed
from agents.learner import Learner
from agents.policies.base import FlowPolicy
from agents.policies.sharding import cut_optimizer_state, gathered
from agents.policies.weights import FullWeights, LoraWeights, PolicyWeights, Version
from agents.processes import ALONE, Processes
from agents.rollout import Draw, collect
from agents.samplers import derive_seed
from agents.sharing import gather_rollouts, shares
from agents.types import Rollout
from pdtr import checkpoint
from pdtr.aggregation import summed, weighted
from pdtr.config import TrainConfig, known_stages, weighed_components
from pdtr.curriculum import Plan, TaskBatch
from pdtr.evaluate import Evaluation, evaluation_draw, evaluation_of
from pdtr.metrics import evaluation_row, rollout_metrics, statistics_metrics
from pdtr.missing import MissingWatch, commonest_reason, masked
from pdtr.panel import panel_metrics
from pdtr.processes import check_shares
from pdtr.progress import Progress
from pdtr.records import Records
from pdtr.stage_ends import save_stage_end
from pdtr.tasks import Task, check_groups, check_held_out, unwatched


@dataclass
class Run:
    """The state of a run beside weights and optimiser.

    Attributes:
        iteration: iterations done.
        seconds: time spent in iterations, over all sittings.
        stage_name: the stage of the last iteration.
    """

    iteration: int = 0
    seconds: float = 0.0
    stage_name: str = ""


class Trainer:
    """One training run.

    Args:
        config: see :class:`TrainConfig`.
        tasks: by name; the curriculum may ask for these.
        policy: the policy to train, at its base weights.
        progress: where progress is shown.
        processes: those that share the run.

    Raises:
        ValueError: chunks cut the groups of a reward that compares them, or do not divide among the processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        tasks: Mapping[str, Task],
        policy: FlowPolicy,
        progress: Progress,
        processes: Processes = ALONE,
    ) -> None:
        weighed = weighed_components(config.curriculum)
        check_held_out(tasks, weighed)
        tasks = {name: replace(task, weighed=tuple(weighed)) for name, task in tasks.items()}
        self.config, self.tasks, self.policy, self.processes = config, tasks, policy, processes
        check_groups(tasks, config.group_size, config.chunk_size)
        check_shares(config.num_prompts * config.group_size // config.chunk_size, config, processes)
        # A copy: the configuration's must stay as it was given, for another run of the same configuration.
        self.curriculum = copy.deepcopy(config.curriculum)
        self.records = Records(config, progress, processes.is_first)
        self.weights = make_weights(config, policy, processes.is_sharded)
        optimizer = make_optimizer(config, self.weights)
        self.learner = Learner(policy, self.weights, config.algorithm, optimizer, config.learner, processes)
        self.run = Run()
        self.missing = MissingWatch(config.missing)
        self._envs = {name: task.make_envs(config.chunk_size) for name, task in tasks.items()}
        size = config.evaluation.chunk_size
        self._evaluation_envs = {name: task.make_envs(size, is_evaluation=True) for name, task in tasks.items()}

    def train(self) -> None:
        """Run the curriculum to its end."""
        pools = {name: task.pool for name, task in self.tasks.items()}
        if self.run.iteration == 0:
            self.records.prompts(self.tasks)
            for note in filter(None, map(unwatched, self.tasks.values())):
                self.records.warn(note)
            self._evaluate_all("final", "base")
            self.curriculum.observe_evaluation(self._evaluate_all("tune"))
        while True:
            started = time.monotonic()
            rng = np.random.default_rng(derive_seed(self.config.seed, "propose", self.run.iteration))
            plan = self.curriculum.propose(pools, self.config.num_prompts, rng)
            check_held_out(self.tasks, plan.reward_weights if plan else {})
            if self.run.stage_name and (plan is None or plan.starts_stage):
                self._keep_stage_end()
                self._evaluate_all("final", f"after {self.run.stage_name}")
                started = time.monotonic()
            if plan is None:
                return
            self._iterate(plan, started)

    def _iterate(self, plan: Plan, started: float) -> None:
        self._start_stage(plan)
        rollouts = self._with_advantages(plan, self._collect(plan))
        drawn = time.monotonic()
        row: dict[str, Any] = {"iteration": self.run.iteration + 1, "stage": plan.stage, "stage_name": plan.stage_name}
        row |= {"tasks": [part.task for part in plan.parts]}
        for part, rollout in zip(plan.parts, rollouts, strict=True):
            row |= rollout_metrics(part.task, rollout, self.config.group_size)
            row |= self._panel(part, rollout)
            row |= statistics_metrics(part.task, self.tasks[part.task].reward)
            if rollout.reasons:
                row[f"missing_reason/{part.task}"] = commonest_reason([rollout])
        row |= self._learn(rollouts)
        rewards = {
            part.task: rollout.rewards.numpy().reshape(len(part.prompts), -1)
            for part, rollout in zip(plan.parts, rollouts, strict=True)
        }
        self.curriculum.observe(plan, rewards)
        self.run.iteration += 1
        self.run.stage_name = plan.stage_name
        self.run.seconds += time.monotonic() - started
        row |= {"seconds": self.run.seconds, "seconds_rollout": drawn - started}
        row |= {"seconds_update": time.monotonic() - drawn, "learning_rate": self._learning_rate()}
        row["seconds_waited"] = sum(rollout.seconds.waited for rollout in rollouts)
        row["seconds_scored"] = sum(rollout.seconds.scored for rollout in rollouts)
        self.records.iteration(row)
        if self.run.iteration % self.config.evaluation.every == 0:
            self.curriculum.observe_evaluation(self._evaluate_all("tune"))
        if self.run.iteration % self.config.checkpoint_every == 0:
            self.save_checkpoint()

    def _with_advantages(self, plan: Plan, rollouts: list[Rollout]) -> list[Rollout]:
        """The plan's rewards, as they are logged, and the advantages that the algorithm makes of them."""
        logged = summed(rollouts, plan.reward_weights, self.config.aggregation)
        self.missing.observe({part.task: rollout for part, rollout in zip(plan.parts, logged, strict=True)})
        compared = weighted(rollouts, plan.reward_weights, self.config.aggregation, self.config.reward_std_floor)
        advantages, on_missing = self.learner.algorithm.advantages, self.config.missing.on_missing
        return [
            masked(rollout, on_missing).with_advantages(advantages(masked(other, on_missing)))
            for rollout, other in zip(logged, compared, strict=True)
        ]

    def _start_stage(self, plan: Plan) -> None:
        if plan.reset_reference and needs_reference(self.config):
            self.weights.blend("reference", 0.0)
        if not plan.keep_optimizer:
            self.learner.optimizer = make_optimizer(self.config, self.weights)
        self.learner.algorithm = changed(self.config.algorithm, plan.algorithm)
        for group in self.learner.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * plan.learning_rate_scale

    def _learning_rate(self) -> float:
        return float(self.learner.optimizer.param_groups[0]["lr"])

    def _collect(self, plan: Plan) -> list[Rollout]:
        """Draw this process's share of the iteration with the weights that act; the rewards are everybody's."""
        config, algorithm = self.config, self.learner.algorithm
        num_chunks = [len(part.prompts) * config.group_size // config.chunk_size for part in plan.parts]
        check_shares(sum(num_chunks), config, self.processes)
        rollouts = []
        for part, share in zip(plan.parts, shares(num_chunks, self.processes), strict=True):
            seed = derive_seed(config.seed, "rollout", self.run.iteration, part.task)
            draw = Draw(config.group_size, seed, keep_images=config.panel_groups > 0)
            envs = self._envs[part.task]
            with torch.no_grad(), self.weights.use(algorithm.acting_version):
                rollouts.append(collect(self.policy, envs, part.prompts, draw, algorithm.sampler(), share))
        return gather_rollouts(rollouts, self.processes, config.panel_groups * config.group_size)

    def _panel(self, part: TaskBatch, rollout: Rollout) -> dict[str, float]:
        """Statistics of the first groups' images."""
        if rollout.images is None:
            return {}
        shown, size = part.prompts[: self.config.panel_groups], self.config.group_size
        sources = [prompt.source_images[0] for prompt in shown if prompt.source_images for _ in range(size)]
        return panel_metrics(part.task, rollout.images[: len(shown) * size], size, sources)

    def _learn(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Update, unless no reward at all was available: momentum would move the weights all the same."""
        if all(bool(rollout.rewards.isnan().all()) for rollout in rollouts):
            return {"skipped_updates": 1.0}
        return self.learner.update(rollouts)

    @property
    def evaluated_version(self) -> Version:
        """The averaged weights where an average is kept."""
        return "ema" if self.config.learner.ema_decay > 0 else "current"

    def _evaluate_all(self, kind: str, label: str = "") -> dict[str, float]:
        """Evaluate every task with the averaged weights, log it, and return the held-out scores."""
        scores = {}
        for name, task in self.tasks.items():
            found = self._evaluate(task, kind)
            row = evaluation_row(found, name, kind, label)
            row |= {"iteration": self.run.iteration, "seconds": self.run.seconds}
            self.records.evaluation(row, found)
            scores[name] = found.score
        return scores

    def _evaluate(self, task: Task, kind: str) -> Evaluation:
        """What ``pdtr.evaluate.evaluate`` finds, its chunks shared by the processes."""
        settings, envs = self.config.evaluation, self._evaluation_envs[task.name]
        prompts = task.final if kind == "final" else task.tune
        padded, draw = evaluation_draw(prompts, settings.chunk_size, kind)
        (share,) = shares([len(padded) // settings.chunk_size], self.processes)
        with torch.no_grad(), self.weights.use(self.evaluated_version):
            own = collect(self.policy, envs, padded, draw, settings.sampler, share)
        (rollout,) = gather_rollouts([own], self.processes, settings.num_grid)
        return evaluation_of(rollout, prompts, task.success, task.held_out_members, task.weighed)

    def save_checkpoint(self) -> Path:
        """Write everything that the run's continuation depends on, whole, for any number of processes."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights.state().items()}
        optimizer_tensors, optimizer_meta = checkpoint.optimizer_state(self.learner.optimizer)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors.items()}
        meta = {
            "kind": "train",
            "iteration": self.run.iteration,
            "seconds": self.run.seconds,
            "num_updates": self.learner.num_updates,
            "loss_scale": self.learner.loss_scale.state_dict(),
            "stage_name": self.run.stage_name,
            "optimizer": optimizer_meta,
            "curriculum": self.curriculum.state_dict(),
            "missing": self.missing.state_dict(),
        }
        folder = self.config.output_dir / "checkpoints"
        path = folder / checkpoint.checkpoint_name(self.run.iteration)
        tensors = gathered(tensors, self.processes.is_first)
        if self.processes.is_first:
            checkpoint.save_state(path, tensors, meta)
            checkpoint.prune(folder, self.config.keep_checkpoints)
        return path

    def _keep_stage_end(self) -> None:
        """Keep the weights that are evaluated now that a stage has ended: checkpoints are deleted in time."""
        version = self.evaluated_version
        own = {f"weights.{name}": t for name, t in self.weights.state().items() if name.startswith(f"{version}.")}
        tensors = gathered(own, self.processes.is_first)
        if self.processes.is_first:
            folder = self.config.output_dir / "checkpoints"
            save_stage_end(folder, tensors, self.run.iteration, self.run.stage_name, version)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; the logs are cut back to it."""
        # One process checks for all: hashing takes minutes where there are billions of weights.
        self.processes.agree(lambda: checkpoint.check_state(path))
        state = checkpoint.load_state(path, is_checked=True)
        weights = _part(state.tensors, "weights.")
        if needs_reference(self.config) and not _part(weights, "reference."):
            raise ValueError(
                f"{path}: expected the reference's weights, which a KL is measured to, got none: no stage had a KL "
                "when it was written; leave kl_coef at 0, or start another run from this one's policy"
            )
        self.weights.load_state(weights)
        self.curriculum.load_state_dict(state.meta["curriculum"])
        self.missing.load_state_dict(state.meta["missing"])
        self.learner.num_updates = int(state.meta["num_updates"])
        # Checkpoints of earlier versions have none, and had nothing scaled.
        if "loss_scale" in state.meta:
            self.learner.loss_scale.load_state_dict(state.meta["loss_scale"])
        moments = cut_optimizer_state(_part(state.tensors, "optimizer."), self.weights.parameters())
        checkpoint.restore_optimizer(self.learner.optimizer, moments, state.meta["optimizer"])
        meta = state.meta
        self.run = Run(int(meta["iteration"]), float(meta["seconds"]), str(meta["stage_name"]))
        self.records.truncate(self.run.iteration)


def make_weights(config: TrainConfig, policy: FlowPolicy, is_sharded: bool = False) -> PolicyWeights:
    """Adapters or full weights, with the versions that the algorithm and the evaluation need."""
    acting, averaged = config.algorithm.acting_version, config.learner.ema_decay > 0
    versions: tuple[Version, ...] = ("reference",) if needs_reference(config) else ()
    versions += ("old",) if acting == "old" else ()
    versions += ("ema",) if averaged else ()
    if config.lora is not None:
        return LoraWeights(policy, config.lora, versions, config.seed, is_sharded)
    return FullWeights(policy, versions, is_sharded)


def needs_reference(config: TrainConfig) -> bool:
    """Whether the algorithm compares with the reference in any stage; of unknown curricula it is not known, so yes."""
    stages = known_stages(config.curriculum)
    return stages is None or any(changed(config.algorithm, stage.algorithm).needs_reference for stage in stages)


def make_optimizer(config: TrainConfig, weights: PolicyWeights) -> torch.optim.Optimizer:
    """AdamW over what is trained, in one kernel where all of it is on a GPU."""
    parameters = weights.parameters()
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        fused=all(parameter.is_cuda for parameter in parameters) or None,
    )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
