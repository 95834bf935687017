import base64
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from envs.data.fields import Fields
from envs.data.pictures import BadRowError, Limits
from envs.data.records import Record, RecordFiles, RecordSet
from envs.data.shards import find_shards
from tests.envs.record_files import number_of, png, write_parquet, write_rows, write_tar

LIMITS = Limits(max_bytes=20_000, max_pixels=10_000)


def read(*patterns: Path, kind: str = "edit", fields: Fields = Fields(), root: Path | None = None) -> list[object]:  # noqa: B008
    """The records of files, errors in the place of bad rows."""
    files = RecordFiles(RecordSet(tuple(map(str, patterns)), fields, root), kind, LIMITS)  # type: ignore[arg-type]
    found: list[object] = []
    for shard in range(len(files.shards)):
        for number, row in files.rows(shard):
            try:
                found.append(files.record(row, shard, number))
            except BadRowError as error:
                found.append(str(error))
    return found


def records(*patterns: Path, **options: object) -> list[Record]:
    found = read(*patterns, **options)  # type: ignore[arg-type]
    bad = [entry for entry in found if isinstance(entry, str)]
    assert not bad, bad
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "tar"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    rows = [{"instruction": f"turn {n}", "input_image": png(n), "output_image": png(n + 300)} for n in range(6)]
    write_rows(tmp_path / f"set.{suffix}", rows)
    found = records(tmp_path / f"set.{suffix}")
    assert [record.text for record in found] == [row["instruction"] for row in rows]
    assert [number_of(record.sources[0]) for record in found] == list(range(6))
    assert [number_of(record.target) for record in found] == list(range(300, 306))
    assert all(record.target.dtype == np.uint8 and record.target.shape == (8, 8, 3) for record in found)
    assert len({record.id for record in found}) == 6


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"edit_prompt": "t", "input_image": 1, "edited_image": 2}, "edit"),  # InstructPix2Pix
        ({"original_prompt": "x", "edit_prompt": "t", "original_image": 1, "edited_image": 2}, "edit"),
        ({"instruction": "t", "source_img": 1, "target_img": 2}, "edit"),  # MagicBrush
        ({"edit": "t", "input": "x", "output": "y", "input_image": 1, "output_image": 2}, "edit"),  # HQ-Edit
        ({"edited_prompt_list": ["t", "u"], "src_img": 1, "edited_img": 2}, None),  # OmniEdit: its text needs naming
        ({"input_prompt": "t", "input_image": [1], "output_image": 2}, "edit"),  # ShareGPT-4o-Image
        ({"instruction": "t", "input_images": [1], "output_image": 2}, "edit"),  # X2I2
        ({"caption": "t", "image": 2}, "t2i"),
        ({"input_prompt": "t", "output_image": 2}, "t2i"),
        ({"text": "t", "file_name": 2}, "t2i"),  # image folders
        ({"TEXT": "t", "Image": 2}, "t2i"),
    ],
)
def test_usual_names_are_found(tmp_path: Path, row: dict[str, object], kind: str | None) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    named = {1: "1.png", 2: "2.png"}
    values = {
        name: named.get(value, value) if isinstance(value, int) else [named[1]] if value == [1] else value
        for name, value in row.items()
    }
    (tmp_path / "set.jsonl").write_text(json.dumps(values))
    if kind is None:
        (problem,) = read(tmp_path / "set.jsonl")
        assert "a text under a usual name" in str(problem)
        kind, fields = "edit", Fields(text="edited_prompt_list")
    else:
        fields = Fields()
    (record,) = records(tmp_path / "set.jsonl", kind=kind, fields=fields)
    assert (record.text, number_of(record.target)) == ("t", 2)
    assert [number_of(source) for source in record.sources] == ([1] if kind == "edit" else [])


def test_fields_can_be_named(tmp_path: Path) -> None:
    row = {"a": "t", "b": png(1), "c": png(2), "d": png(3), "n": 7, "image": png(9)}
    write_rows(tmp_path / "set.jsonl", [row])
    (record,) = records(tmp_path / "set.jsonl", fields=Fields("a", "d", ("b", "c"), "n"))
    assert (record.text, record.id, number_of(record.target)) == ("t", "7", 3)
    assert [number_of(source) for source in record.sources] == [1, 2]
    (problem,) = read(tmp_path / "set.jsonl", fields=Fields("a", "e", ("b",)))
    assert "a target picture in 'e', got the fields 'a', 'b'" in str(problem)


