"""``pdtr eval BENCHMARK`` from the command line to results.json, with real policies and detectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agents.policies.tiny.sd3 import make_tiny_sd3
from envs.scenes.detector import detect
from envs.scenes.rewards import RULE
from envs.scenes.suite import t2i_prompts
from experiments.cli import main
from experiments.eval_options import OPTIONS
from pdtr.benchmarks.geneval import load_geneval, save_metadata
from rewards.tiny.clip import save_clip
from rewards.tiny.detectors import save_mask2former
from tests.pdtr.benchmarks.files import (
    gedit_row,
    overall,
    plain,
    results,
    write_dpg,
    write_geneval,
    write_parquet,
)

Run = Callable[..., str]


# The whole GenEval protocol on the embedded world: its prompts in GenEval's file, its policy, its detector


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A metadata file of the embedded world's held-out prompts, the six skills once each."""
    path = tmp_path_factory.mktemp("scenes") / "evaluation_metadata.jsonl"
    save_metadata(path, t2i_prompts("held_out", 6, 11))
    return path


@pytest.fixture(scope="module")
def drawn(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GenEval of the policy that ships with the package."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    arguments = ["eval", "geneval", "--data", scenes, "--detector", "scenes", "--output", folder, "--num-threads", "1"]
    assert main([str(argument) for argument in arguments]) == 0
    return folder


def test_geneval_s_numbers_are_those_of_its_rule_on_the_kept_images(scenes: Path, drawn: Path) -> None:
    benchmark = load_geneval(scenes)
    by_task = {}
    for item in benchmark.items:
        images = np.stack(benchmark.layout.read(drawn / "images", item, 4))
        by_task[item.task] = np.mean([RULE.official(found, item.metadata) for found in detect(images)])
    found = results(drawn)
    assert {row["task"]: row["value"] for row in found["numbers"][:6]} == pytest.approx(by_task)
    assert overall(drawn, "correct")["value"] == pytest.approx(np.mean(list(by_task.values())))
    # A trained policy: a detector that finds nothing would give 0.
    assert overall(drawn, "correct")["value"] > 0.1
    assert overall(drawn, "correct")["images"] == 24
    assert found["drawing"]["num_inference_steps"] == 8
    assert found["drawing"]["image_size"] == [48, 48]
    assert found["comparable"] is False


def test_the_same_command_again_draws_and_scores_nothing(scenes: Path, drawn: Path, pdtr_eval: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in [*drawn.rglob("*.png"), drawn / "scores.jsonl"]}
    printed = pdtr_eval("geneval", "--data", scenes, "--detector", "scenes", "--output", drawn)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for told in ("GenEval (arXiv:2310.11513): 6 prompts, 24 images",
                 "ODE, 8 steps, guidance 2.5, shift 4, 48x48, seed 0",
                 "not comparable with published numbers: ", "the embedded world's detector", "detector scenes",
                 "standard error", f"results: {drawn / 'results.json'}"):  # fmt: skip
        assert told in printed
    table = [line for line in printed.splitlines() if line.startswith("  correct")]
    assert len(table) == 8
    assert all(line.endswith("not comparable") for line in table)


def test_other_settings_are_refused_where_images_lie(scenes: Path, drawn: Path, eval_complaint: Run) -> None:
    line = eval_complaint(
        "geneval", "--data", scenes, "--detector", "scenes", "--output", drawn, "--guidance-scale", "7"
    )
    assert "guidance_scale 2.5 and not 7.0" in line
    assert str(drawn / "settings.json") in line


def test_a_folder_of_images_is_scored_as_it_is(scenes: Path, drawn: Path, pdtr_eval: Run, tmp_path: Path) -> None:
    shutil.copytree(drawn / "images", tmp_path / "elsewhere")
    printed = pdtr_eval("geneval", "--data", scenes, "--detector", "scenes", "--images", tmp_path / "elsewhere")
    assert "drawn elsewhere, nobody has said how" in printed
    assert overall(tmp_path / "elsewhere_scores", "correct") == overall(drawn, "correct")
    # Beside our own settings they are known.
    pdtr_eval("geneval", "--data", scenes, "--detector", "scenes", "--images", drawn / "images")
    assert results(drawn)["drawing"]["seed"] == 0


def test_two_policies_are_compared(scenes: Path, drawn: Path, pdtr_eval: Run, tmp_path: Path) -> None:
    other = tmp_path / "one step"
    pdtr_eval("geneval", "--data", scenes, "--detector", "scenes", "--output", other, "--num-inference-steps", "1")
    printed = pdtr_eval("--compare", other, drawn, "--output", tmp_path / "difference.json")
    content = json.loads((tmp_path / "difference.json").read_text())
    row = next(row for row in content["differences"] if row["task"] == "overall")
    values = [overall(folder, "correct")["value"] for folder in (other, drawn)]
    assert row["difference"] == pytest.approx(values[1] - values[0])
    assert row["low"] <= row["difference"] <= row["high"]
    assert 0 < row["p_value"] <= 1
    assert row["prompts"] == 6
    assert "not comparable" in printed
    assert [drawing["num_inference_steps"] for drawing in content["drawing"]] == [1, 8]
    assert pdtr_eval("geneval", "--compare", other, drawn).splitlines()[0] == printed.splitlines()[0]


def test_a_limit_is_labelled_and_keeps_the_whole_s_images(
    scenes: Path, drawn: Path, pdtr_eval: Run, tmp_path: Path
) -> None:
    shutil.copytree(drawn, tmp_path / "copy")
    before = sorted((tmp_path / "copy").rglob("*.png"))
    printed = pdtr_eval(
        "geneval", "--data", scenes, "--detector", "scenes", "--output", tmp_path / "copy", "--limit", "2"
    )
    assert "2 of 6 prompts" in printed
    assert sorted((tmp_path / "copy").rglob("*.png")) == before


def test_images_are_drawn_for_the_official_scorer_and_its_results_read_back(
    scenes: Path, drawn: Path, pdtr_eval: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(drawn, folder)
    (folder / "results.json").unlink()
    printed = pdtr_eval("geneval", "--data", scenes, "--output", folder, "--draw-only")
    assert printed.splitlines()[-1] == f"images: {folder / 'images'}"
    assert not (folder / "results.json").exists()
    lines = [
        {"filename": str(path), "prompt": json.loads((path.parents[1] / "metadata.jsonl").read_text())["prompt"],
         "correct": path.stem != "0003"}
        for path in sorted((folder / "images").rglob("*.png"))
    ]  # fmt: skip
    official = tmp_path / "official.jsonl"
    official.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pdtr_eval("geneval", "--data", scenes, "--output", folder, "--official-results", official)
    assert overall(folder, "correct")["value"] == 0.75
    # The scorer is the original, the prompts are not.
    assert not any("detector" in told for told in results(folder)["deviations"])
    assert any("published" in told for told in results(folder)["deviations"])


def test_geneval_by_a_detector_of_transformers(pdtr_eval: Run, tmp_path: Path) -> None:
    save_mask2former(tmp_path / "detector")
    save_clip(tmp_path / "clip")
    data = write_geneval(tmp_path / "m.jsonl")
    benchmark = load_geneval(data)
    for item in benchmark.items:
        benchmark.layout.write(tmp_path / "images", item, {s: plain((40 * s, 90, 10), (32, 32)) for s in range(4)})
    printed = pdtr_eval(
        "geneval", "--data", data, "--images", tmp_path / "images", "--output", tmp_path / "out",
        "--detector-model", tmp_path / "detector", "--colors-clip", tmp_path / "clip",
    )  # fmt: skip
    assert f"detector instance {tmp_path / 'detector'} in place of mmdet's Mask2Former" in printed
    found = results(tmp_path / "out")
    # Its few classes are not all of GenEval's: what it cannot know is counted, and not scored 0.
    assert sum(found["failures"].values()) == overall(tmp_path / "out", "correct")["failed"]
    assert any("the detector knows no class" in reason for reason in found["failures"])


# The command


def test_the_embedded_world_s_suites_have_a_name_and_are_the_default(tmp_path: Path, pdtr_eval: Run) -> None:
    arguments = ("--task", "t2i", "--num-prompts", "6", "--num-threads", "1")
    assert pdtr_eval("scenes", *arguments) == pdtr_eval(*arguments)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_flag_of_a_benchmark_has_a_help_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: pdtr eval {name}" in shown
    options = "".join(line.strip("│ ") + "\n" for line in shown.splitlines()).split("\n--")[1:]
    assert len(options) > 13
    assert all(len(option.split("(")[0].split()) > 3 for option in options), options


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["genevl"], ["'genevl'", "did you mean 'geneval'?"]),
        (["geneval"], ["evaluation_metadata.jsonl", "pdtr eval geneval --data PATH"]),
        (["geneval", "--data", "{tmp}/m.jsonl", "--limit", "0"], ["limit: expected 1 or more"]),
        (["geneval", "--data", "{tmp}/m.jsonl", "--images", "{tmp}/none", "--detector", "scenes"], ["{tmp}/none"]),
        (["geneval", "--data", "{tmp}/m.jsonl", "--images", "{tmp}", "--draw-only"], ["images", "--draw-only"]),
        (["geneval", "--data", "{tmp}/m.jsonl", "--chunk-size", "0"], ["chunk_size"]),
        (["geneval", "--data", "{tmp}/m.jsonl", "--detector", "yolo"], ["'yolo'", "scenes"]),
        (["geneval", "--data", "{tmp}/m.jsonl", "--detector-model", "{tmp}/nowhere"], ["model", "{tmp}/nowhere"]),
        (["dpg", "--data", "{tmp}/dpg.csv", "--samples", "5", "--draw-only"], ["at most 4"]),
        (["gedit", "--data", "{tmp}/none.parquet"], ["none.parquet", "no such file"]),
        (["--compare", "{tmp}", "{tmp}"], ["results.json"]),
        (["--compare", "{tmp}"], ["--compare"]),
    ],
    ids=lambda value: " ".join(value[:1]) if value and not value[0].startswith("'") else "",
)
def test_a_mistake_is_one_line(arguments: list[str], parts: list[str], tmp_path: Path, eval_complaint: Run) -> None:
    write_geneval(tmp_path / "m.jsonl")
    write_dpg(tmp_path / "dpg.csv")
    line = eval_complaint(*(argument.format(tmp=tmp_path) for argument in arguments))
    for part in parts:
        assert part.format(tmp=tmp_path) in line


