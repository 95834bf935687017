"""Published recipes rewarded by other machines: a judge behind several servers, and a reward server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.samplers import ODE
from envs.prompts import FixedPool
from experiments.cli import main
from experiments.flags import Usage, parse_run
from experiments.published_rewards import EditRewardWeights, OCRReader, PublishedRewards
from experiments.recipes import find_recipe
from experiments.served_rewards import TEMPLATES, EditJudge, RemoteScorer, find_template
from pdtr.config import TrainConfig
from pdtr.launch import run
from pdtr.logbook import read_metrics
from pdtr.run_settings import check_settings, write_settings
from pdtr.task_source import PromptFileTasks
from pdtr.tasks import Task
from rewards.base import Images, Prompt, Reward, RewardTraits, Values, declare, reward_name
from rewards.pixel import jpeg_compressibility
from rewards.remote import RemoteReward
from rewards.scoring import score
from rewards.server import RewardServer, ServerSettings
from rewards.service import ServiceSettings
from tests.rewards.judges.fake_server import FakeServer, Reply, Request, as_json, completion, parts, pictures, says

NOBODY, NO_SERVER = "http://127.0.0.1:9/v1", "http://127.0.0.1:9"
GREY = np.full((2, 8, 8, 3), 128, np.uint8)
EDITS = [Prompt("make it red", (GREY[0],))] * 2


def answer(request: Request) -> Reply:
    """Bright pictures are good ones."""
    if request.path == "/v1/models":
        return as_json({"data": [{"id": "judge"}]})
    brightness = float(pictures(request)[-1].mean()) / 255
    return says({"0": 1 - brightness, "5": brightness})


def judgements(server: FakeServer) -> int:
    return sum(request.path == "/v1/chat/completions" for request in server.requests)


@declare(RewardTraits(batch_size=4, fingerprint="bright v1"))
def bright(images: Images, prompts: Sequence[Prompt]) -> Values:
    assert all(prompt.source_images for prompt in prompts)
    return np.array([image.mean() for image in images], np.float32)


@pytest.fixture
def judges() -> Iterator[tuple[FakeServer, FakeServer]]:
    with FakeServer(answer) as first, FakeServer(answer) as second:
        yield first, second


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("PDTR_JUDGE_URL", "PDTR_JUDGE_MODEL", "PDTR_JUDGE_KEY", "PDTR_REWARD_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def flags(recipe: str, *arguments: str) -> TrainConfig:
    return parse_run(find_recipe(recipe)(), Usage("pdtr train"), arguments)[0]


def chosen(config: TrainConfig) -> PublishedRewards:
    assert isinstance(config.rewards, PublishedRewards)
    return config.rewards


def test_a_recipe_of_edits_is_judged_by_flags(folder: Path, judges: tuple[FakeServer, FakeServer]) -> None:
    urls = [server.url for server in judges]
    asked = ["--rewards.edit-by", "judge", "--rewards.judge.urls", *urls, "--rewards.judge.max-in-flight", "2"]
    rewards = chosen(flags("unipic2_pdtr", *asked))
    assert (rewards.judge.urls, rewards.judge.max_in_flight) == (tuple(urls), 2)
    reward = rewards.make_rewards()["edit"]
    # One real judgement of every server, before anything is written.
    assert [judgements(server) for server in judges] == [1, 1]
    found = score(reward, np.stack([np.zeros_like(GREY[0]), GREY[0]] * 4), EDITS[:1] * 8)
    np.testing.assert_allclose(found.total, [0, 128 / 255] * 4, atol=1e-6)
    assert min(judgements(server) for server in judges) > 1
    assert max(server.busiest for server in judges) <= 2


def test_edit_r1_is_judged_by_default_and_its_twin_by_weights() -> None:
    real = chosen(find_recipe("diffusion_nft_qwen_image_edit")())
    assert (real.edit_by, real.judge) == ("judge", EditJudge())
    for name in ("unipic2_pdtr", "unipic2_metaquery_pdtr", "flow_grpo_flux_kontext"):
        assert chosen(find_recipe(name)()).edit_by == "weights"
    # Its weights are a flag away.
    rewards = chosen(flags("diffusion_nft_qwen_image_edit", "--rewards.edit-by", "weights"))
    assert rewards.edit == EditRewardWeights()


def test_two_templates_are_viescore(folder: Path) -> None:
    grades = {"edit_success": 4, "restraint": 9, "naturalness": 9, "artifacts": 10}

    def rubric(request: Request) -> Reply:
        if request.path == "/v1/models":
            return as_json({"data": [{"id": "judge"}]})
        text = "".join(part.get("text", "") for part in parts(request))
        return as_json(
            completion(json.dumps({"reasoning": "", **{n: g for n, g in grades.items() if f'"{n}"' in text}}))
        )

    with FakeServer(rubric) as server:
        judge = EditJudge((server.url,), templates=("viescore_sc.v1", "viescore_pq.v1"))
        reward = PublishedRewards(edit_by="judge", judge=judge).make_rewards()["edit"]
        np.testing.assert_allclose(score(reward, GREY, EDITS).total, np.sqrt(0.4 * 0.9), atol=1e-6)


def test_a_requirement_is_asked_for(folder: Path, judges: tuple[FakeServer, FakeServer]) -> None:
    judge = EditJudge((judges[0].url,), templates=("edit_requirement.v1",))
    reward = judge.make()
    prompts = [Prompt("make it red", (GREY[0],), {"requirement": "only the cup"}), Prompt("make it red", (GREY[0],))]
    found = score(reward, GREY, prompts)
    assert "only the cup" in str(judges[0].requests[-1].body)
    assert np.isfinite(found.total).tolist() == [True, False]
    assert "requirement" in found.reasons[1]


def test_templates_end_with_the_judged_picture() -> None:
    for path in TEMPLATES.glob("edit_*.txt"):
        assert find_template(path.stem).placeholders[0] == "source"
        # The samples of a prompt share all that is before it.
        assert find_template(path.stem).placeholders[-1] == "image"
    with pytest.raises(ValueError, match=r"besides them there are edit_overall\.v1"):
        find_template("edit_overal.v1")


def test_key_model_and_addresses_come_from_the_environment(
    folder: Path, judges: tuple[FakeServer, FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDTR_JUDGE_URL", ", ".join(server.url for server in judges))
    monkeypatch.setenv("PDTR_JUDGE_MODEL", "judge")
    monkeypatch.setenv("PDTR_JUDGE_KEY", "s3cret")
    rewards = chosen(find_recipe("diffusion_nft_qwen_image_edit")())
    assert rewards.judge.urls == tuple(server.url for server in judges)
    reward = rewards.make_rewards()["edit"]
    assert score(reward, GREY, EDITS).total.shape == (2,)
    assert {request.headers["authorization"] for request in judges[0].requests} == {"Bearer s3cret"}
    assert "s3cret" not in repr(rewards)


def refusal(capsys: pytest.CaptureFixture[str], recipe: str, *arguments: str) -> str:
    """The one line with which a run is refused; nothing is written."""
    Path("model").mkdir(exist_ok=True)
    Path("edits.jsonl").write_text('{"prompt": "make it red", "image": "a.png"}\n')
    Path("texts.jsonl").write_text('{"prompt": "a cup"}\n')
    files = ["--tasks.edit-prompts", "edits.jsonl"]
    files += ["--tasks.t2i-prompts", "texts.jsonl"] * (recipe == "unipic2_pdtr")
    assert main(["train", recipe, "--base", "model", "--output-dir", "run", *files, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not Path("run/config.json").exists()
    return error


def test_no_judge_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "diffusion_nft_qwen_image_edit", "--rewards.judge.urls", NOBODY)
    assert NOBODY in said
    assert "pdtr judge serve" in said
    assert "--rewards.judge.urls URL" in said


def test_one_of_two_judges_is_missing_or_another(
    folder: Path, judges: tuple[FakeServer, FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = judges
    urls = ["--rewards.judge.urls", first.url]
    assert f"{NOBODY}: expected a judge that answers" in refusal(capsys, "diffusion_nft_qwen_image_edit", *urls, NOBODY)
    second.handler = lambda request: as_json({"data": [{"id": "other"}]})
    said = refusal(capsys, "diffusion_nft_qwen_image_edit", *urls, second.url)
    assert f"{second.url}: expected 'judge', as at {first.url}, got a server of other" in said
    second.handler = lambda request: answer(request) if request.path == "/v1/models" else says({"Well": 1.0})
    said = refusal(capsys, "diffusion_nft_qwen_image_edit", *urls, second.url)
    assert f"{second.url}: expected judge to judge by edit_overall.v1, got none" in said


def test_a_judge_that_takes_too_few_pictures_is_one_line(
    folder: Path, judges: tuple[FakeServer, FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    def few(request: Request) -> Reply:
        is_judged = request.path == "/v1/chat/completions"
        refused = as_json({"error": {"message": "At most 3 image(s) may be provided in one prompt."}}, 400)
        return refused if is_judged and len(pictures(request)) > 3 else answer(request)

    judges[1].handler = few
    urls = ["--rewards.judge.urls", *(server.url for server in judges)]
    said = refusal(capsys, "diffusion_nft_qwen_image_edit", *urls, "--tasks.edit-sources", "3")
    assert judges[1].url in said
    assert "At most 3 image(s)" in said
    assert "pdtr judge serve MODEL --max-images 4" in said


def test_a_remote_reward_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDTR_REWARD_TOKEN", "t0ken")
    with RewardServer(bright, ServerSettings(service=ServiceSettings(token="t0ken"))) as server:
        config = flags("flow_grpo_flux_kontext", "--rewards.edit-by", "remote", "--rewards.edit-remote.url", server.url)
        reward = chosen(config).make_rewards()["edit"]
        assert reward_name(reward) == "bright"
        np.testing.assert_array_equal(score(reward, GREY, EDITS).total, [128, 128])
        # In text-to-image too, with the run's own deadline and not the short one of the first look.
        asked = ["--rewards.t2i-by", "remote", "--rewards.t2i-remote.url", server.url]
        made = chosen(flags("flow_grpo_sd3_geneval", *asked)).make_rewards()
        assert list(made) == ["t2i"]
        assert isinstance(made["t2i"], RemoteReward)
        assert made["t2i"]._calls._settings.deadline_seconds == 120
        monkeypatch.setenv("PDTR_REWARD_TOKEN", "wrong")
        with pytest.raises(ValueError, match=r"refuses the request, 401.*its token: PDTR_REWARD_TOKEN"):
            chosen(config).make_rewards()["edit"]


def test_no_reward_server_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.served_rewards._CHECK_SECONDS", 0.5)
    asked = ["--rewards.edit-by", "remote", "--rewards.edit-remote.url", NO_SERVER]
    said = refusal(capsys, "unipic2_pdtr", *asked)
    assert NO_SERVER in said
    assert "pdtr reward serve MODULE:REWARD" in said
    assert "--rewards.edit-remote.url URL" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rewards.judge.urls", NOBODY], "add --rewards.edit-by judge"),
        (["--rewards.judge.model", "judge"], "add --rewards.edit-by judge"),
        (["--rewards.edit-remote.url", NO_SERVER], "add --rewards.edit-by remote"),
        (["--rewards.t2i-remote.url", NO_SERVER], "add --rewards.t2i-by remote"),
        (["--rewards.edit-by", "remote"], "add --rewards.edit-remote.url URL"),
        (["--rewards.edit-by", "judge", "--rewards.judge.templates", "a", "b", "c"], "expected one, or two"),
        (["--rewards.edit-by", "judge", "--rewards.judge.max-in-flight", "0"], "max_in_flight"),
        (["--rewards.edit-by", "judge", "--rewards.judge.min-label-mass", "2"], "min_label_mass"),
        (["--rewards.edit-by", "judge", "--rewards.judge.templates", "edit_overal.v1"], "'edit_overal.v1'"),
        (["--rewards.edit-by", "judge", "--rewards.judge.urls", "localhost:8000"], "localhost:8000"),
        ([], "train one (pdtr edit-reward train"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, "unipic2_pdtr", *arguments)


def test_weights_that_nothing_asks_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    PublishedRewards(edit=EditRewardWeights(), edit_by="judge").make_rewards()
    assert not caplog.records
    PublishedRewards(edit=EditRewardWeights("mine"), edit_by="judge").make_rewards()
    assert "'mine'" in caplog.text
    caplog.clear()
    remote = RemoteScorer(NO_SERVER)
    PublishedRewards(t2i=OCRReader(excess_penalty=0.5), t2i_by="remote", t2i_remote=remote).make_rewards()
    assert "excess_penalty=0.5" in caplog.text


def twin(**rewards: Any) -> TrainConfig:
    """Edit-R1's twin with other rewards, and with evaluations of two steps."""
    config = find_recipe("diffusion_nft_qwen_image_edit_tiny")()
    evaluation = replace(config.evaluation, sampler=ODE(2, 1.0, None), num_grid=0)
    return replace(config, rewards=replace(chosen(config), **rewards), evaluation=evaluation)


