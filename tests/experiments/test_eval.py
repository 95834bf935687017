"""``pdtr eval BENCHMARK`` from the command line to results.json, with real policies, detectors and readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.scenes.detector import detect
from envs.scenes.rewards import RULE
from envs.scenes.suite import t2i_prompts
from experiments.cli import main
from experiments.eval_options import OPTIONS
from pdtr.benchmarks.geneval import load_geneval, save_metadata
from rewards.base import Images
from tests.pdtr.benchmarks.files import (
    DPG_ROWS,
    gedit_row,
    plain,
    write_dpg,
    write_geneval,
    write_imgedit,
    write_parquet,
)
from tests.rewards.judges.fake_server import FakeServer, Reply, Request, as_json, completion, parts, pictures, says
from tests.rewards.tiny_detectors import save_mask2former
from tests.rewards.tiny_models import save_clip, written

Run = Callable[..., str]


@pytest.fixture
def pdtr_eval(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; -> what it printed."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["eval", *map(str, arguments)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["eval", *map(str, arguments)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return run


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    return content


def overall(folder: Path, metric: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = results(folder)["numbers"]
    return next(row for row in rows if row["metric"] == metric and row["task"] == "overall")


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


def test_other_settings_are_refused_where_images_lie(scenes: Path, drawn: Path, complaint: Run) -> None:
    line = complaint("geneval", "--data", scenes, "--detector", "scenes", "--output", drawn, "--guidance-scale", "7")
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


# Judges: a server that grades by what it is asked, or is away


class Judge:
    """Answers each request by a function; counts them."""

    def __init__(self, answer: Callable[[str, Request], Reply]) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def __call__(self, request: Request) -> Reply:
        if request.path.endswith("/models"):
            return as_json({"data": [{"id": "judge-7b"}]})
        text = "".join(part.get("text", "") for part in parts(request))
        self.asked.append(text)
        return self.answer(text, request)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, Request], Reply]], tuple[Judge, str]]]:
    started: list[FakeServer] = []

    def start(answer: Callable[[str, Request], Reply]) -> tuple[Judge, str]:
        judge = Judge(answer)
        started.append(FakeServer(judge))
        started[-1].start()
        return judge, started[-1].url

    yield start
    for server in started:
        server.stop()


def rubric(**grades: int) -> Reply:
    return as_json(completion(json.dumps({"reasoning": "seen", **grades})))


def test_gedit_masks_what_the_judge_fails_at_and_asks_for_that_alone_again(
    serve: Any, pdtr_eval: Run, tmp_path: Path
) -> None:
    data = write_parquet(tmp_path / "d.parquet", [gedit_row("a", "color_alter"), gedit_row("b", "subject-add")])
    shapes: list[tuple[int, ...]] = []

    def answer(text: str, request: Request) -> Reply:
        shapes.extend(picture.shape for picture in pictures(request))
        if "naturalness" in text:
            return rubric(naturalness=9, artifacts=4)
        return rubric(edit_success=9, restraint=10) if "change a" in text else Reply(200, b'{"choices": []}')

    judge, url = serve(answer)
    arguments = ("gedit", "--data", data, "--base-url", url, "--output", tmp_path / "out", "--chunk-size", "2",
                 "--call-seconds", "3")  # fmt: skip
    printed = pdtr_eval(*arguments)
    first = {(row["metric"], row["task"]): row for row in results(tmp_path / "out")["numbers"]}
    assert first["O", "color_alter"]["value"] == pytest.approx(6.0)
    assert (first["O", "subject-add"]["value"], first["O", "subject-add"]["failed"]) == (None, 1)
    assert first["PQ", "overall"]["value"] == pytest.approx(4.0)
    assert first["O", "overall"]["failed"] == 1
    assert "consistency: " in printed
    for told in ("judge-7b", "viescore_sc.v1:", "viescore_pq.v1:", "8 steps", "not comparable"):
        assert told in printed
    # The edit is shown at its source's size.
    assert set(shapes) == {(12, 20, 3)}
    judge.asked.clear()
    judge.answer = lambda text, request: (
        rubric(naturalness=9, artifacts=4) if "naturalness" in text else rubric(edit_success=1, restraint=1)
    )
    pdtr_eval(*arguments)
    assert len(judge.asked) == 2
    assert all("change a" not in text for text in judge.asked)
    assert overall(tmp_path / "out", "O")["value"] == pytest.approx((6.0 + 2.0) / 2)


def test_imgedit_reports_its_score_and_the_capped_one(serve: Any, pdtr_eval: Run, tmp_path: Path) -> None:
    data = write_imgedit(tmp_path / "data", {"1": ("add", "add a hat"), "2": ("alter", "make it red")})

    def answer(text: str, request: Request) -> Reply:
        compliance = 1 if "add a hat" in text else 4
        return rubric(compliance=compliance, seamlessness=4, preservation=4)

    _, url = serve(answer)
    printed = pdtr_eval("imgedit", "--data", data, "--base-url", url, "--output", tmp_path / "out")
    assert overall(tmp_path / "out", "score")["value"] == pytest.approx((3 + 4) / 2)
    assert overall(tmp_path / "out", "capped")["value"] == pytest.approx((1 + 4) / 2)
    assert "imgedit.v1:" in printed
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["1.png", "2.png"]


def test_dpg_asks_every_question_of_every_crop(serve: Any, pdtr_eval: Run, tmp_path: Path) -> None:
    data = write_dpg(tmp_path / "dpg_bench.csv")
    judge, url = serve(lambda text, request: says({"no": 0.7, "yes": 0.2} if "lake?" in text else {"yes": 0.9}))
    pdtr_eval("dpg", "--data", data, "--base-url", url, "--output", tmp_path / "out")
    assert len(judge.asked) == 4 * len(DPG_ROWS)
    # No lake, so that nothing is by it: 2 of 4 and 2 of 2.
    assert overall(tmp_path / "out", "score")["value"] == pytest.approx(75.0)
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["1.png", "stock_2.png"]
    assert results(tmp_path / "out")["scoring"]["judge"] == "judge-7b"
    assert len(results(tmp_path / "out")["scoring"]["template"]["question.v1"]) == 12


def test_a_judge_that_is_away_is_noticed_before_anything_is_drawn(complaint: Run, tmp_path: Path) -> None:
    data = write_dpg(tmp_path / "dpg_bench.csv")
    line = complaint("dpg", "--data", data, "--base-url", "http://127.0.0.1:9/v1", "--output", tmp_path / "out")
    assert "expected a judge that answers" in line
    assert not (tmp_path / "out").exists()
    assert "--base-url" in complaint("dpg", "--data", data, "--output", tmp_path / "out")


# Real readers and scorers


def folder_of(root: Path, images: list[Images]) -> Path:
    from pdtr.benchmarks.pictures import save_picture

    for index, image in enumerate(images):
        save_picture(root / f"{index:05d}" / "samples" / "0000.png", image)
    return root


def test_ocr_reads_real_text(pdtr_eval: Run, tmp_path: Path) -> None:
    data = tmp_path / "test.txt"
    data.write_text('A sign that says "Open Now"\nA mug with "Opeh"\nA wall that reads "Dogs"\n')
    images = folder_of(tmp_path / "images", [written("Open Now"), written("Open"), written("")])
    printed = pdtr_eval("ocr", "--data", data, "--images", images, "--output", tmp_path / "out")
    prompts = results(tmp_path / "out")["prompts"]
    # "Open" for "Opeh" is one of four characters wrong.
    assert [entry["values"]["accuracy"] for entry in prompts.values()] == pytest.approx([1.0, 0.75, 0.0])
    assert overall(tmp_path / "out", "accuracy")["value"] == pytest.approx(1.75 / 3)
    assert "in place of PaddleOCR 2.9.1" in printed


def test_drawbench_by_a_preference_model_on_disk(pdtr_eval: Run, tmp_path: Path) -> None:
    from rewards.base import Prompt
    from rewards.clip_models import ClipSource
    from rewards.pickscore import PickScore, PickScoreSettings
    from rewards.scoring import score

    save_clip(tmp_path / "clip")
    data = tmp_path / "drawbench.txt"
    data.write_text("a red cat\na red cat\ntwo blue dogs\n")
    images = [plain((200, 10, 10), (40, 40)), plain((10, 10, 200), (40, 40))]
    printed = pdtr_eval(
        "drawbench", "--data", data, "--images", folder_of(tmp_path / "images", images), "--output", tmp_path / "out",
        "--scorers", "pickscore", "clip", "--pickscore-weights", tmp_path / "clip", "--clip-weights", tmp_path / "clip",
    )  # fmt: skip
    reward = PickScore(PickScoreSettings(ClipSource(str(tmp_path / "clip"))))
    expected = score(reward, np.stack(images), [Prompt("a red cat"), Prompt("two blue dogs")]).total
    assert overall(tmp_path / "out", "pickscore")["value"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert overall(tmp_path / "out", "clip")["prompts"] == 2
    assert f"pickscore with the weights {tmp_path / 'clip'}" in printed


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
def test_a_mistake_is_one_line(arguments: list[str], parts: list[str], tmp_path: Path, complaint: Run) -> None:
    write_geneval(tmp_path / "m.jsonl")
    write_dpg(tmp_path / "dpg.csv")
    line = complaint(*(argument.format(tmp=tmp_path) for argument in arguments))
    for part in parts:
        assert part.format(tmp=tmp_path) in line
