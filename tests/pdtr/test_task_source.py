from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.flags import Usage, parse_run
from experiments.recipes.scenes import smoke
from pdtr.config import EvaluationConfig, TrainConfig
from pdtr.curriculum import pdtr_curriculum
from pdtr.launch import train
from pdtr.task_source import PromptFileTasks, ScenesTasks
from pdtr.tasks import scenes_tasks
from rewards.judges.client import JudgeClient
from rewards.judges.judge import VLMJudge
from rewards.pixel import jpeg_compressibility, redness
from tests.envs.record_files import png, write_rows
from tests.rewards.judges.fake_server import FakeServer, Reply, Request, as_json, pictures, says

EVALUATION = EvaluationConfig(num_prompts=3, num_final_prompts=4)


@pytest.fixture
def files(tmp_path: Path) -> PromptFileTasks:
    (tmp_path / "t2i.txt").write_text("".join(f"a photo of {n} cups\n" for n in range(30)))
    write_rows(
        tmp_path / "edit.parquet", [{"instruction": f"turn {n}", "input_image": png(n, 60, 40)} for n in range(30)]
    )
    return PromptFileTasks(
        t2i_prompts=tmp_path / "t2i.txt",
        edit_prompts=tmp_path / "edit.parquet",
        t2i_reward="rewards.pixel:redness",
        edit_reward="rewards.pixel:redness",
        image_size=(48, 48),
    )


def test_the_embedded_world_is_the_default() -> None:
    assert TrainConfig().tasks == ScenesTasks()
    made, expected = ScenesTasks().make_tasks(EVALUATION, {"edit": redness}), scenes_tasks(3, 4, {"edit": redness})
    for name in ("t2i", "edit"):
        assert [p.id for p in made[name].final] == [p.id for p in expected[name].final]
        assert made[name].reward is expected[name].reward
        assert made[name].held_out_reward is expected[name].held_out_reward


def test_held_out_prompts_are_taken_out(files: PromptFileTasks) -> None:
    tasks = files.make_tasks(EVALUATION)
    for name, task in tasks.items():
        assert (task.name, task.reward, task.held_out_reward) == (name, redness, None)
        assert (len(task.tune), len(task.final), len(task.pool)) == (3, 4, 23)
        texts = {prompt.text for prompt in task.pool.draw(np.random.default_rng(0), 23)}
        assert len(texts | {prompt.text for prompt in [*task.tune, *task.final]}) == 30
    assert all(prompt.source_images[0].shape == (48, 48, 3) for prompt in tasks["edit"].tune)


def test_instructions_for_several_pictures(files: PromptFileTasks, tmp_path: Path) -> None:
    rows = [{"instruction": f"turn {n}", "input_image": [png(n), png(n + 1)][: 1 + (n > 3)]} for n in range(20)]
    write_rows(tmp_path / "pairs.parquet", rows)
    pairs = replace(files, edit_prompts=tmp_path / "pairs.parquet", edit_sources=2)
    task = pairs.make_tasks(EVALUATION)["edit"]
    # Four rows with one picture are left out, seven are held out.
    assert len(task.pool) == 9
    assert {len(prompt.source_images) for prompt in (*task.tune, *task.final)} == {2}
    for envs in (task.make_envs(3), task.make_envs(3, is_evaluation=True)):
        observation, _ = envs[0].reset(options={"prompts": list(task.tune)})
        assert observation["source_images"].shape == (3, 2, 48, 48, 3)
    with pytest.raises(ValueError, match="edit_sources"):
        replace(files, edit_sources=0)


@pytest.mark.parametrize("asked", [1, 3])
def test_another_number_of_pictures_is_named_with_its_flag(files: PromptFileTasks, tmp_path: Path, asked: int) -> None:
    rows = [{"instruction": f"turn {n}", "input_image": [png(n), png(n + 1)]} for n in range(20)]
    write_rows(tmp_path / "pairs.parquet", rows)
    wanted = "one picture" if asked == 1 else "3 pictures"
    message = rf"pairs\.parquet: expected rows with {wanted} to edit, got 2 \(20 rows\); --tasks\.edit-sources 2 takes"
    with pytest.raises(ValueError, match=message):
        replace(files, edit_prompts=tmp_path / "pairs.parquet", edit_sources=asked).make_tasks(EVALUATION)


def few(request: Request) -> Reply:
    """A server that takes two pictures a request, and says so as vLLM does."""
    if len(pictures(request)) > 2:
        return as_json({"error": {"message": "At most 2 image(s) may be provided in one prompt."}}, 400)
    return says({"4": 0.9})


