"""In what a judged benchmark's numbers differ from the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdtr.benchmarks import gedit, imgedit
from pdtr.benchmarks.judging import PublishedJudge, judge_deviations
from rewards.judges.client import JudgeClient
from rewards.judges.judge import VLMJudge
from rewards.judges.settings import JudgeSettings
from rewards.judges.templates import FOLDER, load_template

SHIPPED = load_template("imgedit.v1")
JUDGED = PublishedJudge("GPT-4.1", ("gpt-4.1", "gpt-4.1-2025-04-14"), "ImgEdit's")


@pytest.mark.parametrize("model", ["gpt-4.1", "GPT-4.1", "openai/gpt-4.1-2025-04-14"])
def test_the_published_judge_is_not_said_to_be_another(model: str) -> None:
    assert judge_deviations(model, [SHIPPED], JUDGED) == (
        "the judge's questions (imgedit.v1) are this library's own text and not ImgEdit's",
    )


@pytest.mark.parametrize("model", ["gpt-4.1-mini", "gpt-4o", "Qwen2.5-VL-7B", "gpt-4.1/other"])
def test_another_judge_is(model: str) -> None:
    found = judge_deviations(model, [SHIPPED], JUDGED)
    assert found[0] == f"judge {model} in place of GPT-4.1"
    assert len(found) == 2


def test_of_a_text_of_the_user_s_nothing_is_known(tmp_path: Path) -> None:
    text = (FOLDER / "imgedit.v1.txt").read_text("utf-8")
    # A shipped name does not make a text the shipped one; its copy under another name is not known to be it.
    for name, content in (("imgedit.v1", text.replace("Instruction: ", "What was asked: ")), ("mine", text)):
        path = tmp_path / f"{name}.txt"
        path.write_text(content, "utf-8")
        (told,) = judge_deviations("gpt-4.1", [SHIPPED, load_template(path)], JUDGED)
        assert told == f"the text of the judge's questions (imgedit.v1, {name}) is not known to be ImgEdit's"


@pytest.mark.parametrize(
    ("model", "texts", "is_other"),
    [
        ("gpt-4.1-2025-04-14", "VIEScore's", False),
        ("Qwen/Qwen2.5-VL-72B-Instruct-AWQ", "VIEScore's", False),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "VIEScore's", True),
        ("gpt-4o", "ImgEdit's", False),
    ],
)
def test_a_judged_benchmark_is_never_called_comparable(model: str, texts: str, is_other: bool) -> None:
    with JudgeClient(["http://127.0.0.1:9/v1"]) as client:

        def judge(name: str) -> VLMJudge:
            return VLMJudge(client, model, load_template(name), JudgeSettings())

        if texts == "VIEScore's":
            scorer = gedit.judge_scorer(judge("viescore_sc.v1"), judge("viescore_pq.v1"))
        else:
            scorer = imgedit.judge_scorer(judge("imgedit.v1"))
    assert scorer.deviations[-1].endswith(f"own text and not {texts}")
    assert (scorer.deviations[0] == f"judge {model} in place of GPT-4.1") is is_other
