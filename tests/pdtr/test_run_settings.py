"""What a run was started with, and what it may go on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import LearnerSettings
from agents.policies.backbone import BackboneSettings
from agents.samplers import FlowSDE
from envs.prompts import FixedPool
from experiments.published_rewards import EditRewardWeights, PublishedRewards
from experiments.scenes_judge_reward import JudgeRewards
from experiments.served_rewards import EditJudge, RemoteScorer
from pdtr.config import EvaluationConfig, TrainConfig
from pdtr.curriculum import pdtr_curriculum
from pdtr.missing import MissingSettings
from pdtr.processes import ProcessSettings
from pdtr.run_settings import check_same, check_settings, identities, plain, write_settings
from pdtr.tasks import Task
from rewards.base import Prompt, Reward, RewardTraits, declare
from rewards.compose import WeightedSum

JUDGED = PublishedRewards(edit_by="judge", judge=EditJudge(urls=("http://127.0.0.1:1/v1",)))
SERVED = PublishedRewards(t2i_by="remote", t2i_remote=RemoteScorer("http://127.0.0.1:1"))


PICTURES = BackboneSettings(64, 64)


@dataclass(frozen=True)
class Part:
    """One of several settings of a reward of one's own."""

    weight: float = 1.0
    server: str = field(default="here", metadata={"may_change": True})
    newer: int = 3


@dataclass(frozen=True)
class OwnRewards:
    """As a user writes it: one setting that matters and one that does not."""

    scale: float = 1.0
    cache: Path = field(default=Path("here"), metadata={"may_change": True})
    parts: Mapping[str, Part] = field(default_factory=dict)
    several: tuple[Part, ...] = ()

    def make_rewards(self) -> dict[str, Any]:
        return {}


FREE = (
    TrainConfig(num_threads=7, output_dir=Path("elsewhere"), checkpoint_every=3, keep_checkpoints=1),
    TrainConfig(curriculum=pdtr_curriculum(50, 50), processes=ProcessSettings("fsdp2")),
    TrainConfig(learner=LearnerSettings(sum_at_last_chunk=True)),
    TrainConfig(missing=MissingSettings(max_share=0.9, window=3)),
    TrainConfig(evaluation=EvaluationConfig(chunk_size=7)),
)


@pytest.mark.parametrize("config", FREE)
def test_how_a_run_goes_on_may_change(config: TrainConfig) -> None:
    check_same(plain(TrainConfig()), config)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (JudgeRewards("http://127.0.0.1:1/v1"), JudgeRewards("http://127.0.0.1:2/v1", max_in_flight=3)),
        (JUDGED, replace(JUDGED, judge=EditJudge(urls=("http://127.0.0.1:2/v1", "http://127.0.0.1:3/v1")))),
        (SERVED, replace(SERVED, t2i_remote=RemoteScorer("http://127.0.0.1:2", deadline_seconds=9.0))),
        (OwnRewards(), OwnRewards(cache=Path("there"))),
        (OwnRewards(parts={"a": Part()}), OwnRewards(parts={"a": Part(server="there")})),
    ],
)
def test_a_run_goes_on_with_servers_elsewhere(before: Any, after: Any) -> None:
    check_same(plain(TrainConfig(rewards=before)), TrainConfig(rewards=after))


def test_memory_and_speed_of_a_published_model_may_change() -> None:
    kept = {"offload_encoders": False, "cached_prompts": 2, "slice_vae": False, "gradient_checkpointing": True}
    check_same(plain(TrainConfig(backbone=PICTURES)), TrainConfig(backbone=replace(PICTURES, **kept)))