@pytest.mark.parametrize("is_held_out", [False, True])
def test_a_judge_that_takes_too_few_pictures_is_told_before_files_are_read(
    files: PromptFileTasks, is_held_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "rewards.pixel:redness" if is_held_out else ""
    edits = replace(files, t2i_prompts=None, edit_prompts=Path("gone.parquet"), edit_reward=own, edit_sources=2)
    with FakeServer(few) as server, JudgeClient(server.url) as client:
        judge = VLMJudge(client, "judge", "edit_following.v1")
        monkeypatch.setattr("rewards.pixel.judge", judge, raising=False)
        if is_held_out:
            edits = replace(edits, edit_held_out_reward="rewards.pixel:judge")
        given = {} if is_held_out else {"edit": judge}
        with pytest.raises(ValueError, match=r"At most 2 image.*3 pictures with 2 source images.*--max-images 3"):
            edits.make_tasks(EVALUATION, given)
        # Who edits one picture asks nothing here: that was tried where the judge was made.
        with pytest.raises(FileNotFoundError):
            replace(edits, edit_sources=1).make_tasks(EVALUATION, given)
        assert [len(pictures(request)) for request in server.requests] == [3]


def test_held_out_prompts_of_a_file(files: PromptFileTasks, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text("".join(f"{n} dogs\n" for n in range(7)))
    task = replace(files, t2i_held_out=tmp_path / "held_out.txt", edit_prompts=None).make_tasks(EVALUATION)["t2i"]
    assert [prompt.text for prompt in [*task.tune, *task.final]] == [f"{n} dogs" for n in range(7)]
    assert len(task.pool) == 30
    with pytest.raises(ValueError, match=r"held_out.txt: expected 3 \+ 40 held-out prompts, got 7; lower"):
        replace(files, t2i_held_out=tmp_path / "held_out.txt").make_tasks(replace(EVALUATION, num_final_prompts=40))


def test_a_task_that_names_a_reward_is_trained_on_it_and_else_on_the_runs(
    files: PromptFileTasks, caplog: pytest.LogCaptureFixture
) -> None:
    unnamed = replace(files, edit_reward="").make_tasks(EVALUATION, {"edit": jpeg_compressibility})
    assert (unnamed["edit"].reward, unnamed["edit"].held_out_reward) == (jpeg_compressibility, None)
    assert not caplog.records
    named = files.make_tasks(EVALUATION, {"edit": jpeg_compressibility})
    assert (named["edit"].reward, named["edit"].held_out_reward) == (redness, None)
    assert (named["t2i"].reward, named["t2i"].held_out_reward) == (redness, None)
    assert [record.getMessage() for record in caplog.records] == [
        "edit is trained on tasks.edit_reward, rewards.pixel:redness, and not on the run's rewards"
    ]


def test_a_held_out_reward_measures(files: PromptFileTasks) -> None:
    held_out = replace(files, edit_reward="", edit_held_out_reward="rewards.pixel:redness")
    tasks = held_out.make_tasks(EVALUATION, {"edit": jpeg_compressibility})
    assert (tasks["edit"].reward, tasks["edit"].held_out_reward) == (jpeg_compressibility, redness)
    same = replace(files, t2i_held_out_reward=files.t2i_reward).make_tasks(EVALUATION)
    assert (same["t2i"].reward, same["t2i"].held_out_reward) == (redness, None)


def test_mistakes_are_named(files: PromptFileTasks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected t2i_prompts, edit_prompts or both, got neither"):
        PromptFileTasks().make_tasks(EVALUATION)
    with pytest.raises(ValueError, match=r"edit_reward: expected a reward for .*edit.parquet, got none"):
        replace(files, edit_reward="").make_tasks(EVALUATION)
    with pytest.raises(ValueError, match=r"expected rewards for \['t2i'\], got one for 'edit'"):
        replace(files, edit_prompts=None).make_tasks(EVALUATION, {"edit": redness})
    with pytest.raises(ValueError, match="did you mean 'redness'"):
        replace(files, t2i_reward="rewards.pixel:rednes").make_tasks(EVALUATION)
    with pytest.raises(FileNotFoundError, match=r"did you mean 't2i\.txt'"):
        replace(files, t2i_prompts=tmp_path / "t2j.txt").make_tasks(EVALUATION)
    with pytest.raises(ValueError, match="expected more than 33 prompts"):
        files.make_tasks(replace(EVALUATION, num_final_prompts=30))


def test_a_run_on_files_starts_from_flags_and_trains(files: PromptFileTasks, tmp_path: Path) -> None:
    recipe = replace(
        smoke(),
        tasks=PromptFileTasks(image_size=(48, 48)),
        curriculum=pdtr_curriculum(1, 1),
        num_prompts=2,
        group_size=2,
        chunk_size=2,
        num_threads=1,
        evaluation=replace(smoke().evaluation, num_prompts=3, num_final_prompts=4, chunk_size=4, num_grid=0),
    )
    flags = f"--tasks.t2i-prompts {files.t2i_prompts} --tasks.edit-prompts {files.edit_prompts}"
    flags += " --tasks.t2i-reward rewards.pixel:redness --tasks.edit-reward rewards.pixel:redness"
    config, _ = parse_run(recipe, Usage("pdtr train"), [*flags.split(), "--output-dir", str(tmp_path / "run")])
    assert config.tasks == files
    assert train(config).is_file()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "reward/t2i" in rows
    assert "reward/edit" in rows