def test_a_published_model_is_drawn_with_its_own_sampler_at_the_asked_size(
    pdtr_eval: Run, eval_complaint: Run, tmp_path: Path
) -> None:
    make_tiny_sd3(tmp_path / "sd3")
    data = tmp_path / "drawbench.txt"
    data.write_text("a red cat\ntwo blue dogs\n")
    arguments = ("drawbench", "--data", data, "--policy", tmp_path / "sd3", "--output", tmp_path / "out",
                 "--draw-only", "--width", "48", "--height", "32", "--num-inference-steps", "2")  # fmt: skip
    pdtr_eval(*arguments, "--dtype", "float32")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["shift"]) == (2, 4.5, None)
    assert (settings["image_size"], settings["model"]["dtype"]) == ([32, 48], "float32")
    benchmark = OPTIONS["drawbench"](data=data).benchmark()
    images = [benchmark.layout.read(tmp_path / "out" / "images", item, 1)[0] for item in benchmark.items]
    assert [image.shape for image in images] == [(32, 48, 3)] * 2
    assert not np.array_equal(*images)
    assert "float32" in eval_complaint(*arguments, "--dtype", "bfloat16")


def test_edits_are_drawn_as_unipic2_s_scripts_draw_them(pdtr_eval: Run, eval_complaint: Run, tmp_path: Path) -> None:
    folder = make_tiny_sd3(tmp_path / "kontext")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusion3KontextPipeline"}))
    data = write_parquet(tmp_path / "d.parquet", [gedit_row("a", "color_alter"), gedit_row("b", "subject-add")])
    arguments = ("gedit", "--data", data, "--draw-only", "--output")
    pdtr_eval(*arguments, tmp_path / "kept", "--policy", folder, "--keep-shape", "--height", "64", "--width", "64",
              "--edit-negative-prompt", "blurry", "--device", "cpu")  # fmt: skip
    settings = json.loads((tmp_path / "kept" / "settings.json").read_text())
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (50, 3.5)
    assert (settings["keep_shape"], settings["model"]["edit_negative_prompt"]) == (True, "blurry")
    benchmark = OPTIONS["gedit"](data=data).benchmark()
    images = [benchmark.layout.read(tmp_path / "kept" / "images", item, 1)[0] for item in benchmark.items]
    # Sources of 24 x 40.
    assert [image.shape for image in images] == [(32, 64, 3)] * 2
    assert "keep_shape" in eval_complaint(*arguments, tmp_path / "embedded", "--keep-shape")
    assert "edit_negative_prompt: only for models in diffusers' layout" in eval_complaint(
        *arguments, tmp_path / "embedded", "--edit-negative-prompt", "blurry"
    )
