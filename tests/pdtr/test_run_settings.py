"""What a run was started with, and what it may go on with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from agents.algorithms.diffusion_nft import DiffusionNFT
from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import LearnerSettings
from agents.samplers import FlowSDE
from experiments.published_rewards import PublishedRewards
from experiments.scenes_judge_reward import JudgeRewards
from experiments.served_rewards import EditJudge, RemoteScorer
from pdtr.config import TrainConfig
from pdtr.curriculum import pdtr_curriculum
from pdtr.processes import ProcessSettings
from pdtr.run_settings import check_same, plain, write_settings

JUDGED = PublishedRewards(edit_by="judge", judge=EditJudge(urls=("http://127.0.0.1:1/v1",)))
SERVED = PublishedRewards(t2i_by="remote", t2i_remote=RemoteScorer("http://127.0.0.1:1"))


@dataclass(frozen=True)
class OwnRewards:
    """As a user writes it: one setting that matters and one that does not."""

    scale: float = 1.0
    cache: Path = field(default=Path("here"), metadata={"may_change": True})

    def make_rewards(self) -> dict[str, Any]:
        return {}


FREE = (
    TrainConfig(num_threads=7, output_dir=Path("elsewhere"), checkpoint_every=3, keep_checkpoints=1),
    TrainConfig(curriculum=pdtr_curriculum(50, 50), processes=ProcessSettings("fsdp2")),
    TrainConfig(learner=LearnerSettings(sum_at_last_chunk=True)),
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
    ],
)
def test_a_run_goes_on_with_servers_elsewhere(before: Any, after: Any) -> None:
    check_same(plain(TrainConfig(rewards=before)), TrainConfig(rewards=after))


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


def test_settings_are_written_once(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=tmp_path)
    write_settings(config, "mine")
    written = (tmp_path / "config.json").read_bytes()
    assert json.loads(written)["config"] == plain(config)
    write_settings(replace(config, num_threads=5), "mine")
    assert (tmp_path / "config.json").read_bytes() == written
    with pytest.raises(ValueError, match="got seed = 3"):
        write_settings(replace(config, seed=3), "mine")
