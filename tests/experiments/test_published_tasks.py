"""Files of prompts to render: what the OCR reward would say nothing of is refused when they are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.published_tasks import OCRTasks
from pdtr.config import EvaluationConfig
from pdtr.tasks import Task
from rewards.pixel import redness

EVALUATION = EvaluationConfig(num_prompts=2, num_final_prompts=3)
GOOD = [f'a sign that says "{n}"' for n in range(20)]
BAD = ["a sign", "a sign that says “Open”", 'a sign that says ""', 'a sign that says "  "', 'a sign 5" wide']


def loaded(tasks: OCRTasks) -> dict[str, Task]:
    return tasks.make_tasks(EVALUATION, {"t2i": redness})


def prompts(path: Path, lines: list[str]) -> OCRTasks:
    path.write_text("\n".join(lines) + "\n")
    return OCRTasks(t2i_prompts=path)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("row", [0, 7, 20])
def test_a_prompt_without_a_target_is_refused_wherever_it_is(bad: str, row: int, tmp_path: Path) -> None:
    tasks = prompts(tmp_path / "train.txt", [*GOOD[:row], bad, *GOOD[row:]])
    # Held out of the file or trained on, a row is looked at.
    with pytest.raises(ValueError, match=rf"train\.txt: expected a text .* 1 of 21; .* rows train/{row:08d} "):
        loaded(tasks)


def test_both_files_are_looked_at(tmp_path: Path) -> None:
    good = prompts(tmp_path / "train.txt", GOOD)
    assert len(loaded(good)["t2i"].pool) == 15  # type: ignore[arg-type]
    held_out = prompts(tmp_path / "test.txt", [*GOOD[:4], "a sign"]).t2i_prompts
    with pytest.raises(ValueError, match=r"test\.txt: .* 1 of 5; .* rows test/00000004"):
        loaded(replace(good, t2i_held_out=held_out))


def test_many_are_counted_and_some_are_named(tmp_path: Path) -> None:
    tasks = prompts(tmp_path / "train.txt", [*GOOD, *BAD, *BAD])
    with pytest.raises(ValueError, match=r"10 of 30; .* rows train/00000020, .*, train/00000024, \.\.\. \(counted"):
        loaded(tasks)


def test_another_reward_may_ask_for_other_prompts(tmp_path: Path) -> None:
    tasks = replace(prompts(tmp_path / "train.txt", [*GOOD, *BAD]), t2i_reward="rewards.pixel:redness")
    assert len(loaded(tasks)["t2i"].pool) == 20  # type: ignore[arg-type]


def test_a_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    prompts(Path("train.txt"), [*GOOD, BAD[1]])
    flags = ["--tasks.t2i-prompts", "train.txt", "--tasks.t2i-held-out", "None", "--base", "model"]
    flags += ["--evaluation.num-prompts", "2", "--evaluation.num-final-prompts", "3", "--output-dir", "run"]
    assert main(["train", "flow_grpo_sd3_ocr", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rows train/00000020" in error
    assert "replace “ and its like by straight ones" in error
    assert not Path("run/config.json").exists()
