"""GenEval's training prompts: the mixture, no test prompt in any order, and that the file reads back."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from envs.geneval_prompts import (
    CLASSES,
    RATIO,
    combination,
    load_rows,
    save_rows,
    shares,
    training_prompts,
)
from envs.prompts import load_prompts
from rewards.geneval import validate_metadata

# Lines of the published test set, verbatim.
TEST_LINES = (
    '{"tag": "two_object", "include": [{"class": "toilet", "count": 1}, {"class": "computer mouse", "count": 1}], '
    '"prompt": "a photo of a toilet and a computer mouse"}',
    '{"tag": "counting", "include": [{"class": "orange", "count": 3}], "exclude": [{"class": "orange", "count": 4}], '
    '"prompt": "a photo of three oranges"}',
    '{"tag": "colors", "include": [{"class": "dining table", "count": 1, "color": "black"}], '
    '"prompt": "a photo of a black dining table"}',
    '{"tag": "position", "include": [{"class": "sink", "count": 1}, {"class": "tie", "count": 1, "position": '
    '["above", 0]}], "prompt": "a photo of a tie above a sink"}',
    '{"tag": "color_attr", "include": [{"class": "skis", "count": 1, "color": "green"}, '
    '{"class": "airplane", "count": 1, "color": "brown"}], "prompt": "a photo of a green skis and a brown airplane"}',
)
TEST_ROWS = [json.loads(line) for line in TEST_LINES]


def test_the_mixture_is_the_published_one() -> None:
    assert shares(50_000, RATIO) == {
        "position": 20_588, "counting": 14_706, "color_attr": 8_824, "colors": 2_941, "two_object": 2_941,
        "single_object": 0,
    }  # fmt: skip
    assert shares(17, RATIO) == RATIO
    rows = training_prompts(340, 0)
    assert Counter(row["tag"] for row in rows) == {tag: 20 * part for tag, part in RATIO.items() if part}


def test_every_row_is_geneval_s() -> None:
    everything = dict.fromkeys(RATIO, 1)
    for row in training_prompts(600, 3, ratio=everything):
        validate_metadata(row)
        assert row["prompt"].startswith("a photo of ")
        assert all(clause["class"] in CLASSES for clause in row["include"])
        assert not any(clause["class"] == "person" and "color" in clause for clause in row["include"])


@pytest.mark.parametrize("published", TEST_ROWS[:4], ids=lambda row: row["tag"])
def test_the_published_lines_can_be_made_word_for_word(published: dict[str, Any]) -> None:
    pools = {"two_object": 6320, "counting": 240, "colors": 790, "position": 25_280}
    assert published in training_prompts(pools[published["tag"]], 0, ratio={published["tag"]: 1})


def test_two_colours_are_worded_as_published() -> None:
    for row in [TEST_ROWS[4], *training_prompts(200, 0, ratio={"color_attr": 1})]:
        (a, c), (b, d) = ((clause["class"], clause["color"]) for clause in row["include"])
        assert re.fullmatch(f"a photo of an? {c} {a} and an? {d} {b}", row["prompt"])
        assert row["prompt"].count(" an orange") == (c, d).count("orange")


def test_no_test_prompt_comes_in_any_order() -> None:
    swapped = [
        ("two_object", "a photo of a computer mouse and a toilet"),
        ("position", "a photo of a sink below a tie"),
        ("counting", "a photo of three oranges"),
        ("colors", "a photo of a black dining table"),
    ]
    pools = {"two_object": 6318, "position": 25_278, "counting": 239, "colors": 789}
    for tag, text in swapped:
        rows = training_prompts(pools[tag], 1, TEST_ROWS, {tag: 1})
        texts = {row["prompt"] for row in rows}
        assert len(texts) == pools[tag], "all others come, once each"
        assert text not in texts
        assert not {row["prompt"] for row in TEST_ROWS} & texts


def test_an_order_makes_no_other_combination() -> None:
    left = {
        "tag": "position",
        "include": [{"class": "cup", "count": 1}, {"class": "fork", "count": 1, "position": ["left of", 0]}],
    }
    right = {
        "tag": "position",
        "include": [{"class": "fork", "count": 1}, {"class": "cup", "count": 1, "position": ["right of", 0]}],
    }
    other = {
        "tag": "position",
        "include": [{"class": "cup", "count": 1}, {"class": "fork", "count": 1, "position": ["right of", 0]}],
    }
    assert combination(left) == combination(right) != combination(other)


def test_too_few_prompts_come_again_and_enough_do_not() -> None:
    rows = training_prompts(500, 0, TEST_ROWS, {"counting": 1})
    assert len(rows) == 500
    assert len({row["prompt"] for row in rows}) <= 239
    rows = training_prompts(500, 0, TEST_ROWS, {"position": 1})
    assert len({row["prompt"] for row in rows}) == 500


def test_a_seed_is_a_draw() -> None:
    assert training_prompts(50, 4) == training_prompts(50, 4)
    assert training_prompts(50, 4) != training_prompts(50, 5)


def test_the_file_is_read_back_by_all_readers(tmp_path: Path) -> None:
    path = tmp_path / "train" / "metadata.jsonl"
    rows = training_prompts(40, 2, TEST_ROWS)
    save_rows(path, rows)
    assert load_rows(path) == rows
    loaded = load_prompts(path)
    assert loaded.problems == ()
    assert [prompt.text for prompt in loaded.prompts] == [row["prompt"] for row in rows]
    assert loaded.prompts[0].metadata["include"] == rows[0]["include"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shares of"):
        training_prompts(10, 0, ratio={"positions": 1})
    with pytest.raises(ValueError, match="count of 1"):
        training_prompts(0, 0)
    single = [{"tag": "single_object", "include": [{"class": name, "count": 1}]} for name in CLASSES]
    with pytest.raises(ValueError, match="set its share to 0"):
        training_prompts(10, 0, single, {"single_object": 1})
    path = tmp_path / "bad.jsonl"
    path.write_text(TEST_LINES[0] + '\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="line 2"):
        load_rows(path)
