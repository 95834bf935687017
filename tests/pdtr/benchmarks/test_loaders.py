"""The published formats as they lie on disk, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import envs.prompts
from pdtr.benchmarks.base import Benchmark, count_deviations
from pdtr.benchmarks.dpg import load_dpg
from pdtr.benchmarks.drawbench import load_drawbench
from pdtr.benchmarks.gedit import TASKS, load_gedit
from pdtr.benchmarks.geneval import PUBLISHED, load_geneval, official_rows, save_metadata
from pdtr.benchmarks.imgedit import PUBLISHED as IMGEDIT
from pdtr.benchmarks.imgedit import load_imgedit
from pdtr.benchmarks.ocr import load_ocr
from rewards.base import Prompt
from tests.pdtr.benchmarks.files import (
    DPG_ROWS,
    GENEVAL_LINES,
    gedit_row,
    plain,
    png,
    write_dpg,
    write_geneval,
    write_imgedit,
    write_parquet,
)


def texts(benchmark: Benchmark) -> list[str]:
    return [item.text for item in benchmark.items]


# GenEval


def test_geneval_reads_its_metadata(tmp_path: Path) -> None:
    benchmark = load_geneval(write_geneval(tmp_path / "evaluation_metadata.jsonl"))
    assert (len(benchmark.items), benchmark.samples, benchmark.average) == (6, 4, "tasks")
    assert [item.task for item in benchmark.items] == list(PUBLISHED)
    assert benchmark.items[4].metadata["include"][1] == {"class": "tie", "count": 1, "position": ["above", 0]}
    # One of 80 is another benchmark, and says so.
    assert benchmark.deviations == ("6 prompts, published 553",)


def test_geneval_whole_has_no_deviation(tmp_path: Path) -> None:
    lines = []
    for line, (tag, count) in zip(GENEVAL_LINES, PUBLISHED.items(), strict=True):
        row = json.loads(line)
        assert row["tag"] == tag
        lines += [json.dumps({**row, "prompt": f"{row['prompt']} {i}"}) for i in range(count)]
    benchmark = load_geneval(write_geneval(tmp_path / "m.jsonl", lines))
    assert (len(benchmark.items), benchmark.deviations) == (553, ())
    limited = benchmark.limited(6)
    assert {item.task for item in limited.items} == set(PUBLISHED)
    assert limited.deviations == ("6 of 553 prompts",)
    assert limited.digest == benchmark.digest


def test_geneval_keeps_the_file_s_numbers_where_a_row_is_bad(tmp_path: Path) -> None:
    lines = [GENEVAL_LINES[0], '{"prompt": "no metadata"}', "no JSON", GENEVAL_LINES[1]]
    benchmark = load_geneval(write_geneval(tmp_path / "m.jsonl", lines))
    # The official folders are numbered by the lines of the file.
    assert [item.index for item in benchmark.items] == [0, 3]
    assert [problem.split(":")[0] for problem in benchmark.problems] == ["line 2", "line 3"]


def test_geneval_without_a_good_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 bad ones, the first: line 1: expected a text under prompt"):
        load_geneval(write_geneval(tmp_path / "m.jsonl", ["{}"]))
    with pytest.raises(ValueError, match=r"no such file; beside it are \['m.jsonl'\]"):
        load_geneval(tmp_path / "n.jsonl")


def test_prompts_of_another_world_become_geneval_s_file(tmp_path: Path) -> None:
    from envs.scenes.suite import t2i_prompts

    prompts = t2i_prompts("held_out", 12, 5)
    path = tmp_path / "scenes.jsonl"
    save_metadata(path, prompts)
    benchmark = load_geneval(path)
    assert benchmark.problems == ()
    assert texts(benchmark) == [prompt.text for prompt in prompts]
    assert set(json.loads(path.read_text().splitlines()[0])) <= {"tag", "include", "exclude", "prompt"}
    with pytest.raises(ValueError, match="tag"):
        save_metadata(path, [Prompt("a cat")])


def test_the_official_scorer_s_results_are_read_back(tmp_path: Path) -> None:
    benchmark = load_geneval(write_geneval(tmp_path / "m.jsonl", GENEVAL_LINES[:2]))
    lines = [
        json.dumps(
            {
                "filename": f"out/{item.index:05d}/samples/{sample:04d}.png",
                "tag": item.task,
                "prompt": item.text,
                "correct": (item.index, sample) != (1, 2),
                "reason": "",
                "metadata": "{}",
                "details": "{}",
            }
        )
        for item in benchmark.items
        for sample in range(4)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([*lines[:-1], "{}"]) + "\n")
    rows, scorer = official_rows(path, benchmark)
    assert scorer.deviations == ()
    assert [row.values.get("official") for row in rows] == [1, 1, 1, 1, 1, 1, 0, None]
    assert rows[-1].reason == "results.jsonl has no line for this image"
    path.write_text(lines[0].replace("a bench", "a horse") + "\n")
    with pytest.raises(ValueError, match="of another prompts file"):
        official_rows(path, benchmark)


# DPG-Bench


def test_dpg_reads_its_questions(tmp_path: Path) -> None:
    benchmark = load_dpg(write_dpg(tmp_path / "dpg_bench.csv"))
    assert [item.id for item in benchmark.items] == ["1", "stock_2"]
    questions = benchmark.items[0].metadata["questions"]
    assert [question["parents"] for question in questions] == [[0], [1], [0], [1, 3]]
    assert [question["category"] for question in questions] == ["entity", "attribute", "entity", "relation"]
    assert benchmark.deviations == ("2 prompts, published 1065",)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("stock_2", "two birds", 2, "9", "other - count (x)", "?"), "stock_2: questions: expected parents among"),
        (("stock_2", "two birds", 2, "2", "other - count (x)", "?"), "stock_2: questions: expected no circle"),
        (("stock_2", "two birds", 2, "one", "other - count (x)", "?"), "stock_2: expected numbers as proposition_id"),
        (("../../etc", "two birds", 2, "0", "other - count (x)", "?"), "line 7: expected an item_id that can name"),
    ],
)
def test_dpg_skips_what_is_damaged(changed: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    benchmark = load_dpg(write_dpg(tmp_path / "dpg.csv", [*DPG_ROWS[:-1], changed]))
    assert benchmark.items[0].id == "1"
    assert any(problem.startswith(message) for problem in benchmark.problems), benchmark.problems


def test_dpg_says_which_column_is_missing(tmp_path: Path) -> None:
    (tmp_path / "dpg.csv").write_text("item_id,text\n1,a cat\n")
    with pytest.raises(ValueError, match="'proposition_id'"):
        load_dpg(tmp_path / "dpg.csv")
    with pytest.raises(ValueError, match="no such file"):
        load_dpg(tmp_path / "absent.csv")


# GEdit-Bench


def test_gedit_reads_parquet_of_one_language(tmp_path: Path) -> None:
    rows = [gedit_row(f"k{i}", task) for i, task in enumerate(TASKS)]
    rows.append(gedit_row("k99", "text_change", instruction_language="cn", instruction="把文字改掉"))
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    benchmark = load_gedit(tmp_path)
    assert len(benchmark.items) == 11
    assert benchmark.deviations == ("11 prompts, published 606",)
    item = benchmark.items[0]
    # The policy is given the raw picture at its own size, the judge the scaled one.
    assert item.asked((16, 16)).source_images[0].shape == (16, 16, 3)
    assert item.sources[0].load().shape == (24, 40, 3)
    assert item.shown().source_images[0].shape == (12, 20, 3)
    assert [item.text for item in load_gedit(tmp_path, "cn").items] == ["把文字改掉"]


def test_gedit_reads_json_with_pictures_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(plain()))
    row = {"key": "a", "task_type": "subject-add", "instruction": "x", "instruction_language": "en"}
    row["input_image"] = "a.png"
    path = tmp_path / "gedit.jsonl"
    path.write_text(json.dumps(row) + "\n")
    benchmark = load_gedit(path, image_root=tmp_path / "pictures")
    assert benchmark.items[0].sources == benchmark.items[0].shown_sources
    with pytest.raises(ValueError, match="expected one good row"):
        load_gedit(path)


def test_gedit_reads_a_data_set_that_hugging_face_saved(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    rows = [gedit_row("a", "subject-add"), gedit_row("b", "color_alter")]
    names = ("key", "task_type", "instruction", "instruction_language")
    columns = {name: [row[name] for row in rows] for name in names}
    pictures = [Image.fromarray(plain()), Image.fromarray(plain((0, 0, 255)))]
    features = datasets.Features(
        {**{name: datasets.Value("string") for name in columns}, "input_image": datasets.Image()}
    )
    datasets.Dataset.from_dict({**columns, "input_image": pictures}, features=features).save_to_disk(tmp_path / "set")
    benchmark = load_gedit(tmp_path / "set")
    assert [item.id for item in benchmark.items] == ["a", "b"]
    assert np.array_equal(benchmark.items[1].sources[0].load(), plain((0, 0, 255)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "../../x"}, "can name files"),
        ({"task_type": ".hidden"}, "can name files"),
        ({"instruction": ""}, "expected a text under instruction"),
        ({"input_image": {"bytes": b"no picture", "path": None}}, "expected a whole PNG"),
        ({"input_image": {"bytes": png(plain(size=(64, 64)))[:-40], "path": None}}, "expected a whole PNG"),
        ({"input_image": {"bytes": png(plain(size=(400, 400))), "path": None}}, "at most 100000 pixels, got 400x400"),
        ({"input_image": None}, "bytes or path"),
    ],
)
def test_gedit_skips_and_reports_bad_rows(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envs.prompts, "MAX_IMAGE_PIXELS", 100_000)
    rows = [gedit_row("good", "subject-add"), gedit_row("bad", "subject-add", **changes)]
    path = write_parquet(tmp_path / "d.parquet", rows)
    benchmark = load_gedit(path)
    assert [item.id for item in benchmark.items] == ["good"]
    assert benchmark.problems[0].startswith("d.parquet, row 2: ")
    assert message in benchmark.problems[0]


def test_a_path_may_not_leave_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(plain()))
    (tmp_path / "data").mkdir()
    row = {"key": "a", "task_type": "x", "instruction": "x", "instruction_language": "en"}
    row["input_image"] = "../secret.png"
    path = tmp_path / "data" / "gedit.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="give --image-root"):
        load_gedit(path)


def test_a_picture_s_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs.prompts, "MAX_BYTES", 50)
    with pytest.raises(ValueError, match="at most 50 bytes"):
        load_gedit(write_parquet(tmp_path / "d.parquet", [gedit_row("a", "subject-add")]))


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="expected a parquet file"):
        load_gedit(tmp_path / "d.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without either"):
        load_gedit(tmp_path / "empty")
    (tmp_path / "d.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"\.parquet, \.jsonl or \.json"):
        load_gedit(tmp_path / "d.csv")


# ImgEdit-Bench


def test_imgedit_reads_its_json(tmp_path: Path) -> None:
    edits = {"1082": ("alter", "make it smooth"), "97": ("add", "add a lamp"), "5": ("hybrid", "both")}
    path = write_imgedit(tmp_path, edits)
    benchmark = load_imgedit(path)
    # The file's names of two kinds become the tables'.
    assert {item.id: item.task for item in benchmark.items} == {"1082": "adjust", "97": "add", "5": "compose"}
    assert benchmark.items[0].sources[0].load().shape == (10, 14, 3)
    assert sum(IMGEDIT.values()) == 737
    assert benchmark.deviations == ("3 prompts, published 737",)


def test_imgedit_reports_a_picture_that_is_not_there(tmp_path: Path) -> None:
    path = write_imgedit(tmp_path, {"1": ("add", "a"), "2": ("add", "b")})
    (tmp_path / "animal" / "2.jpg").unlink()
    benchmark = load_imgedit(path)
    assert [item.id for item in benchmark.items] == ["1"]
    assert benchmark.problems[0].startswith("entry 2: entry 2 (animal/2.jpg): expected a picture's file")


# Lists of prompts


def test_ocr_skips_prompts_without_a_text(tmp_path: Path) -> None:
    path = tmp_path / "test.txt"
    path.write_text('A sign that says "Open"\nA sign that says “Closed”\nA mug with "Hello World" on it')
    benchmark = load_ocr(path)
    assert texts(benchmark) == ['A sign that says "Open"', 'A mug with "Hello World" on it']
    assert "straight quotation marks" in benchmark.problems[0]
    assert benchmark.deviations == ("2 prompts, published 1018",)
    path.write_text("A mug\n")
    with pytest.raises(ValueError, match="quotation marks"):
        load_ocr(path)


def test_drawbench_counts_a_repeated_prompt_once(tmp_path: Path) -> None:
    path = tmp_path / "drawbench.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(200) for _ in range(5)))
    benchmark = load_drawbench(path, ["pickscore", "aesthetic"])
    assert (len(benchmark.items), benchmark.deviations) == (200, ())
    assert [metric.name for metric in benchmark.metrics] == ["pickscore", "aesthetic"]
    with pytest.raises(ValueError, match="expected one or more of pickscore"):
        load_drawbench(path, [])


def test_the_same_number_of_other_tasks_is_told(tmp_path: Path) -> None:
    items = load_geneval(write_geneval(tmp_path / "m.jsonl")).items
    expected = {item.task: 1 for item in items}
    assert count_deviations(items, expected) == ()
    assert count_deviations(items, {**expected, "counting": 0, "colors": 2}) == (
        "prompts a task: counting 1 and not 0, colors 1 and not 2",
    )
    del expected["colors"]
    assert count_deviations(items, expected)[-1] == "colors: no task of the benchmark"
