"""The official layouts, written and read back, and what does not belong there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pdtr.benchmarks.base import Item
from pdtr.benchmarks.layouts import Grids, OneEach, SampleFolders, is_safe_name
from pdtr.benchmarks.pictures import Picture
from rewards.base import Images
from tests.pdtr.benchmarks.files import plain, png

ITEM = Item(
    12,
    "stock_2",
    "a photo of a bench",
    "single_object",
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
)


def tiles(count: int) -> dict[int, Images]:
    return {i: plain((10 * i, 0, 255 - 10 * i), (8, 6)) for i in range(count)}


def test_geneval_s_folders(tmp_path: Path) -> None:
    layout = SampleFolders()
    assert layout.missing(tmp_path, ITEM, 4) == [0, 1, 2, 3]
    layout.write(tmp_path, ITEM, tiles(4))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        "00012/metadata.jsonl", *(f"00012/samples/000{i}.png" for i in range(4)),
    ]  # fmt: skip
    line = json.loads((tmp_path / "00012" / "metadata.jsonl").read_text())
    assert line == {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    for sample, image in enumerate(layout.read(tmp_path, ITEM, 4)):
        assert np.array_equal(image, tiles(4)[sample])
    (tmp_path / "00012" / "samples" / "0002.png").unlink()
    assert layout.missing(tmp_path, ITEM, 4) == [2]
    with pytest.raises(ValueError, match=r"0002\.png: expected a picture's file"):
        layout.read(tmp_path, ITEM, 4)


def test_images_of_another_prompt_are_refused(tmp_path: Path) -> None:
    SampleFolders().write(tmp_path, ITEM, tiles(1))
    other = Item(12, "x", "a photo of a horse")
    with pytest.raises(ValueError, match="of another prompts file"):
        SampleFolders().read(tmp_path, other, 1)
    (tmp_path / "00012" / "metadata.jsonl").write_text("[]")
    with pytest.raises(ValueError, match="one line of JSON"):
        SampleFolders().read(tmp_path, ITEM, 1)


def test_dpg_s_grids(tmp_path: Path) -> None:
    layout = Grids()
    layout.write(tmp_path, ITEM, tiles(4))
    grid = Picture("x", tmp_path / "stock_2.png").load()
    assert grid.shape == (16, 12, 3)
    # Row by row, as the official scorer crops them.
    assert [grid[0, 0, 0], grid[0, 6, 0], grid[8, 0, 0], grid[8, 6, 0]] == [0, 10, 20, 30]
    assert layout.missing(tmp_path, ITEM, 4) == []
    for sample, image in enumerate(layout.read(tmp_path, ITEM, 4)):
        assert np.array_equal(image, tiles(4)[sample])


def test_a_grid_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stock_2.png").write_bytes(png(plain(size=(15, 16))))
    with pytest.raises(ValueError, match="two by two, got a picture of 16x15"):
        Grids().read(tmp_path, ITEM, 4)
    with pytest.raises(ValueError, match="at most 4"):
        Grids().write(tmp_path, ITEM, tiles(5))


def test_gedit_s_tree_has_the_source_beside_the_edit(tmp_path: Path) -> None:
    source = Picture("s", png(plain((1, 2, 3))))
    item = Item(0, "k1", "x", "subject-add", {"language": "cn"}, (source,))
    layout = OneEach("fullset/{task}/{language}/{id}.png", "fullset/{task}/{language}/{id}_SRCIMG.png")
    layout.write(tmp_path, item, {0: plain((9, 9, 9))})
    folder = tmp_path / "fullset" / "subject-add" / "cn"
    assert sorted(path.name for path in folder.iterdir()) == ["k1.png", "k1_SRCIMG.png"]
    assert np.array_equal(Picture("", folder / "k1_SRCIMG.png").load(), plain((1, 2, 3)))
    assert np.array_equal(layout.read(tmp_path, item, 1)[0], plain((9, 9, 9)))
    assert layout.missing(tmp_path, item, 1) == []


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a\x00b", "x" * 201, 7, None, "a\nb", ".."])
def test_what_is_no_name_of_a_file_is_found(name: object) -> None:
    assert not is_safe_name(name)


@pytest.mark.parametrize("name", ["1082", "subject-add", "stock_2 (1).v2", "背景", "-x"])
def test_names_of_files_pass(name: str) -> None:
    assert is_safe_name(name)
