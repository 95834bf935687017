"""Lists of data sets in JSON: sets of different columns are mixed, and a list that is wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from envs.data.batches import BatchSettings
from envs.data.buckets import ProgressiveResolution
from envs.data.fields import Fields
from envs.data.mixtures import MAX_LIST_BYTES, is_list, record_sets
from envs.data.records import RecordSet
from envs.data.stream import StreamBatches
from tests.envs.record_files import png, write_rows

BATCHES = BatchSettings(batch_size=4, resolution=ProgressiveResolution((32,)), window=4, num_workers=0, prefetch=0)


def write_list(folder: Path, sets: Any, name: str = "mix.json") -> str:
    path = folder / name
    path.write_text(json.dumps(sets if isinstance(sets, dict) else {"sets": sets}))
    return str(path)


def test_sets_of_different_columns_and_folders_are_mixed_by_weight(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    (second / "pictures").mkdir(parents=True)
    write_rows(first / "rows.jsonl", [{"what": f"one {n}", "drawn": png(n, 32, 32)} for n in range(8)])
    for number in range(8):
        (second / "pictures" / f"{number}.png").write_bytes(png(number, 32, 32))
    rows = [{"long": f"two {n}", "short": "two", "path": f"{n}.png"} for n in range(8)]
    (second / "rows.json").write_text(json.dumps(rows))
    entries = [
        {"files": ["a/*.jsonl"], "fields": {"text": "what", "target": "drawn"}, "weight": 3},
        {"files": "b/rows.json", "fields": {"text": "long", "target": "path"}, "image_root": "b/pictures"},
    ]
    sets = record_sets([write_list(tmp_path, entries)])
    assert sets == [
        RecordSet((f"{first}/*.jsonl",), Fields("what", "drawn"), None, 3.0),
        RecordSet((f"{second}/rows.json",), Fields("long", "path"), second / "pictures", 1.0),
    ]
    source = StreamBatches({"t2i": sets}, BATCHES)
    texts = [text for _ in range(60) for text in source.next_batch("t2i").texts]
    assert source.problems()["t2i"].num_bad == 0
    source.close()
    share = sum(text.startswith("one") for text in texts) / len(texts)
    assert 0.65 < share < 0.85
    assert {text.split()[0] for text in texts} == {"one", "two"}


def test_files_and_lists_go_together_and_the_given_folder_is_of_those_that_name_none(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "image": "a.png"}]')
    listed = write_list(tmp_path, [{"files": ["x.tar"], "fields": {"sources": "before", "id": "n"}}])
    (tmp_path / "other.json").write_text('\ufeff {"sets": [{"files": ["/y.tar"], "image_root": "own"}]}')
    rows, other = f"{tmp_path}/rows.json", f"{tmp_path}/other.json"
    assert [is_list(name) for name in (rows, listed, other, "nowhere.json", "*.json")] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert record_sets([rows, listed, "*.parquet", other], Path("root")) == [
        RecordSet((rows, "*.parquet"), image_root=Path("root")),
        RecordSet((f"{tmp_path}/x.tar",), Fields(sources=("before",), id="n"), Path("root")),
        RecordSet(("/y.tar",), image_root=tmp_path / "own"),
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"set": []}, "mix.json: expected one of sets, got 'set' (3 code points); did you mean 'sets'?"),
        ({}, 'mix.json: expected 1 to 1000 sets, as {"sets": [{"files": [...]}]}, got null'),
        ([], "expected 1 to 1000 sets"),
        ([{"files": ["x"]}] * 1001, "got 1001"),
        (["x"], "sets[0]: expected an object with files, fields, image_root, weight, got 'x'"),
        ([{"files": ["x"]}, {"file": ["x"]}], "sets[1]: expected one of files, fields, image_root, weight, got 'file'"),
        ([{"file": ["x"]}], "did you mean 'files'?"),
        ([{"weight": 1}], "sets[0].files: expected a text that is not empty, got null"),
        ([{"files": []}], "sets[0].files: expected paths or globs, got none"),
        ([{"files": ["x", 3]}], "sets[0].files: expected a text that is not empty, got 3"),
        ([{"files": ["\ud800"]}], "sets[0].files: expected a text"),
        ([{"files": ["mix.json"]}], "sets[0].files: expected files of rows, got another list of sets"),
        ([{"files": ["x"], "fields": {"texts": "a"}}], "sets[0].fields: expected one of text, target, sources, id"),
        ([{"files": ["x"], "fields": {"texts": "a"}}], "did you mean 'text'?"),
        ([{"files": ["x"], "fields": {"sources": [1]}}], "sets[0].fields.sources: expected a text"),
        ([{"files": ["x"], "fields": None}], "sets[0].fields: expected an object"),
        ([{"files": ["x"], "image_root": ""}], "sets[0].image_root: expected a text that is not empty, got ''"),
        ([{"files": ["x"], "weight": 0}], "sets[0].weight: expected a number above 0 and at most 1e+09, got 0"),
        ([{"files": ["x"], "weight": True}], "got true"),
        ([{"files": ["x"], "weight": float("nan")}], "got NaN"),
        ([{"files": ["x"], "weight": 10**400}], "sets[0].weight: expected a number"),
    ],
)
def test_a_list_that_is_not_as_it_should_be_is_one_line(given: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mix\.json") as error:
        record_sets([write_list(tmp_path, given)])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{" + " " * MAX_LIST_BYTES, f"expected a list of sets of at most {MAX_LIST_BYTES} bytes"),
        ('{"sets": [', "expected a list of sets in JSON, got what is none"),
        ('{"sets": ' + "[" * 100_000, "expected a list of sets in JSON, got what is none"),
    ],
)
def test_what_is_no_list_or_too_long_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        record_sets([str(path)])
