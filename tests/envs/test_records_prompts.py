import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.data.prompts import OtherSourcesError, RecordPool, prompts_from_records
from envs.data.records import RecordSet
from envs.image_editing import ImageEditingVectorEnv
from envs.prompts import PromptPool, load_prompts
from rewards.pixel import redness
from tests.envs.record_files import number_of, png, write_rows


def edits_of(path: Path, numbers: list[list[int]]) -> RecordSet:
    """A data set of edits of the pictures of these numbers."""
    pictures = [[png(number) for number in row] for row in numbers]
    write_rows(path, [{"instruction": f"{n}", "input_image": entry} for n, entry in enumerate(pictures)])
    return RecordSet((str(path.parent / f"*{path.suffix}"),))


def pool_of(path: Path, kind: Any = "edit_prompt", size: tuple[int, int] | None = (16, 16)) -> RecordPool:
    return prompts_from_records(RecordSet((str(path),)), kind, size)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "tar"])
def test_edit_prompts_of_every_format_are_drawn_like_a_pool(tmp_path: Path, suffix: str) -> None:
    rows = [{"instruction": f"turn {n}", "input_image": png(n, 24, 16), "level": f"{n}"} for n in range(10)]
    write_rows(tmp_path / f"set.{suffix}", rows)
    pool = pool_of(tmp_path / f"set.{suffix}")
    assert isinstance(pool, PromptPool)
    assert len(pool) == 10
    drawn = pool.draw(np.random.default_rng(0), 25)
    assert [prompt.id for prompt in drawn] == [prompt.id for prompt in pool.draw(np.random.default_rng(0), 25)]
    numbers = [int(prompt.text.split()[1]) for prompt in drawn]
    assert sorted(numbers[:10]) == sorted(numbers[10:20]) == list(range(10))
    for prompt, number in zip(drawn, numbers, strict=True):
        (source,) = prompt.source_images
        assert source.shape == (16, 16, 3)
        assert number_of(source) == number
        assert prompt.metadata == {"level": f"{number}"}
    env = ImageEditingVectorEnv(3, redness, pool, (16, 16))
    observation, _ = env.reset(seed=0)
    assert observation["source_image"].shape == (3, 16, 16, 3)


def test_rows_with_another_number_of_pictures_are_left_out(tmp_path: Path) -> None:
    data = edits_of(tmp_path / "set.parquet", [[1], [2, 3], [4, 5], [6, 7, 8]])
    assert prompts_from_records(data, "edit_prompt").num_sources == 3
    pool = prompts_from_records(data, "edit_prompt", (16, 16), num_sources=2)
    assert (len(pool), pool.num_sources, pool.problems.num_bad) == (2, 2, 2)
    assert "expected 2 pictures to edit, got 1" in str(pool.problems.first[0])
    env = ImageEditingVectorEnv(2, redness, pool, (16, 16))
    observation, _ = env.reset(seed=0)
    assert observation["source_images"].shape == (2, 2, 16, 16, 3)
    (other,) = prompts_from_records(data, "edit_prompt", num_sources=1).first(9)
    assert other.text == "0"


def test_a_file_of_rows_with_another_number_is_left_out_and_a_set_of_them_says_which(tmp_path: Path) -> None:
    edits_of(tmp_path / "a.parquet", [[1], [2], [3, 4, 5]])
    data = edits_of(tmp_path / "b.parquet", [[6, 7]])
    pool = prompts_from_records(data, "edit_prompt", num_sources=2)
    assert (len(pool), pool.num_sources, pool.problems.num_rows, pool.problems.num_bad) == (1, 2, 4, 3)
    message = r"\*\.parquet: expected rows with 4 pictures to edit, got 1 \(2 rows\), 3 \(1 rows\), 2 \(1 rows\)"
    with pytest.raises(OtherSourcesError, match=message) as raised:
        prompts_from_records(data, "edit_prompt", num_sources=4)
    assert raised.value.found == 1
    # A file that is damaged is not left out in silence.
    write_rows(tmp_path / "c.parquet", [{"instruction": "i", "input_image": [b"text", b"text"]}])
    with pytest.raises(ValueError, match=r"c\.parquet: expected at least one prompt, got bad rows alone"):
        prompts_from_records(data, "edit_prompt", num_sources=2)


def test_a_training_set_serves_as_prompts_too(tmp_path: Path) -> None:
    rows = [{"instruction": "turn", "input_image": png(1), "output_image": png(2)}]
    write_rows(tmp_path / "set.parquet", rows)
    (prompt,) = pool_of(tmp_path / "set.parquet", size=None).first(5)
    assert number_of(prompt.source_images[0]) == 1
    assert prompt.source_images[0].shape == (8, 8, 3)


