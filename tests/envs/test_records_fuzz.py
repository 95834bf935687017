"""Whatever the bytes: a good record, or a bad row with a reason; nothing else is raised, nothing hangs."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from envs.data.pictures import BadRowError, Limits
from envs.data.records import Record, RecordFiles, RecordSet
from tests.envs.record_files import FORMATS, png, write_rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("instruction", "input_image", "output_image", "image", "prompt", "id", "__key__", "bytes", "path")
ROWS = st.dictionaries(st.sampled_from(NAMES), JSON | st.just("ok.png") | st.just(["ok.png"]), max_size=5)
LIMITS = Limits(max_bytes=5000, max_pixels=5000)


def read_all(pattern: Path, kind: str) -> list[object]:
    files = RecordFiles(RecordSet((str(pattern),)), kind, LIMITS)  # type: ignore[arg-type]
    found: list[object] = []
    for number, row in files.rows(0):
        try:
            found.append(files.record(row, 0, number))
        except BadRowError as error:
            found.append(str(error))
        assert number < 1000
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(JSON | ROWS, min_size=1, max_size=5), st.sampled_from(["t2i", "edit", "t2i_prompt", "edit_prompt"]))
def test_any_json_is_a_record_or_a_bad_row(rows: list[Any], kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ok.png").write_bytes(png())
        (Path(folder) / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (Path(folder) / "b.json").write_text(json.dumps(rows))
        one, other = (read_all(Path(folder) / name, kind) for name in ("a.jsonl", "b.json"))
        assert len(one) == len(other) == len(rows)
        assert [isinstance(entry, Record) for entry in one] == [isinstance(entry, Record) for entry in other]


@settings(max_examples=120, deadline=None)
@given(
    suffix=st.sampled_from(FORMATS),
    cut=st.integers(0, 6000) | st.none(),
    changes=st.lists(st.tuples(st.integers(0, 12_000), st.binary(min_size=1, max_size=40)), max_size=4),
)
def test_damaged_files_never_raise(suffix: str, cut: int | None, changes: list[tuple[int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"set.{suffix}"
        write_rows(path, [{"prompt": f"row {n}", "image": png(n)} for n in range(5)])
        data = bytearray(path.read_bytes()[:cut])
        for start, piece in changes:
            at = start % (len(data) + 1)
            data[at : at + len(piece)] = piece
        path.write_bytes(data)
        for entry in read_all(path, "t2i"):
            assert isinstance(entry, Record) or "expected" in str(entry)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.binary(max_size=30), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damaged_pictures_never_raise(start: int, piece: bytes, kind: str) -> None:
    import io

    from PIL import Image

    from envs.data.pictures import decode_picture

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(buffer, kind)
    data = bytearray(buffer.getvalue())
    data[start : start + len(piece)] = piece
    try:
        shape = decode_picture(bytes(data), LIMITS, "image").shape
    except BadRowError:
        return
    assert shape[-1] == 3
