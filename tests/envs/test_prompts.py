import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from envs import prompts as module
from envs.prompts import FixedPool, PromptPool, load_prompts, save_prompts
from rewards.base import Prompt

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
LINES = TEXTS.filter(lambda text: text.strip() and not {"\n", "\r"} & set(text) and text[0] != "\ufeff")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
METADATA = st.dictionaries(TEXTS.filter(lambda key: key not in module.RESERVED_KEYS), JSON, max_size=4)
IMAGES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99)).map(
        lambda drawn: np.random.default_rng(drawn[2]).integers(0, 256, (*drawn[:2], 3), np.uint8)
    ),
    max_size=2,
)
PROMPTS = st.builds(Prompt, TEXTS, IMAGES.map(tuple), METADATA, TEXTS, TEXTS)


def assert_same(left: Sequence[Prompt], right: Sequence[Prompt]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.text, a.metadata, a.id, a.group) == (b.text, b.metadata, b.id, b.group)
        assert len(a.source_images) == len(b.source_images)
        for image, other in zip(a.source_images, b.source_images, strict=True):
            assert image.dtype == other.dtype == np.uint8
            np.testing.assert_array_equal(image, other)


@given(st.lists(PROMPTS, min_size=1, max_size=3))
def test_jsonl_round_trip_is_exact(prompts: list[Prompt]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "set.jsonl"
        save_prompts(path, prompts)
        loaded = load_prompts(path)
    assert loaded.problems == ()
    assert_same(loaded.prompts, prompts)


@given(st.lists(LINES, min_size=1, max_size=4))
def test_txt_round_trip_is_exact(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.txt"
        save_prompts(path, [Prompt(text) for text in texts])
        loaded = load_prompts(path)
    assert loaded.problems == ()
    assert [prompt.text for prompt in loaded.prompts] == texts
    assert loaded.prompts[0].id == "set/00001"


def test_geneval_line(tmp_path: Path) -> None:
    row = {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"}
    (tmp_path / "meta.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = load_prompts(tmp_path / "meta.jsonl").prompts
    assert prompt.text == "a photo of two cups"
    assert prompt.metadata == {"tag": "counting", "include": [{"class": "cup", "count": 2}]}
    assert (prompt.id, prompt.group, prompt.source_images) == ("meta/00001", "", ())


def test_edit_line_with_pictures_elsewhere(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    path = tmp_path / "rows" / "edit.jsonl"
    path.parent.mkdir()
    path.write_text('{"prompt": "make it red", "image": "a.png", "level": 3}')
    (prompt,) = load_prompts(path, image_root=tmp_path / "pictures").prompts
    assert prompt.metadata == {"level": 3}
    np.testing.assert_array_equal(prompt.source_images[0], pixels)


def test_a_windows_file(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_bytes("\ufeffone\r\ntwo\u2028still two\r\n".encode())
    assert [p.text for p in load_prompts(tmp_path / "w.txt").prompts] == ["one", "two\u2028still two"]


def test_bad_rows_are_reported_and_skipped(tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "ok.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "ok.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("no picture")
    rows = {
        b'{"prompt": "good", "image": "ok.png"}': None,
        b"{not json": "expected a JSON object, got '{not json'",
        b"[1]": "expected a JSON object, got a list",
        b"": "expected a JSON object",
        b'{"promt": "x"}': "'prompt': a text .* got the keys 'promt'",
        b'{"prompt": 3}': "'prompt': a text .* got int",
        b'{"prompt": "a", "x": NaN}': "NaN is not JSON",
        b'{"prompt": "\xff"}': "expected UTF-8, got the byte 0xff at 12",
        b'{"prompt": "\\ud800"}': "with a lone surrogate",
        b'{"prompt": "a", "id": 4}': "'id': a string, got int",
        b'{"prompt": "a", "image": 7}': "'image': a relative path or a list of them, got 7",
        b'{"prompt": "a", "image": "gone.png"}': "existing file, got 'gone.png'",
        b'{"prompt": "a", "image": "../ok.png"}': "a path inside .* give image_root",
        b'{"prompt": "a", "image": "/etc/hostname"}': "a path inside",
        b'{"prompt": "a", "image": "broken.png"}': "a whole PNG",
        b'{"prompt": "a", "image": "text.png"}': "a whole PNG",
        b'{"prompt": "a", "image": "."}': "a whole PNG",
        b"[" * 100_000: "expected a JSON object",
        b'{"prompt": "also good"}': None,
    }
    (tmp_path / "set.jsonl").write_bytes(b"\n".join(rows))
    loaded = load_prompts(tmp_path / "set.jsonl")
    assert [prompt.text for prompt in loaded.prompts] == ["good", "also good"]
    expected = [(line, message) for line, message in enumerate(rows.values(), start=1) if message]
    assert [problem.line for problem in loaded.problems] == [line for line, _ in expected]
    for problem, (_, message) in zip(loaded.problems, expected, strict=True):
        assert re.search(message, str(problem)), problem


def test_empty_lines_of_a_text_are_reported(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text("one\n\n  \ntwo\n")
    loaded = load_prompts(tmp_path / "set.txt")
    assert [prompt.id for prompt in loaded.prompts] == ["set/00001", "set/00004"]
    assert [str(problem) for problem in loaded.problems] == [
        "line 2: expected a prompt, got an empty line",
        "line 3: expected a prompt, got an empty line",
    ]


def test_limits_on_lines_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    lines = [
        '{"prompt": "a", "image": "noise.png"}',
        "x" * 1000,
        '{"prompt": "b"}',
        '{"prompt": "c", "image": "a.png"}',
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    loaded = load_prompts(tmp_path / "set.jsonl", max_bytes=300)
    assert [prompt.text for prompt in loaded.prompts] == ["b", "c"]
    assert [(p.line, p.expected) for p in loaded.problems] == [
        (1, "a picture of at most 300 bytes"),
        (2, "a line of at most 300 bytes"),
    ]
    monkeypatch.setattr(module, "MAX_IMAGE_PIXELS", 63)
    (problem, *_) = load_prompts(tmp_path / "set.jsonl", max_bytes=10_000).problems
    assert "at most 63 pixels" in str(problem)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "drawbench.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"the nearest name there is drawbench\.txt"):
        load_prompts(tmp_path / "drawbanch.txt")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_prompts(tmp_path / "gone" / "drawbench.txt")


def test_unknown_suffix_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ending in \.txt or \.jsonl, got '\.json'; did you mean set\.jsonl\?"):
        load_prompts(tmp_path / "set.json")


@pytest.mark.parametrize(("content", "message"), [("", "an empty file"), ("\n\n", "2 bad rows, the first: line 1")])
def test_a_file_without_a_good_row(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "set.txt").write_text(content)
    with pytest.raises(ValueError, match=f"expected at least one good row, got {message}"):
        load_prompts(tmp_path / "set.txt")


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("a.txt", Prompt("two\nlines"), "one line of text alone"),
        ("a.txt", Prompt(" "), "one line of text alone"),
        ("a.txt", Prompt("a", metadata={"b": 1}), "save it as .jsonl"),
        ("a.jsonl", Prompt("\ud800"), "lone surrogate"),
        ("a.jsonl", Prompt("a", metadata={"prompt": "a"}), "keys other than prompt, image, id, group"),
        ("a.jsonl", Prompt("a", metadata={"b": (1, 2)}), "write tuples as lists"),
        ("a.jsonl", Prompt("a", metadata={"b": {1: 2}}), "keys as strings"),
        ("a.jsonl", Prompt("a", metadata={"b": np.zeros(2)}), "expected JSON values"),
        ("a.jsonl", Prompt("a", metadata={"b": float("nan")}), "expected JSON values"),
        ("a.jsonl", Prompt("a", (np.zeros((2, 2), np.uint8),)), r"expected uint8 \[H, W, 3\], got uint8 \[2, 2\]"),
    ],
)
def test_what_cannot_be_saved_without_loss_is_refused(tmp_path: Path, name: str, prompt: Prompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_prompts(tmp_path / name, [prompt])
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one prompt to save"):
        save_prompts(tmp_path / "a.jsonl", [])


def test_fixed_pool() -> None:
    prompts = [Prompt(str(index), metadata={"difficulty": index / 10}, id=str(index)) for index in range(10)]
    pool = FixedPool(prompts)
    assert isinstance(pool, PromptPool)
    drawn = pool.draw(np.random.default_rng(0), 25)
    assert sorted(p.id for p in drawn[:10]) == sorted(p.id for p in drawn[10:20]) == [p.id for p in prompts]
    assert [p.id for p in drawn[:10]] != [p.id for p in prompts]
    assert len({p.id for p in drawn[20:]}) == 5
    assert [p.id for p in pool.draw(np.random.default_rng(0), 25)] == [p.id for p in drawn]
    assert {p.id for p in pool.draw(np.random.default_rng(1), 30, (0.2, 0.4))} == {"2", "3", "4"}
    assert pool.draw(np.random.default_rng(1), 0) == []


def test_fixed_pool_without_a_fitting_prompt() -> None:
    pool = FixedPool([Prompt("a")])
    assert pool.draw(np.random.default_rng(0), 1) == [Prompt("a")]
    with pytest.raises(ValueError, match="expected a range that holds one of the pool's 1 prompts"):
        pool.draw(np.random.default_rng(0), 1, (0.0, 0.5))
    with pytest.raises(ValueError, match="at least one prompt"):
        FixedPool([])
