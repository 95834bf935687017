"""The loop: what the plan says is done, what is missing is counted, what is held out is measured."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import LearnerSettings
from agents.policies.scenes import ScenesPolicy
from agents.policies.weights import LoraSettings
from agents.rollout import Ask, denoise, encode_asks
from agents.samplers import ODE, FlowSDE
from agents.types import Condition, Rollout, Trajectory
from envs.prompts import FixedPool
from pdtr.aggregation import weighted
from pdtr.checkpoint import checkpoints
from pdtr.config import EvaluationConfig, TrainConfig
from pdtr.curriculum import Curriculum, Joint, Plan, SingleTask, Staged, pdtr_curriculum
from pdtr.evaluate import evaluate
from pdtr.launch import train
from pdtr.logbook import read_evaluations, read_metrics, read_scores
from pdtr.metrics import rollout_metrics
from pdtr.missing import MissingSettings, TooManyMissing
from pdtr.progress import Progress
from pdtr.report import format_table, interference_table, write_report
from pdtr.stages import Constant, Linear, Stage, Step
from pdtr.tasks import Task
from pdtr.trainer import Trainer
from rewards.base import Images, Prompt, Reward, RewardTraits, Scores, Unavailable, declare
from rewards.cache import Cached
from rewards.compose import WeightedSum
from rewards.pixel import redness

NUM_MINIBATCHES = 2
Tensors = dict[str, torch.Tensor]


def make_prompts(task: str, count: int, first: int) -> list[Prompt]:
    rng = np.random.default_rng(first)
    sources = [(rng.integers(0, 256, (48, 48, 3), np.uint8),) if task == "edit" else () for _ in range(count)]
    words = ("a red circle", "two squares", "the blue square")
    return [Prompt(words[i % 3], sources[i], {"tag": words[i % 3]}, f"{task}/{first + i}") for i in range(count)]


def make_tasks(reward: Reward = redness, held_out_reward: Reward | None = None) -> dict[str, Task]:
    return {
        name: Task(
            name,
            FixedPool(make_prompts(name, 6, 0)),
            reward,
            make_prompts(name, 3, 10),
            make_prompts(name, 4, 20),
            (48, 48),
            held_out_reward=held_out_reward,
        )
        for name in ("edit", "t2i")
    }


def make_config(folder: Path, curriculum: Curriculum, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        output_dir=folder / "run",
        base=folder / "base",
        algorithm=FlowGRPO(FlowSDE(2), kl_coef=0.0),
        curriculum=curriculum,
        num_prompts=2,
        group_size=4,
        chunk_size=4,
        learning_rate=1e-3,
        learner=LearnerSettings(NUM_MINIBATCHES, ema_decay=0.5),
        evaluation=EvaluationConfig(3, 4, every=2, sampler=ODE(2), chunk_size=4, num_grid=2),
        checkpoint_every=100,
        num_threads=1,
    )
    return replace(config, **changes)


def make_trainer(config: TrainConfig, policy: ScenesPolicy, tasks: Mapping[str, Task] | None = None) -> Trainer:
    progress = Progress(config, Console(file=io.StringIO()))
    return Trainer(config, make_tasks() if tasks is None else tasks, policy, progress)


def versions(trainer: Trainer, version: str) -> Tensors:
    state = trainer.weights.state()
    return {k.removeprefix(f"{version}."): t.clone() for k, t in state.items() if k.startswith(f"{version}.")}


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@dataclass
class Recorder:
    """A curriculum that notes, after every update of its trainer, what the weights and the optimiser are."""

    trainer: Trainer
    inner: Any
    notes: list[dict[str, Any]] = field(default_factory=list)

    def propose(self, *arguments: Any) -> Plan | None:
        return self.inner.propose(*arguments)  # type: ignore[no-any-return]

    def observe(self, plan: Plan, rewards: Mapping[str, Any]) -> None:
        optimizer = self.trainer.learner.optimizer
        note: dict[str, Any] = {name: versions(self.trainer, name) for name in ("current", "reference", "ema")}
        note |= {"stage": plan.stage, "rewards": rewards, "learning_rate": optimizer.param_groups[0]["lr"]}
        note["steps"] = {int(entry["step"]) for entry in optimizer.state.values()}
        self.notes.append(note)
        self.inner.observe(plan, rewards)

    def observe_evaluation(self, scores: Mapping[str, float]) -> None:
        self.inner.observe_evaluation(scores)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


def recorded(trainer: Trainer) -> list[dict[str, Any]]:
    recorder = Recorder(trainer, trainer.curriculum)
    trainer.curriculum = recorder
    trainer.train()
    return recorder.notes


def test_stages_reset_what_they_say(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    stages = Staged(
        (
            Stage("one", {"edit": 1}, 2, reset_reference=False),
            Stage("two", {"t2i": 1}, 2, learning_rate_scale=0.5),
            Stage("three", {"edit": 1}, 1, reset_reference=False, keep_optimizer=True, learning_rate_scale=2.0),
        )
    )
    config = make_config(tmp_path, stages, algorithm=FlowGRPO(FlowSDE(2), kl_coef=0.01))
    trainer = make_trainer(config, tiny_policy)
    base = versions(trainer, "reference")
    notes = recorded(trainer)
    assert [note["stage"] for note in notes] == [0, 0, 1, 1, 2]
    assert all(same(notes[i]["reference"], base) for i in (0, 1))
    # As the weights were before the stage's first update; and so they stay.
    assert not same(notes[1]["current"], base)
    assert all(same(notes[i]["reference"], notes[1]["current"]) for i in (2, 3, 4))
    # Updates that the optimiser's state has seen: begun afresh at the second stage, kept at the third.
    assert [note["steps"] for note in notes] == [{2}, {4}, {2}, {4}, {6}]
    assert [note["learning_rate"] for note in notes] == [1e-3, 1e-3, 5e-4, 5e-4, 2e-3]
    logged = read_metrics(tmp_path / "run")
    assert [row["learning_rate"] for row in logged] == [1e-3, 1e-3, 5e-4, 5e-4, 2e-3]
    assert [row["stage_name"] for row in logged] == ["one", "one", "two", "two", "three"]
    assert [row["tasks"] for row in logged] == [["edit"], ["edit"], ["t2i"], ["t2i"], ["edit"]]


def test_a_stage_may_change_the_algorithm_s_numbers(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    stages = Staged((Stage("one", {"t2i": 1}, 1, algorithm={"num_sigmas": 3.0}), Stage("two", {"t2i": 1}, 1)))
    config = replace(
        make_config(tmp_path, SingleTask("t2i", 1)), algorithm=DiffusionNFT(ODE(2), num_sigmas=2), curriculum=stages
    )
    trainer = make_trainer(config, tiny_policy)
    seen: list[Any] = []
    learn = trainer._learn

    def watched(rollouts: list[Rollout]) -> dict[str, float]:
        seen.append(trainer.learner.algorithm)
        return learn(rollouts)

    trainer._learn = watched  # type: ignore[method-assign]
    trainer.train()
    assert seen == [DiffusionNFT(ODE(2), num_sigmas=3), DiffusionNFT(ODE(2), num_sigmas=2)]
    assert isinstance(seen[0].num_sigmas, int)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sigma": 3}, r"'one': DiffusionNFT: expected changes of its numbers .*'num_sigma'; did you mean 'num_si"),
        ({"advantage_std": 3}, r"stage 'one': .*got 'advantage_std'"),
        ({"beta": -1.0}, "stage 'one': DiffusionNFT: expected beta"),
    ],
)
def test_changes_that_do_not_fit_the_algorithm_are_refused_at_construction(
    tmp_path: Path, changes: dict[str, float], message: str
) -> None:
    stages = Staged((Stage("one", {"t2i": 1}, 1, algorithm=changes),))
    config = make_config(tmp_path, SingleTask("t2i", 1))
    with pytest.raises(ValueError, match=message):
        replace(config, algorithm=DiffusionNFT(ODE(2)), curriculum=stages)


def test_the_average_follows_the_current_weights(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    settings = LearnerSettings(1, ema_decay=0.75)
    trainer = make_trainer(make_config(tmp_path, SingleTask("t2i", 2), learner=settings), tiny_policy)
    base = versions(trainer, "ema")
    notes = recorded(trainer)
    for name, expected in base.items():
        for note in notes:
            expected = 0.75 * expected + 0.25 * note["current"][name]
            torch.testing.assert_close(note["ema"][name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_evaluations_use_the_average_where_there_is_one(
    tmp_path: Path, tiny_policy: ScenesPolicy, decay: float
) -> None:
    learner = LearnerSettings(1, ema_decay=decay)
    algorithm = FlowGRPO(FlowSDE(2), kl_coef=0.01)
    config = make_config(tmp_path, SingleTask("t2i", 2), learner=learner, learning_rate=1e-2, algorithm=algorithm)
    trainer = make_trainer(config, tiny_policy)
    trainer.train()
    row = next(r for r in read_evaluations(config.output_dir) if (r["task"], r["label"]) == ("t2i", "after t2i"))
    logged, task, found = read_scores(config.output_dir, row)["reward"], trainer.tasks["t2i"], {}
    used, other = ("ema", "current") if decay else ("current", "reference")
    for version in (used, other):
        with torch.no_grad(), trainer.weights.use(version):
            found[version] = evaluate(tiny_policy, task.make_envs(4), task.final, ODE(2)).reward.tolist()
    assert trainer.evaluated_version == used
    np.testing.assert_allclose(logged, found[used], rtol=1e-6)
    assert not np.allclose(logged, found[other], atol=1e-4)


def test_both_tasks_are_measured_before_during_and_after(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    stages = Staged((Stage("one", {"edit": 1}, 3), Stage("two", {"t2i": 1}, 2)))
    config = make_config(tmp_path, stages)
    make_trainer(config, tiny_policy).train()
    rows = read_evaluations(config.output_dir)
    found = [(row["iteration"], row["set"], row["label"], row["count"]) for row in rows if row["task"] == "t2i"]
    assert found == [
        (0, "final", "base", 4),
        (0, "tune", "", 3),
        (2, "tune", "", 3),
        (3, "final", "after one", 4),
        (4, "tune", "", 3),
        (5, "final", "after two", 4),
    ]
    assert [row["task"] for row in rows] == ["edit", "t2i"] * 6
    assert all(row["num_images"] == 2 and (config.output_dir / row["file"]).is_file() for row in rows)
    grid = json.loads((config.output_dir / "evaluations/prompts-edit.json").read_text())
    assert grid == [prompt.text for prompt in make_tasks()["edit"].final[:2]]
    assert (config.output_dir / "evaluations/sources-edit.png").is_file()


@pytest.mark.parametrize(
    ("rule", "iterations"),
    [
        ({"target": -1.0}, 2),
        ({"target": 1.0}, 7),
        ({"plateau": 2, "min_improvement": 10.0}, 4),
        ({"target": -1.0, "plateau": 1, "min_improvement": 10.0}, 2),
    ],
)
def test_a_target_or_a_plateau_ends_a_stage(
    tmp_path: Path, tiny_policy: ScenesPolicy, rule: dict[str, Any], iterations: int
) -> None:
    config = make_config(tmp_path, Staged((Stage("one", {"t2i": 1}, 7, **rule), Stage("two", {"edit": 1}, 1))))
    make_trainer(config, tiny_policy).train()
    assert [row["stage_name"] for row in read_metrics(config.output_dir)] == ["one"] * iterations + ["two"]
    labels = [(row["iteration"], row["label"]) for row in read_evaluations(config.output_dir) if row["label"]]
    assert labels[2::2] == [(iterations, "after one"), (iterations + 1, "after two")]


def test_stages_end_by_the_held_out_reward_only(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    def nothing(images: Images, prompts: Sequence[Prompt]) -> Any:
        return np.zeros(len(images), np.float32)

    def all_right(images: Images, prompts: Sequence[Prompt]) -> Any:
        return np.ones(len(images), np.float32)

    config = make_config(tmp_path, SingleTask("t2i", 4, target=0.5))
    make_trainer(config, tiny_policy, make_tasks(all_right, nothing)).train()
    assert len(read_metrics(config.output_dir)) == 4


def test_joint_trains_both_tasks_in_one_iteration(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    config = make_config(tmp_path, Joint(1), learner=LearnerSettings(1))
    trainer = make_trainer(config, tiny_policy)
    base = versions(trainer, "current")
    recorded(trainer)
    (row,) = read_metrics(config.output_dir)
    assert row["tasks"] == ["edit", "t2i"]
    assert math.isfinite(row["reward/edit"])
    assert math.isfinite(row["reward/t2i"])
    assert row["reward/edit"] != row["reward/t2i"]
    joint = versions(trainer, "current")

    # Each task's share is in the update: with no reward on the other, the weights are others.
    def only(task: str) -> Tensors:
        def reward(images: Images, prompts: Sequence[Prompt]) -> Any:
            values = redness(images, prompts)
            return np.where([prompt.id.startswith(task) for prompt in prompts], values, np.nan)

        policy = ScenesPolicy(tiny_policy.config)
        policy.parts.load_state_dict(start)
        other = make_trainer(replace(config, output_dir=tmp_path / task), policy, make_tasks(reward))
        other.train()
        return versions(other, "current")

    start = {f"transformer.{name}": tensor for name, tensor in base.items()}
    start |= {k: t for k, t in tiny_policy.parts.state_dict().items() if not k.startswith("transformer.")}
    edit, t2i = only("edit"), only("t2i")
    assert not same(joint, edit)
    assert not same(joint, t2i)
    assert not same(edit, t2i)


def test_rewards_are_weighed_by_their_schedules(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    def parts(images: Images, prompts: Sequence[Prompt]) -> Scores:
        ones = np.ones(len(images), np.float32)
        return Scores(ones, {"a": 10 * ones, "b": 100 * ones})

    weights = {"a": Linear(0.0, 1.0, 2), "total": Step((1.0, 0.0), (2,))}
    config = make_config(tmp_path, Staged((Stage("one", {"t2i": 1}, 3, reward_weights=weights),)))
    notes = recorded(make_trainer(config, tiny_policy, make_tasks(parts)))
    found = [np.unique(note["rewards"]["t2i"]).tolist() for note in notes]
    assert found == [[1.0], [6.0], [10.0]]
    rows = read_metrics(config.output_dir)
    assert [row["reward/t2i"] for row in rows] == [1, 6, 10]
    assert [row["reward/t2i/b"] for row in rows] == [100, 100, 100]
    assert [row["zero_std_ratio/t2i"] for row in rows] == [1, 1, 1]


def make_rollout(policy: ScenesPolicy, rewards: Sequence[float], **components: Sequence[float]) -> Rollout:
    condition: Condition = encode_asks(policy, [Ask("two squares")] * len(rewards))
    trajectory: Trajectory = denoise(policy, condition, ODE(1), (), range(len(rewards)))
    values = {name: torch.tensor(value) for name, value in components.items()}
    ids, zeros = torch.arange(len(rewards)) // 2, torch.zeros(len(rewards))
    return Rollout((trajectory,), torch.tensor(rewards), values, ids, zeros)


def test_weighted_by_hand(tiny_policy: ScenesPolicy) -> None:
    rollout = make_rollout(tiny_policy, [1.0, 2.0, math.nan], a=[1.0, math.nan, 1.0], b=[0.0, 0.5, 1.0])

    def rewards(weights: Mapping[str, float]) -> torch.Tensor:
        return weighted([rollout], weights)[0].rewards

    assert torch.equal(rewards({})[:2], torch.tensor([1.0, 2.0]))
    assert rewards({"b": 2.0, "total": 3.0}).tolist()[:2] == [3.0, 7.0]
    # What is not available stays so, whichever part of it is missing; what has no weight is not missed.
    assert rewards({"b": 1.0}).isnan().tolist() == [False, False, True]
    assert rewards({"a": 1.0}).isnan().tolist() == [False, True, True]
    assert rewards({"a": 0.0}).isnan().tolist() == [False, False, True]
    assert rewards({"total": 0.0, "b": 1.0}).tolist() == [0.0, 0.5, 1.0]


def test_a_task_without_a_component_goes_without_it(tiny_policy: ScenesPolicy) -> None:
    edit = make_rollout(tiny_policy, [1.0, 1.0], preservation=[0.5, 1.0])
    t2i = make_rollout(tiny_policy, [1.0, 2.0], official=[1.0, 1.0])
    first, second = weighted([edit, t2i], {"preservation": 2.0})
    assert first.rewards.tolist() == [2.0, 3.0]
    assert second.rewards.tolist() == [1.0, 2.0]


def test_normalised_before_they_are_summed_by_hand(tiny_policy: ScenesPolicy) -> None:
    """Two groups of two. A component of a hundred times the spread counts as much as the total, and no more."""
    rollout = make_rollout(tiny_policy, [1.0, 3.0, 2.0, 2.0], a=[300.0, 100.0, 0.0, 200.0])
    (found,) = weighted([rollout], {"total": 1.0, "a": 0.5}, "normalize_then_sum")
    assert found.rewards.tolist() == [-1 + 0.5, 1 - 0.5, -0.5, 0.5]


def test_the_log_and_the_curriculum_see_sums_whatever_the_aggregation(
    tmp_path: Path, tiny_policy: ScenesPolicy
) -> None:
    def parts(images: Images, prompts: Sequence[Prompt]) -> Scores:
        values = redness(images, prompts)
        return Scores(values, {"a": values})

    stage = Stage("one", {"t2i": 1}, 1, reward_weights={"a": Constant(1.0)})
    config = make_config(tmp_path, Staged((stage,)), aggregation="normalize_then_sum")
    trainer = make_trainer(config, tiny_policy, make_tasks(parts))
    trainer.train()
    row = read_metrics(config.output_dir)[0]
    assert row["reward/t2i"] != pytest.approx(0, abs=1e-6)
    assert row["advantage_abs_mean/t2i"] > 0


@declare(RewardTraits(scope="group"))
def darkest(images: Images, prompts: Sequence[Prompt]) -> Any:
    """Share of the group that is lighter."""
    assert len(images) == 4
    light = images.mean((1, 2, 3))
    return np.asarray((light[:, None] < light).mean(1), np.float32)


@pytest.mark.parametrize("chunk_size", [4, 8])
def test_a_reward_that_compares_a_group_gets_it_whole(
    tmp_path: Path, tiny_policy: ScenesPolicy, chunk_size: int
) -> None:
    learner = LearnerSettings(1, ema_decay=0.5)
    config = make_config(tmp_path, SingleTask("t2i", 2), chunk_size=chunk_size, learner=learner)
    trainer = make_trainer(config, tiny_policy, make_tasks(darkest, redness))
    trainer.train()
    assert [row["missing_ratio/t2i"] for row in read_metrics(config.output_dir)] == [0, 0]


def test_a_reward_that_compares_groups_is_refused_where_it_would_not_get_one(
    tmp_path: Path, tiny_policy: ScenesPolicy
) -> None:
    with pytest.raises(ValueError, match=r"held_out_reward that scores every image by itself.*got darkest"):
        make_tasks(darkest)
    config = make_config(tmp_path, SingleTask("t2i", 1), chunk_size=2)
    with pytest.raises(
        ValueError, match=r"chunk_size: expected a multiple of group_size 4, for darkest .*; 4 would do"
    ):
        make_trainer(config, tiny_policy, make_tasks(darkest, redness))


def blueness(images: Images, prompts: Sequence[Prompt]) -> Any:
    """What redness is not."""
    return -redness(images, prompts)


def test_the_trained_reward_is_kept_beside_the_held_out_one_and_compared(
    tmp_path: Path, tiny_policy: ScenesPolicy
) -> None:
    config = make_config(tmp_path, SingleTask("t2i", 2))
    make_trainer(config, tiny_policy, make_tasks(redness, blueness)).train()
    for row in read_evaluations(config.output_dir):
        scores = read_scores(config.output_dir, row)
        np.testing.assert_array_equal(scores["trained"], -scores["reward"])
        assert row["agreement"] == pytest.approx(-1)
        assert row["trained"] == pytest.approx(-row["reward"])


def test_what_a_reward_counts_is_logged(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    cached = Cached(redness, tmp_path / "cache.sqlite", fingerprint="redness 1")
    trainer = make_trainer(make_config(tmp_path, SingleTask("t2i", 1)), tiny_policy, make_tasks(cached))
    trainer.train()
    (row,) = read_metrics(trainer.config.output_dir)
    drawn = trainer.config.num_prompts * trainer.config.group_size
    asked = row["statistics/t2i/cache/hits"] + row["statistics/t2i/cache/misses"]
    assert asked >= drawn
    assert "statistics/edit/cache/hits" not in row


def hacked_run(
    folder: Path, policy: ScenesPolicy, tasks_of: Callable[[Reward, Reward], dict[str, Task]]
) -> tuple[TrainConfig, str]:
    """A run whose trained reward rises by the iteration while the other one falls, and what it said."""

    def trained(images: Images, prompts: Sequence[Prompt]) -> Any:
        return redness(images, prompts) + np.float32(trainer.run.iteration)

    def held_out(images: Images, prompts: Sequence[Prompt]) -> Any:
        return redness(images, prompts) - np.float32(trainer.run.iteration)

    config = make_config(folder, SingleTask("t2i", 2))
    stream = io.StringIO()
    console = Console(file=stream, width=300)
    trainer = Trainer(config, tasks_of(trained, held_out), policy, Progress(config, console))
    trainer.train()
    return config, stream.getvalue()


def test_a_hacked_reward_is_said_where_it_happens(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    config, said = hacked_run(tmp_path, tiny_policy, make_tasks)
    assert "warning: t2i: since iteration 0 the trained reward rose" in said
    assert "The reward is being hacked" in write_report(config.output_dir).read_text()


def test_a_member_that_is_only_logged_is_watched_too(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    config, said = hacked_run(
        tmp_path,
        tiny_policy,
        lambda weighed, logged: make_tasks(WeightedSum({"red": weighed}, {"red": 1.0}, {"pale": logged})),
    )
    assert re.search(r"warning: t2i: since iteration 0 the trained reward rose .* the held-out one \(pale\) fell", said)
    page = write_report(config.output_dir).read_text()
    assert "The reward is being hacked" in page
    assert "trained reward and held-out reward pale on the tuning prompts" in page
    assert "rank correlation of the two over the prompts" in page
    rows = [row for row in read_evaluations(config.output_dir) if row["set"] == "tune"]
    assert [row["held_out/pale"] for row in rows] == pytest.approx(
        [row["reward"] - 2 * row["iteration"] for row in rows]
    )
    assert [row["agreement/pale"] for row in rows] == pytest.approx([1.0] * len(rows))


def test_a_weighed_component_is_watched_where_the_total_falls(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    """With another reward that measures, and with a member that is only logged."""

    def trained(images: Images, prompts: Sequence[Prompt]) -> Scores:
        found, moved = redness(images, prompts), np.float32(trainer.run.iteration)
        return Scores(found - moved, {"red": found + moved})

    def held_out(images: Images, prompts: Sequence[Prompt]) -> Any:
        return redness(images, prompts) - np.float32(trainer.run.iteration)

    summed = WeightedSum({"own": trained}, {"own": 1.0}, {"pale": held_out})
    for kind, tasks, part in (
        ("measured", make_tasks(trained, held_out), "red"),
        ("logged", make_tasks(summed), "own/red"),
    ):
        curriculum = Staged((Stage("one", {"t2i": 1.0}, 2, reward_weights={part: Constant(5.0)}),))
        config = make_config(tmp_path / kind, curriculum)
        stream = io.StringIO()
        trainer = Trainer(config, tasks, tiny_policy, Progress(config, Console(file=stream, width=300)))
        trainer.train()
        assert f"warning: t2i: since iteration 0 the trained reward ({part}) rose" in stream.getvalue()
        assert f"the trained reward ({part}) rose" in write_report(config.output_dir).read_text()


@pytest.mark.parametrize("part", ["pale", "pale/red"])
def test_what_is_held_out_cannot_be_weighed(part: str, tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    tasks = make_tasks(WeightedSum({"red": redness}, {"red": 1.0}, {"pale": redness}))
    curriculum = Staged((Stage("one", {"t2i": 1.0}, 2, reward_weights={part: Step((0.0, 0.5), (1,))}),))
    config = make_config(tmp_path, curriculum)
    with pytest.raises(
        ValueError, match=f"expected no weight of '{part}', which is held out of the .* 'edit', got 0.5"
    ):
        Trainer(config, tasks, tiny_policy, Progress(config))


def test_a_run_beside_which_nothing_is_held_out_says_so(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    said = {}
    truth = {name: replace(task, is_ground_truth=True) for name, task in make_tasks().items()}
    for name, tasks in {"alone": make_tasks(), "watched": make_tasks(redness, darkest_of_all), "truth": truth}.items():
        config = make_config(tmp_path / name, SingleTask("t2i", 1))
        stream = io.StringIO()
        Trainer(config, tasks, tiny_policy, Progress(config, Console(file=stream, width=300))).train()
        said[name] = "warning: t2i: no alarm of reward hacking, for nothing is held out" in stream.getvalue()
    assert said == {"alone": True, "watched": False, "truth": False}


def darkest_of_all(images: Images, prompts: Sequence[Prompt]) -> Any:
    return -redness(images, prompts)


def test_a_reward_that_compares_groups_is_said_to_be_unwatched(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    config = make_config(tmp_path, SingleTask("t2i", 1))
    stream = io.StringIO()
    console = Console(file=stream, width=300)
    Trainer(config, make_tasks(darkest, redness), tiny_policy, Progress(config, console)).train()
    assert "warning: t2i: no alarm of reward hacking, for darkest compares the images of a group" in stream.getvalue()


def test_what_counts_as_success_is_named(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    """The total is no strict success, and another detector's is not the published one's."""

    def detected(images: Images, prompts: Sequence[Prompt]) -> Scores:
        return Scores(redness(images, prompts), {"strict_not_comparable": np.ones(len(images), np.float32)})

    tasks = make_tasks(detected)
    # A mean reward is no share of anything, and told as it is.
    kinds = {"strict_not_comparable": ("strict not comparable", ", %"), "strict": ("mean reward", "")}
    for success, (name, unit) in kinds.items():
        config = make_config(tmp_path / success, SingleTask("t2i", 1))
        task = replace(tasks["t2i"], success=success)
        stream = io.StringIO()
        Trainer(config, {"t2i": task}, tiny_policy, Progress(config, Console(file=stream, width=300))).train()
        told = r"100\.0 % of" if unit else r"-?0\.\d{3} of"
        assert re.search(f"held-out t2i {name} {told}", stream.getvalue())
        page = write_report(config.output_dir).read_text().lower()
        assert f"held-out {name}" in page
        assert "strict success" not in page
        assert f"Text-to-image ({name}{unit})" in format_table(interference_table(config.output_dir))


def test_prompts_that_do_not_fill_chunks_are_refused_at_construction() -> None:
    with pytest.raises(
        ValueError, match=r"stage 't2i': its 7 prompts of 't2i' x group_size 12 do not fill chunks of 24"
    ):
        TrainConfig(curriculum=pdtr_curriculum(4, 4, rehearsal=0.1))


def test_an_unknown_component_is_named(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    weights = {"preservaton": Linear(0.0, 1.0, 2)}
    config = make_config(tmp_path, Staged((Stage("one", {"t2i": 1}, 3, reward_weights=weights),)))
    with pytest.raises(ValueError, match=r"reward_weights: expected some of .*, got 'preservaton'"):
        make_trainer(config, tiny_policy).train()


def test_rollout_metrics_by_hand(tiny_policy: ScenesPolicy) -> None:
    rewards = [1.0, 3.0, 2.0, math.nan, 5.0, 5.0]
    rollout = make_rollout(tiny_policy, rewards, a=[0.0, 1.0, math.nan, math.nan, 1.0, 1.0])
    row = rollout_metrics("t2i", rollout.with_advantages(torch.tensor([1.0, -1.0, 0.0, 0.0, 0.5, -0.5])), 2)
    assert row == {
        "reward/t2i": pytest.approx(16 / 5),
        "reward_std/t2i": pytest.approx(1.6),
        "group_std/t2i": pytest.approx(1 / 3),
        "zero_std_ratio/t2i": pytest.approx(2 / 3),
        "missing_ratio/t2i": pytest.approx(1 / 6),
        "advantage_abs_mean/t2i": pytest.approx(0.5),
        "reward/t2i/a": 0.75,
        "reward_std/t2i/a": pytest.approx(math.sqrt(3) / 4),
        # The groups are (0, 1), one without any, and (1, 1).
        "group_std/t2i/a": pytest.approx(0.25),
        "zero_std_ratio/t2i/a": pytest.approx(0.5),
        "missing_ratio/t2i/a": pytest.approx(1 / 3),
    }


def sometimes(images: Images, prompts: Sequence[Prompt]) -> Any:
    """Redness; a judge that fails on the second half of every batch."""
    values = redness(images, prompts).copy()
    values[len(values) // 2 :] = np.nan
    return values


def test_missing_rewards_are_counted_and_the_run_goes_on(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    config = make_config(tmp_path, SingleTask("t2i", 2))
    trainer = make_trainer(config, tiny_policy, make_tasks(sometimes))
    notes = recorded(trainer)
    rows = read_metrics(config.output_dir)
    assert [row["missing_ratio/t2i"] for row in rows] == [0.5, 0.5]
    assert all(math.isfinite(row["reward/t2i"]) and row["skipped_updates"] == 0 for row in rows)
    assert all(tensor.isfinite().all() for tensor in notes[-1]["current"].values())
    assert not same(notes[0]["current"], notes[1]["current"])
    evaluation = read_evaluations(config.output_dir)[0]
    assert (evaluation["count"], evaluation["missing"]) == (4, 2)


def test_a_judge_that_is_down_for_one_chunk_is_counted_with_its_reason(
    tmp_path: Path, tiny_policy: ScenesPolicy
) -> None:
    calls = []

    def judge(images: Images, prompts: Sequence[Prompt]) -> Scores:
        calls.append(trainer.run.iteration)
        # No evaluation is made after the first iteration: the first of the second's two chunks.
        if calls.count(1) == 1 and calls[-1] == 1:
            raise Unavailable("the judge is down")
        return Scores(redness(images, prompts), {"light": images.mean((1, 2, 3))})

    config = make_config(tmp_path, SingleTask("t2i", 3))
    trainer = make_trainer(config, tiny_policy, make_tasks(judge, redness))
    trainer.train()
    _, first, second = read_metrics(config.output_dir)
    assert (first["missing_ratio/t2i"], first["missing_reason/t2i"]) == (0.5, "the judge is down")
    assert math.isfinite(first["reward/t2i/light"])
    assert "missing_reason/t2i" not in second


def test_a_run_stops_where_too_many_rewards_are_missing_and_goes_on_where_it_was(
    tmp_path: Path, tiny_policy: ScenesPolicy
) -> None:
    settings = MissingSettings(max_share=0.25, window=4)
    config = make_config(tmp_path, SingleTask("t2i", 4), missing=settings, checkpoint_every=1)
    trainer = make_trainer(config, tiny_policy, make_tasks(sometimes))
    # Half of each iteration: 0.5, 1.0 and at the third 1.5 of a window's 4, which is more than a quarter.
    with pytest.raises(TooManyMissing, match=r"last 3 iterations 50% are not available.*without a reason.*--resume"):
        trainer.train()
    assert trainer.run.iteration == 2
    again = make_trainer(config, tiny_policy, make_tasks(sometimes))
    again.restore(checkpoints(config.output_dir / "checkpoints")[-1])
    with pytest.raises(TooManyMissing, match="last 3 iterations"):
        again.train()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("algorithm", [FlowGRPO(FlowSDE(2), kl_coef=0.1), DiffusionNFT(ODE(2), old_rate=0.2)])
def test_an_iteration_without_any_reward_changes_nothing(
    tmp_path: Path, tiny_policy: ScenesPolicy, algorithm: Any
) -> None:
    def fails_in_the_middle(images: Images, prompts: Sequence[Prompt]) -> Any:
        # No evaluation is made after the first iteration.
        return redness(images, prompts) if trainer.run.iteration != 1 else np.full(len(images), np.nan)

    tasks = make_tasks(fails_in_the_middle, redness)
    config = make_config(tmp_path, SingleTask("t2i", 3), algorithm=algorithm)
    trainer = make_trainer(config, tiny_policy, tasks)
    notes = recorded(trainer)
    rows = read_metrics(config.output_dir)
    assert [row["missing_ratio/t2i"] for row in rows] == [0, 1, 0]
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0]
    assert rows[1]["reward/t2i"] is rows[1]["reward_std/t2i"] is None
    for version in ("current", "ema", "reference"):
        assert same(notes[0][version], notes[1][version])
    assert [note["steps"] for note in notes] == [{2}, {2}, {4}]
    assert not same(notes[1]["current"], notes[2]["current"])


@pytest.mark.filterwarnings("error")
def test_a_run_whose_judge_never_answers_ends_where_it_began(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    def silent(images: Images, prompts: Sequence[Prompt]) -> Any:
        return np.full(len(images), np.nan, np.float32)

    config = make_config(tmp_path, SingleTask("edit", 2, target=0.0), checkpoint_every=1)
    trainer = make_trainer(config, tiny_policy, make_tasks(silent))
    base = versions(trainer, "current")
    trainer.train()
    assert same(versions(trainer, "current"), base)
    assert [row["strict"] for row in read_evaluations(config.output_dir)] == [None] * 8
    # There is a checkpoint to go on from, of an optimiser that has not moved yet.
    again = make_trainer(config, tiny_policy, make_tasks(silent))
    again.restore(checkpoints(config.output_dir / "checkpoints")[-1])
    assert again.run.iteration == 2


def test_a_configuration_gives_the_same_bits_twice(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    tiny_policy.save(tmp_path / "base")
    # One object for both: a run leaves its configuration, the curriculum in it included, as it was given.
    config = make_config(tmp_path, Staged((Stage("one", {"edit": 1}, 2), Stage("two", {"t2i": 1}, 2))))
    states = []
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        run = replace(config, output_dir=tmp_path / name, seed=seed)
        trainer = make_trainer(run, ScenesPolicy.load(tmp_path / "base"))
        trainer.train()
        states.append(trainer.weights.state())
        assert len(read_metrics(run.output_dir)) == 4
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_train_writes_the_averaged_policy_and_the_report(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    tiny_policy.save(tmp_path / "base")
    config = make_config(tmp_path, SingleTask("t2i", 2), checkpoint_every=2, learning_rate=1e-2)
    report = train(config, make_tasks(), recipe="tiny")
    assert report.is_file()
    (last,) = checkpoints(config.output_dir / "checkpoints")
    saved, state = load_file(config.output_dir / "policy/model.safetensors"), load_file(last / "tensors.safetensors")
    name = "proj_out.weight"
    assert torch.equal(saved[f"transformer.{name}"], state[f"weights.ema.{name}"])
    assert not torch.equal(saved[f"transformer.{name}"], state[f"weights.current.{name}"])
    content = json.loads((config.output_dir / "config.json").read_text())
    assert (content["recipe"], content["seed"], content["config"]["curriculum"]["task"]) == ("tiny", 0, "t2i")


def test_a_policy_trained_with_lora_loads_as_any_other(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    tiny_policy.save(tmp_path / "base")
    changes: dict[str, Any] = {"lora": LoraSettings(2, 4), "learning_rate": 1e-2}
    config = make_config(tmp_path, SingleTask("t2i", 2), **changes)
    train(config, make_tasks())
    policy, task = ScenesPolicy.load(config.output_dir / "policy"), make_tasks()["t2i"]
    assert list(policy.parts.state_dict()) == list(tiny_policy.parts.state_dict())
    row = next(r for r in read_evaluations(config.output_dir) if (r["task"], r["label"]) == ("t2i", "after t2i"))
    measured = {
        name: evaluate(one, task.make_envs(4), task.final, ODE(2)).reward
        for name, one in (("saved", policy), ("base", tiny_policy))
    }
    logged = read_scores(config.output_dir, row)["reward"]
    np.testing.assert_allclose(measured["saved"], logged, atol=1e-4)
    assert not np.allclose(measured["base"], logged, atol=1e-4)


def test_runs_are_not_written_over_and_not_resumed_from_nothing(tmp_path: Path, tiny_policy: ScenesPolicy) -> None:
    config = make_config(tmp_path, SingleTask("t2i", 1))
    with pytest.raises(ValueError, match="expected a run to resume, found none; leave --resume out to start it"):
        train(config, make_tasks(), resume=True)
    assert not config.output_dir.exists()
    with pytest.raises(
        ValueError, match=r"base: expected the folder of a run or of a policy, got no folder of that name"
    ):
        train(config, make_tasks())
    # A start that failed leaves nothing in the way of the next.
    tiny_policy.save(tmp_path / "base")
    train(config, make_tasks())
    before = {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*")}
    with pytest.raises(ValueError, match=r"run: expected a new folder, got one that holds a run; pass --resume, or"):
        train(config, make_tasks())
    assert {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*")} == before
