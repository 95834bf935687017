"""Rubrics as JSON: parsed, range-checked and combined by hand-worked rules; nothing is repaired by a guess."""

from __future__ import annotations

import json
import math

import pytest

from rewards.judges.rubrics import Dimension, RubricReadout, combined, read_rubric, response_format, viescore
from tests.rewards.judges.fake_server import completion

SC = RubricReadout((Dimension("edit_success", 0, 10), Dimension("restraint", 0, 10)))
IMGEDIT = RubricReadout((Dimension("a", 1, 5), Dimension("b", 1, 5), Dimension("c", 1, 5)), "mean")
GOOD = '{"reasoning": "fine", "edit_success": 8, "restraint": 6}'


def test_the_least_dimension_decides() -> None:
    found = read_rubric(completion(GOOD), SC)
    assert found.value == pytest.approx(0.6)
    assert found.components == {"edit_success": 8, "restraint": 6}


def test_the_mean_of_one_to_five() -> None:
    """(4 - 1) / 4, (3 - 1) / 4 and (5 - 1) / 4: 0.75, 0.5, 1; their mean is 0.75, as (4 - 1) / 4 of the mean 4."""
    assert read_rubric(completion('{"a": 4, "b": 3, "c": 5}'), IMGEDIT).value == pytest.approx(0.75)


def test_rules() -> None:
    assert combined([0.2, 0.8], "min") == 0.2
    assert combined([0.2, 0.8], "mean") == pytest.approx(0.5)
    assert combined([0.2, 0.8], "geometric_mean") == pytest.approx(0.4)
    assert combined([0.1, 0.2, 0.4], "geometric_mean") == pytest.approx(0.2)
    assert math.isnan(combined([math.nan, 0.0], "min"))


def test_viescore_is_the_root_of_the_product() -> None:
    assert viescore(0.9, 0.4) == pytest.approx(0.6)
    assert viescore(0.0, 1.0) == 0.0
    assert math.isnan(viescore(math.nan, 0.0))


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{GOOD}\n```",
        f"Here it is: {GOOD} I hope {{this}} helps.",
        f"{GOOD}\n{GOOD}",
        '{"edit_success": 8.0, "restraint": 6, "more": [1]}',
        'Form: {"reasoning": "...", "edit_success": N, "restraint": N}\n' + GOOD,
    ],
)
def test_the_object_is_found_in_what_is_around_it(text: str) -> None:
    assert read_rubric(completion(text), SC).value == pytest.approx(0.6)


def test_a_half_point_is_kept() -> None:
    assert read_rubric(completion('{"edit_success": 7.5, "restraint": 8}'), SC).value == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8 out of 10", "expected JSON with edit_success, restraint, got '8 out of 10'"),
        ('{"edit_success": 8}', "expected JSON with"),
        ('{"edit_success": 8, "restraint": 11}', "restraint: expected 0 to 10, got '11'"),
        ('{"edit_success": -1, "restraint": 1}', "edit_success: expected 0 to 10"),
        ('{"edit_success": "8", "restraint": 1}', "edit_success: expected 0 to 10"),
        ('{"edit_success": true, "restraint": 1}', "got 'True'"),
        ('{"edit_success": null, "restraint": 1}', "got 'None'"),
        ('{"edit_success": NaN, "restraint": 1}', "got 'nan'"),
        ('{"edit_success": Infinity, "restraint": 1}', "got 'inf'"),
        ('{"edit_success": 8, "restraint"', "expected JSON with"),
        ("[8, 6]", "expected JSON with"),
        (GOOD + '{"edit_success": 2, "restraint": 6}', "several that disagree"),
        ("{" * 5000, "expected JSON with"),
        ("", "no text"),
    ],
)
def test_what_is_not_as_asked_is_not_available(text: str, reason: str) -> None:
    found = read_rubric(completion(text), SC)
    assert math.isnan(found.value)
    assert reason in found.reason
    assert found.components == {}


def test_control_characters_in_the_reasoning_do_not_matter() -> None:
    """vLLM's grammar of a JSON string lets them through bare, which JSON forbids."""
    found = read_rubric(completion('{"reasoning": "a\tb\x13c\n", "edit_success": 8, "restraint": 6}'), SC)
    assert found.value == pytest.approx(0.6)


def test_an_answer_that_was_cut_off_says_so() -> None:
    answer = completion('{"reasoning": "on and on')
    answer["choices"][0]["finish_reason"] = "length"
    assert read_rubric(answer, SC).reason.endswith("(cut off at max_tokens)")


def test_the_schema_asks_for_reasons_first_and_whole_numbers_in_range() -> None:
    asked = response_format(SC)
    schema = asked["json_schema"]["schema"]
    assert asked["type"] == "json_schema"
    assert schema["required"] == ["reasoning", "edit_success", "restraint"]
    assert schema["properties"]["restraint"] == {"type": "integer", "minimum": 0, "maximum": 10}
    assert schema["additionalProperties"] is False
    json.dumps(asked)


@pytest.mark.parametrize(
    ("dimensions", "rule", "message"),
    [
        ((), "min", "one or more different names"),
        ((Dimension("a", 0, 1), Dimension("a", 0, 1)), "min", "one or more different names"),
        ((Dimension("a", 0, 1),), "max", "rule: expected one of min, mean, geometric_mean, got 'max'"),
    ],
)
def test_a_rubric_that_cannot_be_is_refused(dimensions: tuple[Dimension, ...], rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RubricReadout(dimensions, rule)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "low", "high"), [("a b", 0, 1), ("reasoning", 0, 1), ("a", 1, 1), ("a", 5, 1)])
def test_a_dimension_that_cannot_be_is_refused(name: str, low: int, high: int) -> None:
    with pytest.raises(ValueError, match="dimension"):
        Dimension(name, low, high)
