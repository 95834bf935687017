import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agents.policies.scenes import ScenesPolicy, ScenesPolicyConfig
from experiments.cli import COMMANDS, explain, is_mistake, main
from experiments.flags import Usage, parse_run
from experiments.recipes import find_recipe, recipes
from pdtr.checkpoint import CheckpointError
from pdtr.curriculum import Joint, Staged
from pdtr.pretraining import PretrainConfig
from pdtr.sampling import evaluation_sampler, image_grid, load_source_image, policy_folder, sample_images
from rewards.base import Prompt

Finished = subprocess.CompletedProcess[str]
Run = Callable[..., Finished]
SIDE = 48


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **changes}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "experiments.cli", *map(str, arguments)]


@pytest.fixture(scope="session")
def pdtr(root: Path) -> Run:
    """Runs a real process of the command line; relative paths start at the repository's root."""

    def run(*arguments: str | Path, **changes: str) -> Finished:
        return subprocess.run(
            command(*arguments),
            cwd=root,
            env=environment(**changes),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with random weights."""
    folder = tmp_path_factory.mktemp("policies") / "tiny"
    config = ScenesPolicyConfig(("a", "circle", "of", "photo", "red"), image_size=SIDE, width=32, num_layers=1)
    ScenesPolicy(config).save(folder)
    return folder


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line with which main refuses; its exit code and its form are checked."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("pdtr: ")
    return lines[0]


def assert_mistake(finished: Finished, *parts: str) -> None:
    assert finished.returncode == 2, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if not line.startswith(("note: ", "drawing "))]
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("pdtr: ")
    for part in parts:
        assert part in lines[0]


# What is printed without work


def test_help_lists_every_command(pdtr: Run) -> None:
    finished = pdtr("--help")
    assert finished.returncode == 0
    assert all(f"  pdtr {name}" in finished.stdout for name in COMMANDS)


def test_listing_the_recipes_takes_half_a_second(pdtr: Run) -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        finished = pdtr("recipes")
        times.append(time.perf_counter() - started)
    assert min(times) <= 0.5
    assert [line.split()[0] for line in finished.stdout.splitlines()] == list(recipes())
    assert all(len(line.split()) > 3 for line in finished.stdout.splitlines())


def test_a_reader_that_stops_reading_is_no_error(root: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run(
        command("recipes"), cwd=root, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_a_recipe_lists_its_flags_with_help(pdtr: Run) -> None:
    finished = pdtr("train", "smoke", "--help", COLUMNS="400")
    assert finished.returncode == 0
    assert "samples a prompt. (default: 6)" in finished.stdout
    for flag in (
        "--resume",
        "--output-dir",
        "--algorithm.kl-coef",
        "--algorithm.rollout-sampler.guidance-scale",
        "--learner.num-minibatches",
        "--evaluation.every",
        "--curriculum.stages.0.num-iterations",
        "--curriculum.stages.1.num-iterations",
    ):
        assert f"{flag} " in finished.stdout, flag
    # A curriculum's running state is no choice.
    assert "--curriculum._" not in finished.stdout


@pytest.mark.parametrize("name", ["pretrain scenes", "pretrain stage-b", "eval", "sample", "report"])
def test_every_flag_of_a_command_has_a_help_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: pdtr {name}" in shown
    # Not at the rules between groups, which are hyphens where a terminal has no boxes.
    options = re.split(r"\n--(?=\w)", "".join(line.strip("│ ") + "\n" for line in shown.splitlines()))[1:]
    assert all(len(option.split("(")[0].split()) > 3 for option in options), options


# Flags


def test_flags_replace_what_a_recipe_says() -> None:
    flags = ["--group-size", "24", "--algorithm.kl-coef", "0.5", "--curriculum.stages.1.num-iterations", "7"]
    config, resume = parse_run(find_recipe("smoke")(), Usage("pdtr train smoke"), flags)
    assert isinstance(config.curriculum, Staged)
    assert (config.group_size, config.algorithm.kl_coef) == (24, 0.5)  # type: ignore[attr-defined]
    assert [stage.num_iterations for stage in config.curriculum.stages] == [2, 7]
    assert not resume


def test_without_flags_a_recipe_stays_as_it_is() -> None:
    for name, recipe in recipes().items():
        config, resume = parse_run(recipe(), Usage(name), [])
        assert config == recipe()
        assert type(config) is type(recipe())
        assert not resume


def test_a_curriculum_s_flags_are_those_of_its_kind() -> None:
    recipe = replace(find_recipe("joint")(), curriculum=Joint(2))
    config, resume = parse_run(recipe, Usage("x"), ["--curriculum.num-iterations", "3", "--resume"])
    assert config.curriculum == Joint(3)
    assert resume


def test_resume_is_a_flag_of_pre_training_too() -> None:
    assert parse_run(PretrainConfig(), Usage("x"), ["--resume", "--num-steps", "3"]) == (
        PretrainConfig(num_steps=3),
        True,
    )


# A user's mistakes


def test_no_command_is_a_mistake(pdtr: Run) -> None:
    assert_mistake(pdtr(), "expected a command", *COMMANDS)


def test_an_unknown_command_names_the_nearest(pdtr: Run) -> None:
    assert_mistake(pdtr("trian"), "'trian'", "did you mean 'train'?")


def test_an_unknown_recipe_names_the_nearest(pdtr: Run) -> None:
    assert_mistake(pdtr("train", "pdtr_scene"), "'pdtr_scene'", "did you mean 'pdtr_scenes'?")


def test_an_unknown_flag_names_the_nearest(pdtr: Run) -> None:
    assert_mistake(pdtr("train", "smoke", "--lerning-rate", "3"), "--lerning-rate", "did you mean --learning-rate?")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "smoke", "--seed", "many"], ["--seed", "'many'"]),
        (["train", "smoke", "--seed"], ["--seed"]),
        (["train", "smoke", "--learner.num-minibatches", "0"], ["num_minibatches", "LearnerSettings"]),
        (["train", "smoke", "--algorithm.advantage-std", "grup"], ["'grup'", "group"]),
        (["train", "smoke", "--curriculum.stages.0.num-iterations", "0"], ["num_iterations", "got 0"]),
        (["train", "smoke", "--output-dir", "{tmp}/new", "--base", "{tmp}/nowhere"], ["{tmp}/nowhere"]),
        (["train", "smoke", "--output-dir", "{tmp}/new", "--base", "{tmp}"], ["{tmp}", "config.json"]),
        (["train", "smoke", "--output-dir", "{tmp}/new", "--base", "{tmp}/foreign"], ["{tmp}/foreign", "foreign one"]),
        (["train", "smoke", "--resume", "--output-dir", "{tmp}/new"], ["{tmp}/new", "--resume"]),
        (["train", "smoke", "--output-dir", "{tmp}/a file/run"], ["{tmp}/a file/run", "Not a directory"]),
        (["pretrain"], ["pdtr pretrain scenes"]),
        (["pretrain", "scene"], ["got scene"]),
        (["pretrain", "scenes", "--num-steps", "0"], ["num_steps"]),
        (["sample"], ["PROMPT"]),
        (["sample", "a circle", "--policy", "{tmp}/nowhere"], ["{tmp}/nowhere"]),
        (["sample", "a circle", "--output", "grid.pgn"], ["grid.pgn"]),
        (["sample", "a circle", "--num-images", "0"], ["num_images"]),
        (["sample", "a circle", "--policy", "{policy}", "--source-image", "{tmp}/a file"], ["{tmp}/a file", "picture"]),
        (["sample", "a circle", "--policy", "{policy}", "--source-image", "{tmp}/no"], ["{tmp}/no", "No such file"]),
        (["sample", "a circle", "--policy", "{tmp}/foreign"], ["{tmp}/foreign", "foreign one"]),
        (
            ["sample", "a circle", "--policy", "{policy}", "--edit-negative-prompt", "blur"],
            ["edit_negative_prompt: only for models in diffusers' layout", "{policy}"],
        ),
        (["sample", "a circle", "--policy", "{policy}", "--shift", "0"], ["shift", "positive"]),
        (["eval", "{policy}", "--shift", "-1"], ["shift", "positive"]),
        (["eval", "{tmp}"], ["{tmp}", "config.json"]),
        (["eval", "--task", "t2v"], ["'t2v'", "t2i"]),
        (["eval", "{policy}", "--output", "{tmp}/eval.json"], ["expected a folder", "--output {tmp}/eval"]),
        (["eval", "{policy}", "--prompts", "{tmp}/corrupt.jsonl"], ["{tmp}/corrupt.jsonl", "line 2"]),
        (["eval", "{policy}", "--prompts", "{tmp}/corupt.jsonl"], ["{tmp}/corupt.jsonl", "corrupt.jsonl"]),
        (["report", "{tmp}"], ["{tmp}"]),
        (["export"], ["RUN"]),
        (["export", "{tmp}"], ["{tmp}", "expected the folder of a run"]),
        (["recipes", "smoke"], ["smoke"]),
    ],
    ids=lambda value: " ".join(value) if value[0] in COMMANDS else "",
)
def test_a_mistake_is_one_line(
    arguments: list[str], parts: list[str], tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").write_text("no picture")
    (tmp_path / "corrupt.jsonl").write_text('{"prompt": "a circle", "tag": "single_object"}\n{"prompt": \n')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"config": {}}')
    shutil.copy(policy / "model.safetensors", tmp_path / "foreign")
    names = {"tmp": str(tmp_path), "policy": str(policy)}
    line = complaint(capsys, *(argument.format(**names) for argument in arguments))
    for part in parts:
        assert part.format(**names) in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_policy_is_named(name: str, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in policy.iterdir():
        content = part.read_bytes()
        (tmp_path / part.name).write_bytes(content[: len(content) // 2] if part.name == name else content)
    line = complaint(capsys, "sample", "x", "--policy", tmp_path)
    assert str(tmp_path) in line
    assert "damaged" in line


def test_the_traceback_is_there_when_asked_for(pdtr: Run) -> None:
    finished = pdtr("train", "smok", PDTR_TRACEBACK="1")
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr


def test_a_defect_keeps_its_traceback() -> None:
    assert not is_mistake(KeyError("x"))
    assert not is_mistake(ZeroDivisionError())
    assert is_mistake(CheckpointError(Path("step-000001"), "truncated"))


def test_errors_of_the_system_say_where_and_what() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")
    assert explain(full).startswith("runs/a/metrics.jsonl: the disk is full")
    denied = PermissionError(errno.EACCES, "Permission denied", "/root/x")
    assert explain(denied).startswith("/root/x: no permission")
    assert explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) == "x: No such file or directory"
    assert explain(ValueError("one\n  two")) == "one two"


# Drawing and measuring


def test_a_sample_is_a_picture_of_the_source_and_the_draws(pdtr: Run, policy: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "source.png", tmp_path / "new folder" / "grid.png"
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(source)
    options = ("--policy", policy, "--source-image", source, "--num-images", "3", "--scale", "2", "--output", output)
    finished = pdtr("sample", "a purple circle", *options)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == str(output)
    assert f"note: {source} resized from 80x60 to 48x48" in finished.stderr
    assert "does not know purple" in finished.stderr
    picture = np.asarray(Image.open(output))
    assert picture.shape == (96, 4 * 98 - 2, 3)
    assert (picture[:, :96] == 200).all()
    assert not (picture[:, 98:194] == picture[:, 196:292]).all()


def test_more_images_do_not_change_the_first(policy: Path) -> None:
    loaded = ScenesPolicy.load(policy)
    draws = [sample_images(loaded, Prompt("a red circle"), count, 3, evaluation_sampler(None)) for count in (2, 3)]
    assert np.abs(draws[0].astype(int) - draws[1][:2]).max() <= 1
    other = sample_images(loaded, Prompt("a red circle"), 2, 4, evaluation_sampler(None))
    assert np.abs(draws[0].astype(int) - other).max() > 1


def test_a_grid_is_filled_row_by_row() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    grid = image_grid(images, num_columns=2, scale=2)
    assert grid.shape == (6, 6, 3)
    expected = np.array([[0, 0, 255, 255, 1, 1], [255] * 6, [2, 2, 255, 255, 255, 255]])
    assert (grid[[0, 2, 4], :, 0] == expected).all()
    assert (grid[1] == grid[0]).all()


def test_a_source_of_the_right_size_is_read_as_it_is(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "source.png")
    image, found = load_source_image(tmp_path / "source.png", (SIDE, SIDE))
    assert found == (SIDE, SIDE)
    assert (image == picture).all()


# Runs


def test_pre_training_resumes(pdtr: Run, tmp_path: Path) -> None:
    sizes = ("--output-dir", tmp_path, "--t2i-batch-size", "2", "--edit-batch-size", "2", "--checkpoint-every", "1")
    first = pdtr("pretrain", "scenes", "--num-steps", "2", *sizes)
    assert first.returncode == 0, first.stderr
    second = pdtr("pretrain", "scenes", "--num-steps", "3", "--resume", *sizes)
    assert second.returncode == 0, second.stderr
    assert "resumed at step 2" in second.stdout
    assert second.stdout.splitlines()[-1] == f"policy: {tmp_path / 'policy'}"
    assert policy_folder(tmp_path) == tmp_path / "policy"


def test_a_stopped_smoke_run_says_how_to_go_on_and_does(pdtr: Run, root: Path, policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    # The base may be the folder of a run: it stands for the policy in it.
    shutil.copytree(policy, tmp_path / "an earlier run" / "policy")
    arguments = ("train", "smoke", "--output-dir", folder, "--base", tmp_path / "an earlier run")
    process = subprocess.Popen(
        command(*arguments), cwd=root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    # Not earlier: an interrupt during an import may be swallowed by the imported library.
    log = folder / "evaluations.jsonl"
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    advice = errors.splitlines()[-1]
    assert advice.startswith("pdtr: stopped; go on with: pdtr train smoke ")
    others = shlex.split(advice.partition("go on with: pdtr ")[2])
    assert others[-1] == "--resume"

    assert_mistake(pdtr(*arguments), str(folder), "--resume")
    assert_mistake(pdtr("train", "joint", "--resume", "--output-dir", folder), "'joint'", "'smoke'")
    finished = pdtr(*others)
    assert finished.returncode == 0, finished.stderr
    assert_is_finished(folder, finished.stdout)
    assert pdtr("report", folder).stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"


def assert_is_finished(folder: Path, output: str) -> None:
    lines = output.splitlines()
    assert lines[-1] == f"report: {folder / 'report.html'}"
    assert [line.split("  ")[0].strip() for line in lines if line.startswith(("base  ", "after "))][-3:] == [
        "base",
        "after edit",
        "after t2i",
    ]
    assert "<html" in (folder / "report.html").read_text()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    assert policy_folder(folder) == folder / "policy"
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"] == "smoke"
    assert (
        evaluation_sampler(folder).num_inference_steps
        == config["config"]["evaluation"]["sampler"]["num_inference_steps"]
    )