def test_what_nobody_asks_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, asked = plain(TrainConfig(rewards=PublishedRewards())), plain(TrainConfig(rewards=JUDGED))
    monkeypatch.setenv("PDTR_JUDGE_MODEL", "another")
    check_same(recorded, TrainConfig(rewards=PublishedRewards()))
    with pytest.raises(ValueError, match=r"got rewards\.judge\.model = 'another' where the run has ''"):
        check_same(asked, TrainConfig(rewards=replace(JUDGED, judge=EditJudge(JUDGED.judge.urls))))
    # Weights that a judge stands in for; those that reward are compared.
    mine = EditRewardWeights("mine")
    check_same(asked, TrainConfig(rewards=replace(JUDGED, judge=EditJudge(model=""), edit=mine)))
    with pytest.raises(ValueError, match=r"got rewards\.edit = EditRewardWeights where the run has None"):
        check_same(recorded, TrainConfig(rewards=PublishedRewards(edit=mine)))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"learning_rate": 0.5}, r"got learning_rate = 0\.5 where the run has 0\.0001"),
        ({}, {"algorithm": FlowGRPO(FlowSDE(2))}, r"got algorithm = FlowGRPO where the run has DiffusionNFT"),
        ({}, {"algorithm": DiffusionNFT(beta=0.3)}, r"got algorithm\.beta = 0\.3 where the run has 1\.0"),
        (
            {"rewards": JUDGED},
            {"rewards": replace(JUDGED, judge=replace(JUDGED.judge, templates=("a.v1", "b.v1")))},
            r"got rewards\.judge\.templates = \['a\.v1', 'b\.v1'\] where the run has \['edit_overall\.v1'\]",
        ),
        ({"rewards": OwnRewards()}, {"rewards": OwnRewards(2.0)}, r"got rewards\.scale = 2\.0 where the run has 1\.0"),
        (
            {"rewards": OwnRewards(parts={"a": Part()})},
            {"rewards": OwnRewards(parts={"a": Part(2.0, server="there")})},
            r"got rewards\.parts\.a\.weight = 2\.0 where the run has 1\.0",
        ),
        (
            {"rewards": OwnRewards(several=(Part(), Part()))},
            {"rewards": OwnRewards(several=(Part(), Part(2.0)))},
            r"got rewards\.several\[1\]\.weight = 2\.0 where the run has 1\.0",
        ),
        ({"missing": MissingSettings()}, {"missing": MissingSettings("raise")}, r"got missing\.on_missing = 'raise'"),
        ({"backbone": PICTURES}, {"backbone": replace(PICTURES, compile=True)}, r"got backbone\.compile = True"),
        ({}, {"rewards": OwnRewards()}, r"got rewards = OwnRewards where the run has GroundTruth"),
        ({"lora": None}, {"base": Path("other")}, r"got base = 'other' where the run has None; give its own value"),
    ],
)
def test_what_comes_of_a_run_may_not(before: dict[str, Any], after: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_same(plain(TrainConfig(**before)), TrainConfig(**after))


def test_a_run_from_before_a_setting_was_there_has_its_default() -> None:
    config = TrainConfig(algorithm=FlowGRPO(FlowSDE(2)))
    recorded = plain(config)
    del recorded["algorithm"]["kl_divisor"]
    check_same(recorded, config)
    other = TrainConfig(algorithm=FlowGRPO(FlowSDE(2), kl_divisor="diffusion"))
    with pytest.raises(ValueError, match=r"algorithm\.kl_divisor = 'diffusion' where the run has 'variance'"):
        check_same(recorded, other)


def test_a_setting_that_is_newer_than_the_run_has_its_default_within_a_mapping_too() -> None:
    config = TrainConfig(rewards=OwnRewards(parts={"a": Part()}))
    recorded = plain(config)
    del recorded["rewards"]["parts"]["a"]["newer"]
    check_same(recorded, config)
    with pytest.raises(ValueError, match=r"got rewards\.parts\.a\.newer = 4 where the run has 3"):
        check_same(recorded, replace(config, rewards=OwnRewards(parts={"a": Part(newer=4)})))


def test_how_a_run_was_started_stays_and_how_it_goes_on_is_written_down(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=tmp_path)
    write_settings(config, "mine", {})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["config"] == plain(config)
    with pytest.raises(ValueError, match="got seed = 3"):
        check_settings(replace(config, seed=3), {})
    later = replace(config, num_threads=5, curriculum=pdtr_curriculum(50, 50))
    check_settings(later, {})
    write_settings(later, "other", {}, goes_on=True)
    assert json.loads((tmp_path / "config.json").read_text()) == {**written, "config": plain(later)}


def known(fingerprint: str, name: str = "judge") -> Reward:
    """A reward that is known by a fingerprint."""

    def judge(images: Any, prompts: Any) -> Any:
        return images

    judge.__name__ = name
    return declare(RewardTraits(fingerprint=fingerprint))(judge)


def edits(reward: Reward, held_out_reward: Reward | None = None) -> dict[str, Task]:
    pool, prompts = FixedPool([Prompt("a")]), [Prompt("b")]
    return {"edit": Task("edit", pool, reward, prompts, prompts, (8, 8), held_out_reward=held_out_reward)}


SAYS = json.dumps({"model": "a", "template": {"name": "t", "sha256": "1"}})
OTHER = json.dumps({"model": "b", "template": {"name": "t", "sha256": "1"}})


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            edits(known(SAYS)),
            edits(known(OTHER)),
            r"expected the reward of task 'edit' that .* with, judge \(model = 'a'\), got judge \(model = 'b'\); give",
        ),
        (edits(known("", "redness")), edits(known("", "blueness")), "started with, redness, got blueness;"),
        (edits(known("v1")), edits(known("v2")), r"judge \('v1'\), got judge \('v2'\)"),
        # Far from its start, where it is told no more.
        (edits(known("v" * 200 + "1")), edits(known("v" * 200 + "2")), "expected the reward of task 'edit'"),
        (
            edits(WeightedSum({"a": known(SAYS)}, {"a": 1.0})),
            edits(WeightedSum({"a": known(OTHER)}, {"a": 1.0})),
            r"WeightedSum \(rewards\.a\[2\]\.model = 'a'\), got",
        ),
        (edits(known("x"), known("v1")), edits(known("x"), known("v2")), "the held-out reward of task 'edit'"),
    ],
)
def test_a_run_does_not_go_on_with_another_reward(
    tmp_path: Path, before: dict[str, Task], after: dict[str, Task], told: str
) -> None:
    config = TrainConfig(output_dir=tmp_path)
    write_settings(config, "mine", before)
    check_settings(config, before)
    with pytest.raises(ValueError, match=rf'(?s)--resume.*{told}.*delete "rewards" from .*config\.json'):
        check_settings(config, after)


def test_rewards_are_compared_as_far_as_they_are_known(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=tmp_path)
    write_settings(config, "mine", edits(known("")))
    check_settings(config, edits(known("v1"), known("v1")))
    write_settings(config, "mine", edits(known("v1")))
    check_settings(config, edits(known("")))


def test_a_run_from_before_rewards_were_recorded_is_held_to_those_it_goes_on_with(tmp_path: Path) -> None:
    config, path = TrainConfig(output_dir=tmp_path), tmp_path / "config.json"
    write_settings(config, "mine", {})
    content = json.loads(path.read_text())
    del content["rewards"]
    path.write_text(json.dumps(content))
    tasks = edits(known("v1"))
    check_settings(config, tasks)
    write_settings(config, "mine", tasks, goes_on=True)
    assert json.loads(path.read_text())["rewards"] == identities(tasks)
    with pytest.raises(ValueError, match="judge"):
        check_settings(config, edits(known("v2")))
