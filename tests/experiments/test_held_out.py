"""``pdtr eval`` on the embedded world: a run's final evaluation from images that are kept, resumed and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pdtr.sampling
from agents.policies.scenes import ScenesPolicy
from envs.prompts import save_prompts
from envs.scenes.suite import edit_prompts, t2i_prompts
from experiments.cli import main
from experiments.held_out import format_success, success_rows
from pdtr.benchmarks.aggregate import OVERALL
from pdtr.benchmarks.pictures import Picture
from pdtr.benchmarks.results import load_results, results_of
from pdtr.benchmarks.scenes import scenes_benchmark, scenes_scorer
from pdtr.benchmarks.scoring import Row
from pdtr.config import EvaluationConfig
from pdtr.evaluate import EVALUATION_SEED, evaluate
from pdtr.launch import BASE
from pdtr.sampling import device_or_gpu, evaluation_sampler
from pdtr.tasks import scenes_tasks

Run = Callable[..., str]
COUNT = 6
FLAGS = ("--num-prompts", str(COUNT), "--num-threads", "1")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy that ships with the package, on both tasks."""
    folder = tmp_path_factory.mktemp("evaluated") / "base"
    assert main(["eval", *FLAGS, "--output", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", ["t2i", "edit"])
def test_the_numbers_are_those_of_a_run_s_final_evaluation(evaluated: Path, name: str) -> None:
    task = scenes_tasks(EvaluationConfig().num_prompts, COUNT)[name]
    envs = task.make_envs(COUNT, is_evaluation=True)
    expected = evaluate(ScenesPolicy.load(BASE), envs, task.final, evaluation_sampler(None), success=task.success)
    found = load_results(evaluated / name)
    values = [entry["values"] for entry in found.prompts.values()]
    assert list(found.prompts) == list(expected.ids)
    assert [entry["strict"] for entry in values] == expected.strict.tolist()
    assert [entry["reward"] for entry in values] == pytest.approx(expected.reward.tolist(), abs=1e-3)
    assert [entry["task"] for entry in found.prompts.values()] == list(expected.skills)
    paths = [evaluated / name / "images" / f"{index:05d}.png" for index in range(COUNT)]
    images = np.stack([Picture(path.name, path).load() for path in paths])
    assert np.abs(images.astype(int) - expected.images).max() <= 1


def test_the_table_says_how_images_were_drawn_and_how_sure_a_number_is(evaluated: Path, pdtr_eval: Run) -> None:
    printed = pdtr_eval(*FLAGS, "--output", evaluated)
    for told in (
        f"ODE, 8 steps, guidance 2.5, shift 4, 48x48, seed {EVALUATION_SEED}, policy {BASE}",
        "6 prompts, the suite has 600",
        "standard error",
        f"results: {evaluated / 'edit' / 'results.json'}",
    ):
        assert told in printed
    for name in ("t2i", "edit"):
        strict = [entry["values"]["strict"] for entry in load_results(evaluated / name).prompts.values()]
        error = np.std(strict, ddof=1) / np.sqrt(COUNT)
        line = f"{np.mean(strict):7.1%}"
        (of_all,) = [row for row in success_rows(load_results(evaluated / name)) if row.skill == "all"]
        assert (of_all.strict, of_all.error) == pytest.approx((np.mean(strict), error))
        assert any(
            row.startswith("  all ") and line in row and f"+- {error:.1%}" in row and "n=6  failed 0" in row
            for row in printed.splitlines()
        )


def test_the_same_command_again_draws_and_scores_nothing(evaluated: Path, pdtr_eval: Run) -> None:
    kept = [*evaluated.rglob("*.png"), *evaluated.rglob("scores.jsonl")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(before) == 2 * COUNT + 2
    pdtr_eval(*FLAGS, "--output", evaluated)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    kept[0].unlink()
    pdtr_eval(*FLAGS, "--output", evaluated)
    assert {path: path.stat().st_mtime_ns for path in kept[1:]} == {path: before[path] for path in kept[1:]}
    assert kept[0].is_file()


def test_other_settings_are_refused_where_images_lie(evaluated: Path, eval_complaint: Run) -> None:
    assert "guidance_scale 2.5 and not 4.0" in eval_complaint(*FLAGS, "--output", evaluated, "--guidance-scale", "4")


def test_two_evaluations_are_compared_task_by_task(evaluated: Path, pdtr_eval: Run, tmp_path: Path) -> None:
    other = tmp_path / "one step"
    pdtr_eval("scenes", *FLAGS, "--output", other, "--num-inference-steps", "1")
    printed = pdtr_eval("scenes", "--compare", other, evaluated, "--output", tmp_path / "difference.json")
    for name in ("t2i", "edit"):
        content = json.loads((tmp_path / f"difference_{name}.json").read_text())
        by_metric = {row["metric"]: row for row in content["differences"] if row["task"] == OVERALL}
        means = [
            {number.metric: number.value for number in load_results(side / name).numbers if number.task == OVERALL}
            for side in (other, evaluated)
        ]
        for metric in ("strict", "reward"):
            assert by_metric[metric]["difference"] == pytest.approx(means[1][metric] - means[0][metric])
            assert by_metric[metric]["prompts"] == COUNT
    assert [line.split(", ")[1] for line in printed.splitlines() if line.startswith("  first: ")] == ["1 steps"] * 2
    alone = pdtr_eval("--compare", other / "edit", evaluated / "edit")
    assert alone.splitlines()[0] == "held-out editing of the embedded world: second minus first, 6 prompts, paired"
    assert alone.strip() in printed


def test_results_of_something_else_are_not_compared(evaluated: Path, eval_complaint: Run) -> None:
    assert "different benchmarks" in eval_complaint("--compare", evaluated / "t2i", evaluated / "edit")
    assert "expected results of geneval" in eval_complaint("geneval", "--compare", evaluated, evaluated)


def test_without_an_output_nothing_is_kept(pdtr_eval: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "results:" not in pdtr_eval("--task", "t2i", "--num-prompts", "2", "--num-threads", "1")
    assert not any(tmp_path.iterdir())


def test_what_could_not_be_judged_is_left_out_and_counted(pdtr_eval: Run, tmp_path: Path) -> None:
    prompts = t2i_prompts("held_out", 2, 5)
    bad = replace(prompts[1], metadata={"tag": "counting", "include": [{"class": "zebra", "count": 1}]}, id="")
    save_prompts(tmp_path / "p.jsonl", [prompts[0], bad])
    printed = pdtr_eval("--prompts", tmp_path / "p.jsonl", "--num-threads", "1", "--output", tmp_path / "out")
    counting, of_all = (
        next(line for line in printed.splitlines() if line.startswith(f"  {skill} ")) for skill in ("counting", "all")
    )
    assert counting.split()[1:] == ["-", "+-", "-", "n=0", "failed", "1"]
    assert of_all.endswith("n=1  failed 1")
    assert "failed: 1 x include[0].class: expected one of" in printed
    assert "prompts of a file in place of the suite's" in printed


def test_success_has_wilson_s_interval() -> None:
    task = scenes_tasks(1, 4)["t2i"]
    benchmark = scenes_benchmark(task)
    strict = [1.0, 0.0, None, 1.0]
    rows = [
        Row(item.id, 0, "", "", {} if value is None else {"strict": value}, "" if value is not None else "unread")
        for item, value in zip(benchmark.items, strict, strict=True)
    ]
    results = results_of(benchmark, scenes_scorer(task), rows, None)
    (of_all,) = [row for row in success_rows(results) if row.skill == "all"]
    assert (of_all.count, of_all.failed) == (3, 1)
    assert of_all.strict == pytest.approx(2 / 3)
    # z = 1.959964: (2/3 + z^2/6 +- z sqrt(2/27 + z^2/36)) / (1 + z^2/3).
    assert (of_all.low, of_all.high) == pytest.approx((0.207660, 0.938508), abs=1e-6)
    # The variance of 1, 0 and 1 is 1/3.
    assert of_all.error == pytest.approx(1 / 3)
    assert "failed: 1 x unread" in format_success(results)


def test_the_suites_are_told_from_other_prompts() -> None:
    assert scenes_benchmark(scenes_tasks(1, 600)["edit"]).deviations == ()
    task = scenes_tasks(1, 3)["edit"]
    named_alike = replace(task, final=[replace(prompt, id="x") for prompt in task.final])
    assert [item.id for item in scenes_benchmark(named_alike).items] == ["00000", "00001", "00002"]
    others = replace(task, final=edit_prompts("held_out", 3, 8))
    assert scenes_benchmark(others).digest != scenes_benchmark(task).digest == scenes_benchmark(named_alike).digest


def test_the_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch, pdtr_eval: Run) -> None:
    for available, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert device_or_gpu() == name
        assert device_or_gpu("cuda:1") == "cuda:1"
    moved: list[Any] = []
    monkeypatch.setattr(pdtr.sampling, "device_or_gpu", lambda name="": f"{name}|gpu")
    monkeypatch.setattr(ScenesPolicy, "to", lambda self, device: moved.append(device))
    pdtr_eval("--task", "t2i", "--num-prompts", "1", "--num-threads", "1", "--device", "a")
    pdtr_eval("--task", "t2i", "--num-prompts", "1", "--num-threads", "1")
    assert moved == ["a|gpu", "|gpu"]


def test_a_full_disk_is_said_to_be_one(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    side = str(evaluated / "t2i")
    assert main(["eval", "--compare", side, side, "--output", "/dev/full"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("pdtr: /dev/full: the disk is full")
