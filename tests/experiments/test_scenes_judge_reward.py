"""A run whose reward is a judge behind a server: refused without one, trained with one, and measured by the truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import judge_agreement
from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.tables import read_csv
from experiments.cli import main
from experiments.edit_reward_reading import rendered_edits
from experiments.recipes import find_recipe
from experiments.scenes_judge_reward import JudgeRewards
from pdtr.config import TrainConfig
from pdtr.curriculum import SingleTask
from pdtr.launch import train
from pdtr.reward_source import GroundTruth
from pdtr.tasks import TRAINED, scenes_tasks
from rewards.base import Prompt
from rewards.edit_reward_data import ScoredEdit, shard_path, write_shard
from rewards.scoring import score
from tests.rewards.judges.fake_server import FakeServer, Reply, Request, as_json, pictures, says

NOBODY = "http://127.0.0.1:9/v1"


def answer(request: Request) -> Reply:
    """Bright pictures are good ones; who is asked for letters says A."""
    if request.path == "/v1/models":
        return as_json({"data": [{"id": "judge"}]})
    if "Result A" in str(request.body):
        return says({"A": 0.9, "B": 0.1})
    brightness = float(pictures(request)[-1].mean()) / 255
    return says({"0": 1 - brightness, "5": brightness})


def test_without_a_server_it_says_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["train", "pdtr_scenes_judge", "--rewards.url", NOBODY, "--output-dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert NOBODY in error
    assert "pdtr judge serve" in error
    # Nothing was begun: the same command works once there is a server.
    assert not (folder / "config.json").exists()


def test_address_and_model_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDTR_JUDGE_URL", NOBODY)
    monkeypatch.setenv("PDTR_JUDGE_MODEL", "one")
    rewards = find_recipe("pdtr_scenes_judge")().rewards
    assert isinstance(rewards, JudgeRewards)
    assert (rewards.url, rewards.model) == (NOBODY, "one")


def test_a_model_that_is_not_served_is_named() -> None:
    with FakeServer(answer) as server, pytest.raises(ValueError, match="the nearest is 'judge'"):
        JudgeRewards(server.url, "jugde").make_rewards()


def test_a_judge_that_says_something_else_is_refused() -> None:
    def chatter(request: Request) -> Reply:
        return answer(request) if request.path == "/v1/models" else says({"Well": 0.9, "4": 0.1})

    with FakeServer(chatter) as server, pytest.raises(ValueError, match=r"scenes_edit.v1.*label mass 0\.1"):
        JudgeRewards(server.url).make_rewards()


def test_several_servers_share_the_calls() -> None:
    with FakeServer(answer) as first, FakeServer(answer) as second:
        rewards = JudgeRewards(f"{first.url}, {second.url}")
        with rewards.make_client() as client:
            judge = rewards.make_judge(client)
            assert client.base_urls == (first.url, second.url)
            found = score(judge, np.zeros((8, 8, 8, 3), np.uint8), [Prompt("a", (np.zeros((8, 8, 3), np.uint8),))] * 8)
            np.testing.assert_allclose(found.total, 0, atol=1e-6)
        counts = [sum(request.path == "/v1/chat/completions" for request in s.requests) for s in (first, second)]
    # One of each to try it out, and half of the others.
    assert counts == [5, 5]


@pytest.mark.parametrize("bad", [{"max_in_flight": 0}, {"min_label_mass": 2.0}])
def test_bad_settings_fail_where_they_are_made(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        JudgeRewards(**bad)  # type: ignore[arg-type]


def smallest(folder: Path, url: str) -> TrainConfig:
    """The recipe's judge in a run of one iteration."""
    config = find_recipe("smoke")()
    evaluation = replace(config.evaluation, num_prompts=6, num_final_prompts=6, every=1, num_grid=0)
    return replace(
        config,
        output_dir=folder,
        rewards=replace(find_recipe("pdtr_scenes_judge")().rewards, url=url),  # type: ignore[type-var]
        curriculum=SingleTask("edit", 1),
        evaluation=evaluation,
        num_threads=1,
    )