def test_a_published_recipe_trains_on_a_judge(folder: Path, judges: tuple[FakeServer, FakeServer]) -> None:
    urls = tuple(server.url for server in judges)
    run(twin(edit_by="judge", judge=EditJudge(urls)))
    rows = read_metrics(Path("runs/diffusion_nft_qwen_image_edit_tiny"))
    assert all(0 < row["reward/edit"] < 1 and row["missing_ratio/edit"] == 0 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    recorded = json.loads(Path("runs/diffusion_nft_qwen_image_edit_tiny/config.json").read_text())["config"]
    assert recorded["rewards"]["judge"]["urls"] == list(urls)


def test_a_published_recipe_trains_on_the_reward_of_another_process(folder: Path, root: Path) -> None:
    command = [sys.executable, "-m", "experiments.cli", "reward", "serve", "rewards.pixel:redness", "--port", "0"]
    environment = {"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            run(twin(edit_by="remote", edit_remote=RemoteScorer(url)))
        finally:
            process.terminate()
    rows = read_metrics(Path("runs/diffusion_nft_qwen_image_edit_tiny"))
    assert all(np.isfinite(row["reward/edit"]) and row["missing_ratio/edit"] == 0 for row in rows)


def edits(reward: Reward) -> dict[str, Task]:
    return {"edit": Task("edit", FixedPool(EDITS), reward, EDITS, EDITS, (8, 8))}


def test_an_address_may_change_and_what_is_there_may_not(folder: Path, judges: tuple[FakeServer, FakeServer]) -> None:
    first, second = judges
    config = TrainConfig(output_dir=folder)
    write_settings(config, "mine", edits(EditJudge((first.url,)).make()))
    check_settings(config, edits(EditJudge((second.url,)).make()))
    served = {"data": [{"id": "larger"}]}
    second.handler = lambda request: as_json(served) if request.path == "/v1/models" else answer(request)
    with pytest.raises(ValueError, match=r"VLMJudge \(model = 'judge'\), got VLMJudge \(model = 'larger'\)"):
        check_settings(config, edits(EditJudge((second.url,)).make()))
    # The same model, asked for something else.
    with pytest.raises(ValueError, match=r"VLMJudge \(.*template\.name = 'edit_overall"):
        check_settings(config, edits(EditJudge((first.url,), templates=("edit_requirement.v1",)).make()))


def test_another_server_of_the_same_reward_may_take_over(folder: Path) -> None:
    config, scorers = TrainConfig(output_dir=folder), []
    with RewardServer(bright) as first, RewardServer(bright) as second, RewardServer(jpeg_compressibility) as other:
        scorers = [RemoteScorer(server.url).make("--url") for server in (first, second, other)]
    write_settings(config, "mine", edits(scorers[0]))
    check_settings(config, edits(scorers[1]))
    with pytest.raises(ValueError, match=r"'edit' that the run was started with, bright, got jpeg_compressibility;"):
        check_settings(config, edits(scorers[2]))


def test_a_reward_of_ones_own_wins_and_asks_no_server(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``--tasks.edit-reward`` beside the recipe's judge, which nobody serves."""
    config = twin(edit_by="judge", judge=EditJudge((NOBODY,)))
    assert isinstance(config.tasks, PromptFileTasks)
    tasks = replace(config.tasks, edit_reward="rewards.pixel:redness")
    made = tasks.make_tasks(config.evaluation, config.rewards.make_rewards())
    assert reward_name(made["edit"].reward) == "redness"
    assert made["edit"].held_out_reward is None
    assert "edit is trained on tasks.edit_reward, rewards.pixel:redness" in caplog.text
    # What measures is another flag.
    measured = replace(tasks, edit_held_out_reward="rewards.pixel:jpeg_compressibility")
    held_out = measured.make_tasks(config.evaluation, config.rewards.make_rewards())["edit"].held_out_reward
    assert held_out is jpeg_compressibility