def test_webdataset_members_make_rows(tmp_path: Path) -> None:
    members = [
        ("images/0001.jpg", png(1)),  # Pillow looks at the bytes, not at the name.
        ("images/0001.json", json.dumps({"prompt": "from json", "width": 8}).encode()),
        ("images/0001.npy", b"\0"),
        ("images/._0002.jpg", b"of a Mac"),
        ("images/0002.txt", b"from txt\n"),
        ("images/0002.webp", png(2)),
        ("README", b"no suffix"),
        ("images/0003.jpg", png(3)),
    ]
    write_tar(tmp_path / "set.tar", members)
    one, two, three = read(tmp_path / "set.tar", kind="t2i")
    assert isinstance(one, Record)
    assert isinstance(two, Record)
    assert (one.text, one.id, dict(one.metadata)) == ("from json", "images/0001", {"width": 8})
    assert (two.text, two.id, number_of(two.target)) == ("from txt", "images/0002", 2)
    assert "a text under a usual name" in str(three)


def test_links_and_strange_members_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, kind in {"1.jpg": tarfile.SYMTYPE, "2.jpg": tarfile.LNKTYPE, "3.jpg": tarfile.FIFOTYPE}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
        for name, data in {"../../4.jpg": png(4), "../../4.txt": b"kept inside"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (record,) = records(tmp_path / "set.tar", kind="t2i")
    assert (record.text, record.id) == ("kept inside", "../../4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.tar"]


@pytest.mark.parametrize("labels", [("000", "001", "002"), ("aa", "ab", "ac"), ("1", "2", "3")])
@pytest.mark.parametrize("named", ["set.tar", "set.tar.*", "first"])
def test_a_cut_tar_is_one_stream(tmp_path: Path, labels: tuple[str, ...], named: str) -> None:
    rows = [{"prompt": f"row {n}", "image": png(n)} for n in range(9)]
    write_rows(tmp_path / "set.tar", rows)
    data = (tmp_path / "set.tar").read_bytes()
    (tmp_path / "set.tar").unlink()
    cuts = [0, 700, 5001, len(data)]  # In the middle of a member and of a header.
    for label, start, end in zip(labels, cuts, cuts[1:], strict=False):
        (tmp_path / f"set.tar.{label}").write_bytes(data[start:end])
    name = f"set.tar.{labels[0]}" if named == "first" else named
    found = records(tmp_path / name, kind="t2i")
    assert [record.text for record in found] == [f"row {n}" for n in range(9)]
    assert [number_of(record.target) for record in found] == list(range(9))
    (tmp_path / f"set.tar.{labels[1]}").unlink()
    with pytest.raises(ValueError, match=r"all of its pieces, from . to ., got 2 without number"):
        find_shards([tmp_path / name])


def test_a_tar_that_ends_early_keeps_the_rows_before(tmp_path: Path) -> None:
    write_rows(tmp_path / "set.tar", [{"prompt": f"row {n}", "image": png(n)} for n in range(5)])
    data = (tmp_path / "set.tar").read_bytes()
    (tmp_path / "set.tar").write_bytes(data[:5000])
    found = read(tmp_path / "set.tar", kind="t2i")
    assert [record.text for record in found if isinstance(record, Record)] == ["row 0", "row 1"]
    assert "a whole tar file" in str(found[-1])
    damaged = bytearray(data)
    damaged[3 * 1024 : 3 * 1024 + 200] = b"x" * 200  # The header of row 1's text.
    (tmp_path / "set.tar").write_bytes(damaged)
    found = read(tmp_path / "set.tar", kind="t2i")
    assert isinstance(found[0], Record)
    assert "a damaged header" in str(found[-1])


def test_pictures_stay_inside_their_folder_and_offline(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "ok.png").write_bytes(png(5))
    inline = "data:image/png;base64," + base64.b64encode(png(6)).decode()
    values = {
        "ok.png": 5,
        inline: 6,
        "../secret.png": "a path inside",
        str(tmp_path / "secret.png"): "a path inside",
        "link.png": "a path inside",
        "https://example.com/a.png": "nothing is fetched",
        "file:///etc/hostname": "nothing is fetched",
        "gone.png": "an existing file",
        ".": "a whole PNG",
        "a\0b": "a file that can be read",
        "": "a picture or a relative path",
        7: "a picture or a relative path",
        None: "a picture or a relative path",
        "data:image/png;base64,%%%": "base64",
        "data:image/png;base64,AAAA": "a whole PNG",
    }
    (folder / "set.jsonl").write_text("".join(json.dumps({"prompt": "p", "image": v}) + "\n" for v in values))
    for got, expected in zip(read(folder / "set.jsonl", kind="t2i"), values.values(), strict=True):
        if isinstance(expected, int):
            assert isinstance(got, Record)
            assert number_of(got.target) == expected
        else:
            assert re.search(expected, str(got)), got


def test_limits_are_checked_before_a_picture_is_decoded(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 90, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(deep, "PNG")
    pictures = [png(1, 100, 101), buffer.getvalue(), deep.getvalue(), png(2)[:45], png(3)]
    write_parquet(tmp_path / "set.parquet", [{"prompt": "p", "image": picture} for picture in pictures])
    write_tar(
        tmp_path / "set.tar", [(f"{n}.{s}", d) for n, p in enumerate(pictures) for s, d in (("png", p), ("txt", b"p"))]
    )
    for name in ("set.parquet", "set.tar"):
        *bad, good = read(tmp_path / name, kind="t2i")
        assert isinstance(good, Record)
        expected = ["at most 10000 pixels, got .* of 100x101", "at most 20000 bytes", "8 bits a channel", "a whole PNG"]
        for problem, message in zip(bad, expected, strict=True):
            assert re.search(message, str(problem)), problem


def test_small_targets_are_bad_where_it_is_asked_for(tmp_path: Path) -> None:
    write_rows(tmp_path / "set.jsonl", [{"prompt": "p", "image": png(0, 8, size)} for size in (7, 8)])
    files = RecordFiles(RecordSet((str(tmp_path / "set.jsonl"),)), "t2i", Limits(min_pixels=64))
    (_, small), (_, large) = files.rows(0)
    with pytest.raises(BadRowError, match="at least 64 pixels, got image of 8x7"):
        files.record(small, 0, 0)
    assert files.record(large, 0, 1).target is not None


def test_rows_can_be_read_from_any_number_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"row {n}", "image": png(n)} for n in range(11)]
    for suffix in ("jsonl", "json", "csv", "parquet", "tar"):
        write_rows(tmp_path / f"set.{suffix}", rows)
        files = RecordFiles(RecordSet((str(tmp_path / f"set.{suffix}"),)), "t2i", LIMITS)
        for start in range(13):
            found = [(number, files.record(row, 0, number).text) for number, row in files.rows(0, start)]
            assert found == [(n, f"row {n}") for n in range(start, 11)], (suffix, start)
        some = files.rows_at(0, [9, 2, 2, 30])
        assert {number: files.record(row, 0, number).text for number, row in some.items()} == {2: "row 2", 9: "row 9"}


