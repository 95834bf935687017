"""GEdit-Bench (Step1X-Edit, arXiv:2504.17761): edits of eleven kinds, judged by VIEScore (arXiv:2312.14867)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pdtr.benchmarks.aggregate import OVERALL, Number, averages, prompt_values
from pdtr.benchmarks.base import Benchmark, Item, Metric, Scorer, Values
from pdtr.benchmarks.judging import PublishedJudge, judge_deviations
from pdtr.benchmarks.layouts import OneEach, is_safe_name
from pdtr.benchmarks.tables import Record, parsed, picture_of, text_of

if TYPE_CHECKING:
    from pdtr.benchmarks.scoring import Row
    from rewards.judges.judge import VLMJudge

Language = Literal["en", "cn"]
TASKS = (
    *("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change"),
    *("subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer"),
)
PUBLISHED = 606
"""Edits a language."""
METRICS = (Metric("O", "overall", 10.0), Metric("SC", "consistency", 10.0), Metric("PQ", "quality", 10.0))
INTERSECTION = "intersection"
JUDGED = PublishedJudge(
    "GPT-4.1", ("gpt-4.1", "gpt-4.1-2025-04-14", "qwen2.5-vl-72b-instruct", "qwen2.5-vl-72b-instruct-awq"), "VIEScore's"
)


def load_gedit(path: Path, language: Language = "en", image_root: Path | None = None) -> Benchmark:
    """GEdit-Bench over its parquet files, a data set saved by Hugging Face, or JSON with paths of pictures.

    Rows have ``key``, ``task_type``, ``instruction``, ``instruction_language`` and ``input_image``, optionally
    ``input_image_raw`` (the picture before it was scaled, which the policy is given) and ``Intersection_exist``.

    An edit is resized to its source's size, judged for what was done (SC, the least of two grades of 0 to 10) and for
    how it is made (PQ, likewise); its own score is ``O = sqrt(SC PQ)``. Each number is the unweighted mean of the
    eleven kinds' means. The intersection is the edits that all of the published models answered.

    Args:
        path: a file or a folder.
        language: of the instructions.
        image_root: folder that paths of pictures start from; the file's own unless given.

    Raises:
        ValueError: there is no such file, or no row of that language is good.
    """
    root = image_root or (path if path.is_dir() else path.parent)
    items, problems = parsed(path, _parser(language, root))
    kinds = {item.task for item in items}
    absent = tuple(f"no prompts of {task}" for task in TASKS if task not in kinds)
    unknown = tuple(f"{task}: no task of the benchmark" for task in sorted(kinds - set(TASKS)))
    number = () if len(items) == PUBLISHED else (f"{len(items)} prompts, published {PUBLISHED}",)
    return Benchmark(
        name="gedit",
        title=f"GEdit-Bench-{language.upper()} (arXiv:2504.17761)",
        items=items,
        samples=1,
        layout=OneEach("fullset/{task}/{language}/{id}.png", "fullset/{task}/{language}/{id}_SRCIMG.png"),
        metrics=METRICS,
        average="tasks",
        at_source_size=True,
        derive=derived,
        more=intersection,
        problems=problems,
        deviations=(*number, *absent, *unknown),
    )


def _parser(language: Language, root: Path) -> Callable[[int, Record], Item | None]:
    def parse(index: int, record: Record) -> Item | None:
        where, row = record
        if text_of(row, "instruction_language") != language:
            return None
        name, task = text_of(row, "key"), text_of(row, "task_type")
        if not is_safe_name(name) or not is_safe_name(task):
            raise ValueError(f"expected key and task_type that can name files, got {name!r} and {task!r}")
        shown = picture_of(row.get("input_image"), root, f"{where}, input_image")
        raw = row.get("input_image_raw")
        source = shown if raw is None else picture_of(raw, root, f"{where}, input_image_raw")
        metadata = {"language": language, INTERSECTION: bool(row.get("Intersection_exist", False))}
        return Item(index, name, text_of(row, "instruction"), task, metadata, (source,), (shown,))

    return parse


def derived(item: Item, values: Values) -> Values:
    """SC and PQ in [0, 1] with ``overall = sqrt(SC PQ)`` of this edit, where both are available."""
    known = {name: values[name] for name in ("consistency", "quality") if name in values}
    if len(known) == 2:
        known["overall"] = math.sqrt(known["consistency"] * known["quality"])
    return known


def intersection(items: Sequence[Item], rows: Sequence[Row]) -> list[Number]:
    """The three numbers over the intersection alone; none where the data has no such column."""
    chosen = [item for item in items if item.metadata.get(INTERSECTION)]
    names = {item.id for item in chosen}
    kept = [row for row in rows if row.item in names]
    if not chosen or len(chosen) == len(items):
        return []
    found = []
    for metric in METRICS:
        values = list(prompt_values(chosen, kept, derived, metric.value).values())
        overall = next(number for number in averages(metric, values, True) if number.task == OVERALL)
        found.append(replace(overall, task=INTERSECTION))
    return found


def judge_scorer(consistency: VLMJudge, quality: VLMJudge) -> Scorer:
    """VIEScore by two judges; published numbers are GPT-4.1's (or Qwen2.5-VL-72B's) with VIEScore's own prompts."""
    from rewards.judges.viescore import VIEScore

    asked = (consistency.template, quality.template)
    facts = {"judge": consistency.model, "templates": {template.name: template.sha256[:12] for template in asked}}
    return Scorer(VIEScore(consistency, quality), facts, judge_deviations(consistency.model, asked, JUDGED))
