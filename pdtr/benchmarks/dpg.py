"""DPG-Bench (ELLA, arXiv:2403.05135): 1,065 dense prompts, four images in a grid, questions that hang on each other."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtr.benchmarks.aggregate import Number, PromptValues, number_of
from pdtr.benchmarks.base import Benchmark, Item, Metric, Scorer, Values
from pdtr.benchmarks.layouts import Grids, is_safe_name
from pdtr.benchmarks.tables import MAX_TEXT_BYTES, text_of

if TYPE_CHECKING:
    from pdtr.benchmarks.scoring import Row
    from rewards.judges.judge import VLMJudge
    from rewards.questions import Question

PUBLISHED = 1065
SAMPLES = 4
_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


def load_dpg(path: Path) -> Benchmark:
    """DPG-Bench over its ``dpg_bench.csv``: a row a question, the prompt's text in each.

    An image's score is the share of its questions that count, a prompt's the mean of its four images, the benchmark's
    the mean over prompts, times 100. ``category/...`` are the shares of yes answers by category, whether they count or
    not, as published. A prompt with a bad row is skipped whole, for its graph would be another.

    Differs: the published code passes over the first row of the file, and takes the categories from the last image of
    each grid alone; here all rows and images count.

    Raises:
        ValueError: there is no such file, or no prompt of it is good.
    """
    rows, problems = _rows(path)
    items = []
    for index, (name, questions) in enumerate(rows.items()):
        try:
            items.append(_item(index, name, questions))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if not items:
        raise ValueError(f"{path}: expected one good prompt or more, got {len(problems)} bad ones: {problems[:1]}")
    found = len(items)
    return Benchmark(
        name="dpg",
        title="DPG-Bench (arXiv:2403.05135)",
        items=tuple(items),
        samples=SAMPLES,
        layout=Grids(),
        metrics=(Metric("score", "score", 100.0),),
        average="prompts",
        derive=derived,
        more=categories,
        problems=tuple(problems),
        deviations=() if found == PUBLISHED else (f"{found} prompts, published {PUBLISHED}",),
    )


def _rows(path: Path) -> tuple[dict[str, list[Mapping[str, str]]], list[str]]:
    if not path.is_file():
        raise ValueError(f"{path}: expected DPG-Bench's dpg_bench.csv, got no such file")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_TEXT_BYTES} bytes, got {path.stat().st_size}")
    reader = csv.DictReader(io.StringIO(path.read_text("utf-8-sig", errors="replace")))
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}: expected the columns {', '.join(_COLUMNS)}, got none called {missing[0]!r}")
    by_item: dict[str, list[Mapping[str, str]]] = {}
    problems = []
    for number, row in enumerate(reader, start=2):
        name = row.get("item_id")
        if is_safe_name(name):
            by_item.setdefault(str(name), []).append(row)
        else:
            problems.append(f"line {number}: expected an item_id that can name a file, got {name!r}")
    return by_item, problems


def _item(index: int, name: str, rows: Sequence[Mapping[str, str]]) -> Item:
    from rewards.questions import check_graph

    questions = [_question(row) for row in rows]
    check_graph(questions)
    entries: list[dict[str, Any]] = [{**asdict(question), "parents": list(question.parents)} for question in questions]
    return Item(index, name, text_of(rows[0], "text"), metadata={"questions": entries})


def _question(row: Mapping[str, str]) -> Question:
    from rewards.questions import Question

    try:
        parents = tuple(int(part) for part in str(row["dependency"]).split(","))
        number = int(row["proposition_id"])
    except ValueError as error:
        raise ValueError(f"expected numbers as proposition_id and dependency ({error})") from error
    # "entity - whole (car)" is of the category "entity"; the published code reads it so.
    category = str(row["tuple"]).split("(")[0].split("-")[0].strip()
    return Question(number, text_of(row, "question_natural_language"), parents, category)


def derived(item: Item, values: Values) -> Values:
    """The score of an image by its questions' answers."""
    from rewards.questions import graph_score, questions_of

    score = graph_score(answers_of(values), questions_of(item.metadata))
    return {} if math.isnan(score) else {"score": score}


def answers_of(values: Values) -> dict[int, float]:
    """The answers among an image's values, by question."""
    from rewards.questions import PREFIX

    return {int(name.removeprefix(PREFIX)): value for name, value in values.items() if name.startswith(PREFIX)}


def categories(items: Sequence[Item], rows: Sequence[Row]) -> list[Number]:
    """The share of yes answers of each category, over all questions of all images, whether they count or not.

    The standard error is that of the mean over prompts of each prompt's share, which weighs prompts alike.
    """
    from rewards.questions import questions_of

    graphs = {item.id: questions_of(item.metadata) for item in items}
    names = sorted({question.category for graph in graphs.values() for question in graph})
    found = []
    for name in names:
        by_item: dict[str, list[float]] = {item.id: [] for item in items}
        for row in rows:
            answers = answers_of(row.values)
            chosen = [question.id for question in graphs[row.item] if question.category == name]
            by_item[row.item] += [answers.get(number, math.nan) for number in chosen]
        prompts = [PromptValues(name, tuple(values)) for values in by_item.values() if values]
        found.append(_weighted(name, prompts))
    return found


def _weighted(name: str, prompts: Sequence[PromptValues]) -> Number:
    """A share over questions; its error over prompts."""
    from dataclasses import replace

    number = number_of("yes answers", f"category/{name}", prompts, 100.0)
    pooled = number_of("", "", [PromptValues("", (value,)) for prompt in prompts for value in prompt.values], 100.0)
    return replace(number, value=pooled.value)


def judge_scorer(judge: VLMJudge) -> Scorer:
    """A judge that answers the questions; published numbers are mPLUG-large's."""
    from rewards.questions import QuestionGraph

    facts = {"judge": judge.model, "template": {judge.template.name: judge.template.sha256[:12]}}
    return Scorer(QuestionGraph(judge), facts, (f"judge {judge.model} in place of mPLUG-large",))
