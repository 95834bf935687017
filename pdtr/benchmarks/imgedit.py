"""ImgEdit-Bench (arXiv:2505.20275), its basic suite: edits of nine kinds, three grades of 1 to 5 each."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pdtr.benchmarks.base import Benchmark, Item, Metric, Scorer, Values, count_deviations
from pdtr.benchmarks.judging import PublishedJudge, judge_deviations
from pdtr.benchmarks.layouts import OneEach, is_safe_name
from pdtr.benchmarks.tables import Record, parsed, picture_of, text_of

if TYPE_CHECKING:
    from rewards.judges.judge import VLMJudge

PUBLISHED = {
    "add": 95,
    "adjust": 94,
    "extract": 117,
    "replace": 92,
    "remove": 86,
    "background": 94,
    "style": 100,
    "compose": 23,
    "action": 36,
}
"""Edits a kind, 737 in all."""
# The file calls two kinds otherwise than the tables do.
_NAMES = {"alter": "adjust", "hybrid": "compose"}
GRADES = ("compliance", "seamlessness", "preservation")
JUDGED = PublishedJudge("GPT-4.1", ("gpt-4.1", "gpt-4.1-2025-04-14", "gpt-4o"), "ImgEdit's")


def load_imgedit(path: Path, image_root: Path | None = None) -> Benchmark:
    """ImgEdit-Bench over its ``basic_edit.json``: by id, the path of a picture, an instruction and a kind.

    An edit's score is the mean of three grades from 1 to 5, a kind's the mean over its edits, the benchmark's the
    unweighted mean of the nine kinds. The judge is told that the second and the third grade must not exceed the first;
    the published code does not enforce it, so ``score`` does not either, and ``capped`` does.

    Differs: the published code rounds every mean to two digits and drops what is no whole number.

    Args:
        path: the file; rows in parquet with a picture under ``image`` or ``input_image`` will do too.
        image_root: folder that paths of pictures start from; the file's own unless given.

    Raises:
        ValueError: there is no such file, or no row is good.
    """
    root = image_root or (path if path.is_dir() else path.parent)
    items, problems = parsed(path, _parser(root))
    return Benchmark(
        name="imgedit",
        title="ImgEdit-Bench, basic suite (arXiv:2505.20275)",
        items=items,
        samples=1,
        layout=OneEach(),
        metrics=(Metric("score", "score"), Metric("capped", "capped")),
        average="tasks",
        derive=derived,
        problems=problems,
        deviations=count_deviations(items, PUBLISHED),
    )


def _parser(root: Path) -> Callable[[int, Record], Item]:
    def parse(index: int, record: Record) -> Item:
        where, row = record
        name, kind = text_of(row, "key"), text_of(row, "edit_type")
        if not is_safe_name(name):
            raise ValueError(f"expected an id that can name a file, got {name!r}")
        pictures = [row[column] for column in ("input_image", "image", "id") if column in row]
        source = picture_of(pictures[0] if pictures else None, root, where)
        return Item(index, name, text_of(row, "prompt", "instruction"), _NAMES.get(kind, kind), {}, (source,))

    return parse


def derived(item: Item, values: Values) -> Values:
    """The mean of the three grades, as they were given and with the second and third at most the first."""
    grades = [values[name] for name in GRADES if name in values]
    if len(grades) < len(GRADES):
        return {}
    capped = [grades[0], *(min(grade, grades[0]) for grade in grades[1:])]
    return {"score": math.fsum(grades) / len(grades), "capped": math.fsum(capped) / len(capped)}


def judge_scorer(judge: VLMJudge) -> Scorer:
    """The three grades by a judge; published numbers are GPT-4.1's (or GPT-4o's) with a text for each kind of edit.

    Raises:
        ValueError: the judge's template has other grades.
    """
    from rewards.judges.rubrics import RubricReadout

    readout = judge.template.readout
    names = [dimension.name for dimension in readout.dimensions] if isinstance(readout, RubricReadout) else []
    if set(names) != set(GRADES):
        raise ValueError(
            f"template {judge.template.name}: expected the dimensions {', '.join(GRADES)}, 1-5 each, got {names}"
        )
    template = {judge.template.name: judge.template.sha256[:12]}
    told = judge_deviations(judge.model, (judge.template,), JUDGED)
    return Scorer(judge, {"judge": judge.model, "template": template}, told)