def test_the_published_rows_are_read_as_the_other_loader_reads_them(tmp_path: Path) -> None:
    rows = [
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups", "group": "g"},
        {"prompt": "b", "id": "own", "difficulty": 0.5},
    ]
    path = tmp_path / "meta.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for found, expected in zip(pool_of(path, "t2i_prompt").first(2), load_prompts(path).prompts, strict=True):
        assert (found.text, dict(found.metadata), found.group) == (expected.text, expected.metadata, expected.group)
    assert [prompt.id for prompt in pool_of(path, "t2i_prompt").first(2)] == ["meta/00000000", "own"]


def test_nested_values_of_parquet_are_metadata(tmp_path: Path) -> None:
    include = [{"class": "cup", "count": 2}]
    write_rows(tmp_path / "set.parquet", [{"prompt": "p", "include": include, "image": png()}])
    (prompt,) = pool_of(tmp_path / "set.parquet", "t2i_prompt").first(1)
    assert prompt.metadata == {"include": include}


def test_difficulty_bounds_a_draw(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{n}", "difficulty": n / 10} for n in range(10)] + [{"prompt": "no"}])
    pool = pool_of(tmp_path / "a.jsonl", "t2i_prompt")
    drawn = pool.draw(np.random.default_rng(0), 12, (0.25, 0.5))
    assert {prompt.text for prompt in drawn} == {"3", "4", "5"}
    assert len(pool.draw(np.random.default_rng(0), 11)) == 11
    with pytest.raises(ValueError, match=r"holds one of the pool's 11 prompts, got \[0.95, 1.0\]"):
        pool.draw(np.random.default_rng(0), 1, (0.95, 1.0))


def test_bad_rows_are_left_out_and_late_damage_is_passed_over(tmp_path: Path) -> None:
    whole = png(3, 40, 40)
    rows = [{"instruction": f"{n}", "input_image": png(n)} for n in range(3)]
    rows += [{"instruction": "late", "input_image": whole[: len(whole) // 2]}]
    rows += [{"instruction": "no picture", "input_image": b"text"}, {"instruction": " ", "input_image": png()}]
    write_rows(tmp_path / "set.parquet", rows)
    pool = pool_of(tmp_path / "set.parquet")
    assert len(pool) == 4  # The header of the late one is whole.
    assert pool.problems.num_bad == 2
    assert {prompt.text for prompt in pool.draw(np.random.default_rng(1), 9)} == {"0", "1", "2"}
    assert pool.problems.num_bad > 2


def test_a_file_without_a_prompt_is_an_error(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"instruction": "i", "input_image": "gone.png"}] * 3)
    with pytest.raises(ValueError, match=r"got bad rows alone, the commonest reason: .*existing file \(3 rows\)"):
        pool_of(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"b\.txt: expected at least one prompt, got no row"):
        pool_of(tmp_path / "b.txt", "t2i_prompt")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_what_is_alike_is_held_out_together(tmp_path: Path, suffix: str) -> None:
    rows = [{"instruction": f"i {n}", "input_image": png(n // 3)} for n in range(30)]
    write_rows(tmp_path / f"a.{suffix}", rows)
    held_out, rest = pool_of(tmp_path / f"a.{suffix}").split(5, seed=1)
    assert (len(held_out), len(rest)) == (6, 24)
    pictures = [{number_of(p.source_images[0]) for p in pool.first(30)} for pool in (held_out, rest)]
    assert not pictures[0] & pictures[1]
    assert sorted(pictures[0] | pictures[1]) == list(range(10))
    with pytest.raises(ValueError, match="expected more than 30 prompts, to hold 30 out, got 30 of 10 kinds"):
        pool_of(tmp_path / f"a.{suffix}").split(30)


def test_edits_of_one_picture_with_other_references_are_alike(tmp_path: Path) -> None:
    data = edits_of(tmp_path / "a.parquet", [[n // 3, 100 + n] for n in range(15)] + [[50 + n, 100] for n in range(15)])
    held_out, rest = prompts_from_records(data, "edit_prompt", num_sources=2).split(8, seed=1)
    firsts = [{number_of(prompt.source_images[0]) for prompt in pool.first(30)} for pool in (held_out, rest)]
    assert not firsts[0] & firsts[1]
    # The reference that half of the rows share does not tie these together.
    assert len(held_out) < 15


def test_repeats_of_a_text_are_held_out_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in ["one", "Two", "two ", "three"] * 2))
    held_out, rest = pool_of(tmp_path / "a.txt", "t2i_prompt").split(3)
    texts = [{prompt.text.strip().lower() for prompt in pool.first(9)} for pool in (held_out, rest)]
    assert not texts[0] & texts[1]
    assert texts[0] | texts[1] == {"one", "two", "three"}
