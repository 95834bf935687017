"""Small files in the formats that the benchmarks are published in, and images of plain colours."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rewards.base import Images

GENEVAL_LINES = (
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "two_object", "include": [{"class": "cup", "count": 1}, {"class": "fork", "count": 1}], '
    '"prompt": "a photo of a cup and a fork"}',
    '{"tag": "counting", "include": [{"class": "orange", "count": 3}], "exclude": [{"class": "orange", "count": 4}], '
    '"prompt": "a photo of three oranges"}',
    '{"tag": "colors", "include": [{"class": "dining table", "count": 1, "color": "black"}], '
    '"prompt": "a photo of a black dining table"}',
    '{"tag": "position", "include": [{"class": "sink", "count": 1}, {"class": "tie", "count": 1, "position": '
    '["above", 0]}], "prompt": "a photo of a tie above a sink"}',
    '{"tag": "color_attr", "include": [{"class": "boat", "count": 1, "color": "white"}, '
    '{"class": "hot dog", "count": 1, "color": "orange"}], "prompt": "a photo of a white boat and an orange hot dog"}',
)
DPG_COLUMNS = (
    *("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple"),
    "question_natural_language",
)
DPG_ROWS = (
    ("1", "a red car by a lake", 1, "0", "entity - whole (car)", "Is there a car?"),
    ("1", "a red car by a lake", 2, "1", "attribute - color (car, red)", "Is the car red?"),
    ("1", "a red car by a lake", 3, "0", "entity - whole (lake)", "Is there a lake?"),
    ("1", "a red car by a lake", 4, "1, 3", "relation - spatial (car, lake, by)", "Is the car by the lake?"),
    ("stock_2", "two birds", 1, "0", "entity - whole (birds)", "Are there birds?"),
    ("stock_2", "two birds", 2, "1", "other - count (birds, ==2)", "Are there two birds?"),
)


def plain(color: Sequence[int] = (200, 30, 30), size: tuple[int, int] = (16, 16)) -> Images:
    """One colour, [H, W, 3]."""
    return np.full((*size, 3), color, np.uint8)


def png(image: Images, name: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=name)
    return buffer.getvalue()


def write_geneval(path: Path, lines: Sequence[str] = GENEVAL_LINES) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def write_dpg(path: Path, rows: Sequence[Sequence[Any]] = DPG_ROWS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(DPG_COLUMNS)
        for name, text, number, parents, category, question in rows:
            writer.writerow([name, text, "", number, parents, "", "", category, question])
    return path


def gedit_row(name: str, task: str, **changes: Any) -> dict[str, Any]:
    row = {
        "key": name,
        "task_type": task,
        "instruction": f"change {name}",
        "instruction_language": "en",
        "input_image": {"bytes": png(plain(size=(12, 20))), "path": f"{name}.png"},
        "input_image_raw": {"bytes": png(plain(size=(24, 40))), "path": f"{name}.png"},
        "Intersection_exist": True,
    }
    return {**row, **changes}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def write_imgedit(folder: Path, edits: Mapping[str, tuple[str, str]]) -> Path:
    """``basic_edit.json`` with a picture an edit: by id, its kind and its instruction."""
    content = {}
    for name, (kind, prompt) in edits.items():
        picture = folder / "animal" / f"{name}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(png(plain(size=(10, 14)), "JPEG"))
        content[name] = {"id": f"animal/{name}.jpg", "prompt": prompt, "edit_type": kind}
    path = folder / "basic_edit.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    return content


def overall(folder: Path, metric: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = results(folder)["numbers"]
    return next(row for row in rows if row["metric"] == metric and row["task"] == "overall")