def test_a_parquet_file_with_a_damaged_page_keeps_the_rows_before(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    write_parquet(path, [{"prompt": f"row {n}", "image": png(n)} for n in range(12)], row_group_size=4)
    page = parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[page : page + 20] = b"\xff" * 20
    path.write_bytes(data)
    files = RecordFiles(RecordSet((str(path),)), "t2i", LIMITS)

    def texts(start: int) -> list[str]:
        found = []
        for number, row in files.rows(0, start):
            try:
                found.append(files.record(row, 0, number).text)
            except BadRowError as error:
                found.append(f"{number}: {error}")
        return found

    whole = texts(0)
    assert whole[:8] == [f"row {n}" for n in range(8)]
    assert "expected a whole" in whole[-1]
    for start in range(len(whole) + 1):
        assert texts(start) == whole[start:], start


def test_files_are_found_once_in_one_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.jsonl").write_text("{}")
    found = find_shards([tmp_path / "*.jsonl", tmp_path / "a.jsonl", tmp_path / "**" / "*.jsonl", tmp_path / "c.csv"])
    assert [shard.path.name for shard in found] == ["a.jsonl", "b.jsonl", "c.csv", "d.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("x.jsnl", FileNotFoundError, "expected files of rows, got none; did you mean 'x.jsonl'"),
        ("gone/*.tar", FileNotFoundError, "there is no file in"),
        ("", ValueError, "got a folder; name them"),
        ("x.tar.gz", ValueError, "got a compressed one; decompress it"),
        ("x.parquett", ValueError, r"got '.parquett'; did you mean x.parquet\?"),
    ],
)
def test_a_file_that_cannot_be_meant_is_named(
    tmp_path: Path, pattern: str, error: type[Exception], message: str
) -> None:
    for name in ("x.jsonl", "x.tar.gz", "x.parquett"):
        (tmp_path / name).write_text("")
    with pytest.raises(error, match=message):
        find_shards([tmp_path / pattern])


def test_a_document_that_is_no_array_is_one_bad_row(tmp_path: Path) -> None:
    for content, message in {
        "{}": "an array of objects, got a dict",
        "[1": "JSONDecodeError",
        "": "JSONDecodeError",
    }.items():
        (tmp_path / "set.json").write_text(content)
        (problem,) = read(tmp_path / "set.json")
        assert message in str(problem)
    (tmp_path / "set.json").write_text('[3, {"prompt": "p"}]')
    assert [str(problem)[:30] for problem in read(tmp_path / "set.json")] == [
        "expected a JSON object, got a ",
        "expected a target picture unde",
    ]
