"""Numbers worked out by hand from images' values: means of tasks and of prompts, caps, geometric means, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from pdtr.benchmarks.aggregate import (
    ALL_PROMPTS,
    OVERALL,
    Number,
    PromptValues,
    mean_of_tasks,
    metric_numbers,
    number_of,
    numbers,
    reasons,
)
from pdtr.benchmarks.base import Benchmark, Item, Metric
from pdtr.benchmarks.dpg import load_dpg
from pdtr.benchmarks.gedit import METRICS, intersection
from pdtr.benchmarks.gedit import derived as gedit_derived
from pdtr.benchmarks.geneval import load_geneval
from pdtr.benchmarks.imgedit import derived as imgedit_derived
from pdtr.benchmarks.layouts import OneEach
from pdtr.benchmarks.scoring import Row
from rewards.judges.readouts import Reading
from rewards.judges.rubrics import read_rubric
from rewards.judges.templates import load_template
from tests.pdtr.benchmarks.files import write_dpg, write_geneval
from tests.rewards.judges.fake_server import completion

NAN = float("nan")


def row(item: str, sample: int = 0, reason: str = "", **values: float) -> Row:
    return Row(item, sample, "", "", values, reason)


def found(numbers: list[Number]) -> dict[tuple[str, str], float]:
    return {(number.metric, number.task): number.value for number in numbers}


# Means and errors


def test_a_prompt_counts_once_however_many_of_its_images_are_there() -> None:
    prompts = [
        PromptValues("a", (1.0, 0.0, NAN, NAN)),
        PromptValues("a", (1.0, 1.0, 1.0, 1.0)),
        PromptValues("a", (NAN,)),
    ]
    number = number_of("m", "a", prompts)
    # Prompts' means are 1/2 and 1: 3/4, with s^2 = 2 (1/4)^2 and s / sqrt(2) = 1/4.
    assert (number.value, number.error) == pytest.approx((0.75, 0.25))
    assert (number.prompts, number.images, number.failed) == (2, 9, 3)


def test_the_error_of_a_mean_of_tasks() -> None:
    tasks = [Number("m", "a", 0.2, 0.03, 9, 9, 0), Number("m", "b", 0.6, 0.04, 1, 1, 1)]
    number = mean_of_tasks("m", tasks)
    assert (number.value, number.error) == pytest.approx((0.4, 0.025))
    assert (number.task, number.prompts, number.images, number.failed) == (OVERALL, 10, 10, 1)


def test_a_task_without_a_value_leaves_no_overall_number() -> None:
    tasks = [Number("m", "a", 0.2, 0.03, 9, 9, 0), number_of("m", "b", [PromptValues("b", (NAN,))])]
    assert math.isnan(mean_of_tasks("m", tasks).value)


def test_the_scale_reaches_the_error() -> None:
    number = number_of("m", "a", [PromptValues("a", (0.0,)), PromptValues("a", (1.0,))], 100.0)
    assert (number.value, number.error) == pytest.approx((50.0, 50.0))


def test_the_commonest_reasons_are_counted() -> None:
    rows = [row("a", reason="away"), row("b", reason="away"), row("c", reason="late"), row("d")]
    assert reasons(rows) == {"away": 2, "late": 1}


# GenEval


def test_geneval_is_the_mean_of_tasks_and_not_of_images(tmp_path: Path) -> None:
    counting = {"tag": "counting", "include": [{"class": "cup", "count": 2}]}
    colors = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a red cup"}
    lines = [json.dumps({**counting, "prompt": f"two cups {i}"}) for i in range(3)] + [json.dumps(colors)]
    benchmark = load_geneval(write_geneval(tmp_path / "m.jsonl", lines))
    right = {"00000": 4, "00001": 4, "00002": 1, "00003": 0}
    rows = [
        row(item.id, sample, official=float(sample < right[item.id])) for item in benchmark.items for sample in range(4)
    ]
    values = found(metric_numbers(benchmark, benchmark.metrics[0], rows))
    # counting 9 of 12, colors 0 of 4: the mean of the tasks is 3/8, that of the images 9/16.
    assert values == pytest.approx(
        {
            ("correct", "counting"): 0.75,
            ("correct", "colors"): 0.0,
            ("correct", OVERALL): 0.375,
            ("correct", ALL_PROMPTS): 9 / 16,
        }
    )


# DPG-Bench


def answers(item: str, sample: int, *given: float) -> Row:
    values = {f"question/{number}": answer for number, answer in enumerate(given, start=1) if answer == answer}
    return row(item, sample, **values)


def test_dpg_by_hand(tmp_path: Path) -> None:
    benchmark = load_dpg(write_dpg(tmp_path / "dpg.csv"))
    rows = [
        # All of the four count; no car takes its colour and its place with it: 1 of 4; 3 of 4; and 2 of 4.
        answers("1", 0, 1, 1, 1, 1),
        answers("1", 1, 0, 1, 1, 1),
        answers("1", 2, 1, 1, 1, 0),
        answers("1", 3, 1, 1, 0, 1),
        # 1, 1/2, 0 (a number of birds that are not there), and 1/2.
        answers("stock_2", 0, 1, 1),
        answers("stock_2", 1, 1, 0),
        answers("stock_2", 2, 0, 1),
        answers("stock_2", 3, 1, 0),
    ]
    values = found(numbers(benchmark, rows))
    # (1 + 1/4 + 3/4 + 1/2) / 4 = 5/8 and (1 + 1/2 + 0 + 1/2) / 4 = 1/2: their mean is 9/16.
    assert values["score", OVERALL] == pytest.approx(56.25)
    # Answers by category, whether they count or not: car 3/4, lake 3/4 and birds 3/4.
    assert values["yes answers", "category/entity"] == pytest.approx(75.0)
    assert values["yes answers", "category/attribute"] == pytest.approx(100.0)
    assert values["yes answers", "category/relation"] == pytest.approx(75.0)
    assert values["yes answers", "category/other"] == pytest.approx(50.0)


def test_a_dpg_image_whose_score_hangs_on_a_missing_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    benchmark = load_dpg(write_dpg(tmp_path / "dpg.csv")).limited(None, 1)
    # Without a car its colour does not count, known or not: the lake is one of four. Of two birds it is not known.
    rows = [answers("1", 0, 0, NAN, 1, 0), answers("stock_2", 0, 1, NAN)]
    by_task = {number.task: number for number in numbers(benchmark, rows)}
    assert by_task[OVERALL].value == pytest.approx(25.0)
    assert (by_task[OVERALL].prompts, by_task[OVERALL].failed) == (1, 1)
    assert (by_task["category/attribute"].images, by_task["category/attribute"].failed) == (1, 1)


# GEdit-Bench


def edits(*tasks: str, **metadata: bool) -> tuple[Item, ...]:
    return tuple(Item(i, f"e{i}", "edit", task, metadata) for i, task in enumerate(tasks))


def gedit(items: tuple[Item, ...]) -> Benchmark:
    return Benchmark("gedit", "", items, 1, OneEach(), METRICS, "tasks", derive=gedit_derived, more=intersection)


def test_gedit_takes_the_root_of_each_edit_and_the_mean_of_the_kinds() -> None:
    benchmark = gedit(edits("color_alter", "color_alter", "subject-add"))
    rows = [
        row("e0", consistency=0.9, quality=0.4),
        row("e1", consistency=0.0, quality=1.0),
        row("e2", consistency=1.0, quality=0.81),
    ]
    values = found(numbers(benchmark, rows))
    # color_alter: (sqrt(36) + 0) / 2 = 3; subject-add: 9. The root of the means would be another number.
    assert values["O", "color_alter"] == pytest.approx(3.0)
    assert values["O", OVERALL] == pytest.approx(6.0)
    assert values["SC", OVERALL] == pytest.approx((4.5 + 10) / 2)
    assert values["PQ", OVERALL] == pytest.approx((7.0 + 8.1) / 2)
    assert values["O", ALL_PROMPTS] == pytest.approx((6 + 0 + 9) / 3)
    assert ("O", "intersection") not in values


def test_gedit_keeps_the_half_of_an_edit_that_was_judged() -> None:
    benchmark = gedit(edits("color_alter", "subject-add"))
    rows = [row("e0", consistency=0.8, reason="quality: away"), row("e1", consistency=0.6, quality=0.6)]
    by_key = {(number.metric, number.task): number for number in numbers(benchmark, rows)}
    assert by_key["SC", OVERALL].value == pytest.approx(7.0)
    assert by_key["SC", OVERALL].failed == 0
    assert math.isnan(by_key["O", OVERALL].value)
    assert by_key["O", OVERALL].failed == 1


def test_gedit_s_intersection_is_a_number_of_its_own() -> None:
    inside = Item(0, "e0", "edit", "color_alter", {"intersection": True})
    outside = Item(1, "e1", "edit", "color_alter", {"intersection": False})
    rows = [row("e0", consistency=1.0, quality=1.0), row("e1", consistency=0.0, quality=0.0)]
    values = found(numbers(gedit((inside, outside)), rows))
    assert (values["O", OVERALL], values["O", "intersection"]) == pytest.approx((5.0, 10.0))


# ImgEdit-Bench


@pytest.mark.parametrize(
    ("grades", "score", "capped"),
    [((5, 5, 5), 5.0, 5.0), ((1, 5, 5), 11 / 3, 1.0), ((3, 2, 5), 10 / 3, 8 / 3), ((4, 3, 2), 3.0, 3.0)],
)
def test_imgedit_s_score_and_its_cap(grades: tuple[float, float, float], score: float, capped: float) -> None:
    item = edits("add")[0]
    values = dict(zip(("compliance", "seamlessness", "preservation"), grades, strict=True))
    assert imgedit_derived(item, values) == pytest.approx({"score": score, "capped": capped})


def test_an_imgedit_edit_with_two_grades_has_no_score() -> None:
    assert imgedit_derived(edits("add")[0], {"compliance": 3.0, "seamlessness": 2.0}) == {}


def test_imgedit_is_the_mean_of_the_kinds() -> None:
    items = edits("add", "add", "action")
    benchmark = Benchmark("x", "", items, 1, OneEach(), (Metric("score", "score"),), "tasks", derive=imgedit_derived)
    grades: Mapping[str, tuple[int, int, int]] = {"e0": (5, 4, 3), "e1": (2, 2, 2), "e2": (1, 1, 1)}
    rows = [row(name, compliance=a, seamlessness=b, preservation=c) for name, (a, b, c) in grades.items()]
    assert found(numbers(benchmark, rows))["score", OVERALL] == pytest.approx(((4 + 2) / 2 + 1) / 2)


# From a judge's own words to a number, without a server


def reading(template: str, text: str) -> Reading:
    readout = load_template(template).readout
    return read_rubric(completion(text), readout)  # type: ignore[arg-type]


def test_a_filled_in_imgedit_rubric_becomes_its_score() -> None:
    text = 'Looks fine. {"reasoning": "done", "compliance": 2, "seamlessness": 5, "preservation": 3}'
    values = dict(reading("imgedit.v1", text).components)
    assert imgedit_derived(edits("add")[0], values) == pytest.approx({"score": 10 / 3, "capped": 2.0})


def test_filled_in_viescore_rubrics_become_one_edit_s_score() -> None:
    consistency = reading("viescore_sc.v1", '{"reasoning": "x", "edit_success": 9, "restraint": 4}').value
    quality = reading("viescore_pq.v1", '{"reasoning": "x", "naturalness": 9, "artifacts": 10}').value
    overall = gedit_derived(edits("add")[0], {"consistency": consistency, "quality": quality})["overall"]
    # The least of each: sqrt(4 * 9) = 6 on the scale of ten.
    assert 10 * overall == pytest.approx(6.0)


def test_what_cannot_be_read_is_no_grade() -> None:
    assert dict(reading("imgedit.v1", '{"compliance": 6, "seamlessness": 5, "preservation": 3}').components) == {}
    assert math.isnan(reading("imgedit.v1", "I cannot judge this.").value)
