"""``pdtr eval`` with judges behind a server that fails, a real reader of text, and preference models on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdtr.benchmarks.pictures import save_picture
from rewards.base import Images, Prompt
from rewards.clip_models import ClipSource
from rewards.pickscore import PickScore, PickScoreSettings
from rewards.scoring import score
from rewards.tiny.clip import save_clip
from tests.pdtr.benchmarks.files import (
    DPG_ROWS,
    gedit_row,
    overall,
    plain,
    results,
    write_dpg,
    write_imgedit,
    write_parquet,
)
from tests.rewards.judges.fake_server import FakeServer, Reply, Request, as_json, completion, parts, pictures, says
from tests.rewards.tiny_models import written

Run = Callable[..., str]


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
    for told in (
        *("judge-7b", "viescore_sc.v1:", "viescore_pq.v1:", "8 steps", "not comparable"),
        *("2 of 2 sources squashed to 48x48", "judge judge-7b in place of GPT-4.1", "own text and not VIEScore's"),
    ):
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


def test_a_judge_that_is_away_is_noticed_before_anything_is_drawn(eval_complaint: Run, tmp_path: Path) -> None:
    data = write_dpg(tmp_path / "dpg_bench.csv")
    line = eval_complaint("dpg", "--data", data, "--base-url", "http://127.0.0.1:9/v1", "--output", tmp_path / "out")
    assert "expected a judge that answers" in line
    assert not (tmp_path / "out").exists()
    assert "--base-url" in eval_complaint("dpg", "--data", data, "--output", tmp_path / "out")


# Real readers and scorers


def folder_of(root: Path, images: list[Images]) -> Path:
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