def test_a_run_trains_on_the_judge_and_is_measured_by_the_truth(tmp_path: Path) -> None:
    with FakeServer(answer) as server:
        train(smallest(tmp_path / "run", server.url))
        bodies = [request.body for request in server.requests if request.body]
        url = server.url
    assert len(bodies) >= 24
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["rewards"]
    assert recorded["class"] == "JudgeRewards"
    assert recorded["url"] == url
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    # The judge's grades are of brightness, which the ground truth has no opinion of.
    assert 0.5 < metrics["reward/edit"] < 1
    assert "strict" in (tmp_path / "run" / "evaluations.jsonl").read_text()
    assert TRAINED in (tmp_path / "run" / "evaluations.jsonl").read_text()


def test_rewards_in_both_places_are_refused(tmp_path: Path) -> None:
    config = smallest(tmp_path / "run", NOBODY)
    with pytest.raises(ValueError, match="got both"):
        train(config, scenes_tasks(6, 6))
    assert TrainConfig().rewards == GroundTruth()


def test_readouts_are_compared_with_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rendered_edits(np.random.default_rng(0), 12, 4)
    # Four edits a prompt; what the judge likes, brightness, is the truth here.
    edits = [
        ScoredEdit(
            str(i),
            str(i // 4),
            found[4 * (i // 4)].instruction,
            found[4 * (i // 4)].source,
            edit.image,
            {**edit.scores, "total": float(edit.image.mean()) / 255},
        )
        for i, edit in enumerate(found)
    ]
    write_shard(shard_path(tmp_path / "data", "test", 0), edits)
    with FakeServer(answer) as server:
        flags = ["--judge.url", server.url, "--data", str(tmp_path / "data"), "--results", str(tmp_path)]
        flags += ["--templates", "yes_no.v1", "pairwise_edit.v1", "--resamples", "20", "--num-edits", "10"]
        assert run_benchmark(judge_agreement.benchmark, flags) == 0
        asked = [request for request in server.requests if "yes" in str(request.body).lower()]
    rows = read_csv(tmp_path / judge_agreement.TABLE, judge_agreement.Figure)
    values = {(row.template, row.quantity): row for row in rows}
    # Whole prompts: eight of the ten.
    assert values["scenes_edit.v1", "Spearman"].n == 8
    assert values["scenes_edit.v1", "Spearman"].value == pytest.approx(1)
    assert values["scenes_edit.v1", "label mass"].value == pytest.approx(1)
    assert values["scenes_edit.v1", "largest difference of the retest"].value == 0
    # It never says yes or no, and always A: both are reported as they are.
    assert values["yes_no.v1", "available"].value == 0
    assert ("yes_no.v1", "Spearman") not in values
    assert values["pairwise_edit.v1", "pairs in order"].value == 0.5
    assert ("pairwise_edit.v1", "Spearman") not in values
    assert "label mass" in capsys.readouterr().out
    # The retest is of the same questions, in another order, and without the server's memory.
    rounds = [
        [request.body["messages"] for request in asked if ("cache_salt" in request.body) == is_retest]
        for is_retest in (False, True)
    ]
    assert sorted(map(str, rounds[0])) == sorted(map(str, rounds[1]))
    assert rounds[0] != rounds[1]
    assert judge_agreement._another_order([Prompt("", id=name) for name in "aabbccdd"]) != [*range(8)]


def test_no_server_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(shard_path(tmp_path, "test", 0), [ScoredEdit("0", "0", "a", *_blank(), _scores())])
    assert run_benchmark(judge_agreement.benchmark, ["--judge.url", NOBODY, "--data", str(tmp_path)]) == 2
    assert "pdtr judge serve" in capsys.readouterr().err


def _blank() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((48, 48, 3), np.uint8), np.ones((48, 48, 3), np.uint8)


def _scores() -> dict[str, float]:
    return {"success": 0.0, "preservation": 0.0, "total": 0.0}
