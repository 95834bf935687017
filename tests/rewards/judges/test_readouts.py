"""Answers to numbers, worked by hand; what cannot be read is NaN with a reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.judges.readouts import (
    LabelReadout,
    Unreadable,
    content,
    digits,
    expectation,
    first_token,
    id_keys,
    pairwise,
    read_answered_label,
    read_label,
    surface_forms,
    text_keys,
    yes_no,
)
from tests.rewards.judges.fake_server import completion

SCALE = digits()
KEYS = text_keys(SCALE.labels)


def test_the_expected_digit_is_worked_by_hand() -> None:
    """(0.1 * 3 + 0.5 * 4 + 0.2 * 5) / 0.8 / 5 = 3.3 / 4 = 0.825: 'The' has the rest."""
    found = read_label(completion(tokens={"4": 0.5, "5": 0.2, "The": 0.2, "3": 0.1}), SCALE, KEYS)
    assert found.value == pytest.approx(0.825)
    assert found.components == {"label_mass": pytest.approx(0.8)}
    assert found.reason == ""


def test_tokens_named_by_their_ids() -> None:
    """Ids 15 to 20 are 0 to 5; 220 is no label. (0.6 * 5 + 0.2 * 0) / 0.8 / 5 = 0.75."""
    keys = id_keys({str(k): (15 + k,) for k in range(6)})
    found = read_label(completion(tokens={"token_id:20": 0.6, "token_id:15": 0.2, "token_id:220": 0.2}), SCALE, keys)
    assert found.value == pytest.approx(0.75)
    assert found.components["label_mass"] == pytest.approx(0.8)


def test_a_restricted_softmax_is_that_of_the_logits() -> None:
    """exp(l_k) / sum exp(l_j) over the labels is what renormalised probabilities are, whatever else there is."""
    logits = {"0": 0.3, "1": -1.0, "2": 2.0, "3": 0.0, "4": 1.5, "5": -0.5, "x": 1.0}
    total = sum(math.exp(logit) for logit in logits.values())
    answer = completion(tokens={token: math.exp(logit) / total for token, logit in logits.items()})
    labels = [math.exp(logits[str(k)]) for k in range(6)]
    expected = sum(k * e for k, e in enumerate(labels)) / sum(labels) / 5
    assert read_label(answer, SCALE, KEYS).value == pytest.approx(expected, rel=1e-12)


def test_surface_forms_of_one_label_are_summed() -> None:
    """'4' 0.3 and ' 4' 0.3 are 0.6 of 4, '2' is 0.2: (0.6 * 4 + 0.2 * 2) / 0.8 / 5 = 0.7."""
    assert read_label(completion(tokens={"4": 0.3, " 4": 0.3, "2": 0.2}), SCALE, KEYS).value == pytest.approx(0.7)


def test_yes_and_no_over_their_surface_forms() -> None:
    """Yes 0.4 + ' yes' 0.2 against No 0.2: 0.6 / 0.8; 'Not' is neither."""
    readout = yes_no()
    found = read_label(
        completion(tokens={"Yes": 0.4, " yes": 0.2, "No": 0.2, "Not": 0.1}), readout, text_keys(readout.labels)
    )
    assert found.value == pytest.approx(0.75)
    assert found.components["label_mass"] == pytest.approx(0.8)


def test_the_first_image_is_better() -> None:
    """A 0.6 against B 0.2; 'a' is the article."""
    readout = pairwise()
    found = read_label(completion(tokens={"A": 0.6, "B": 0.2, "a": 0.2}), readout, text_keys(readout.labels))
    assert found.value == pytest.approx(0.75)


def test_letters_may_be_a_scale() -> None:
    readout = LabelReadout("digits", ("A", "B", "C"), (0.0, 0.5, 1.0))
    found = expectation({"A": 0.2, "B": 0.4, "C": 0.4}, readout)
    assert found.value == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("tokens", "mass"), [({"4": 0.49, "The": 0.5}, 0.49), ({"The": 0.9, "A": 0.1}, 0.0), ({"4.5": 1.0}, 0.0)]
)
def test_too_little_label_mass_is_not_available(tokens: dict[str, float], mass: float) -> None:
    found = read_label(completion(tokens=tokens), SCALE, KEYS)
    assert math.isnan(found.value)
    assert found.components["label_mass"] == pytest.approx(mass)
    likeliest = max(tokens, key=lambda token: tokens[token])
    assert "is below 0.5: the judge was saying something other than 0, 1, 2, 3, 4, 5" in found.reason
    assert found.reason.endswith(f"; its likeliest first token is {likeliest!r}")


def test_no_label_mass_is_not_available_whatever_the_threshold() -> None:
    assert math.isnan(expectation(dict.fromkeys(SCALE.labels, 0.0), SCALE, min_mass=0).value)


def test_a_masked_token_has_no_probability() -> None:
    found = read_label(completion(tokens={"5": 1.0, "0": 0.0}), SCALE, KEYS)
    assert found.value == 1.0
    assert found.components["label_mass"] == 1.0


def test_the_drawn_token_counts_once_and_where_it_is_beyond_the_top() -> None:
    answer = completion(tokens={"5": 0.5, "4": 0.4})
    drawn = answer["choices"][0]["logprobs"]["content"][0]
    assert first_token(answer) == [("5", math.log(0.5)), ("4", math.log(0.4))]
    drawn["token"], drawn["logprob"] = "0", math.log(0.05)
    assert dict(first_token(answer))["0"] == math.log(0.05)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6).filter(lambda p: sum(p) > 0.01))
def test_the_value_lies_between_the_labels_that_have_mass(weights: list[float]) -> None:
    total = sum(weights)
    found = expectation({str(k): weight / total for k, weight in enumerate(weights)}, SCALE)
    present = [k / 5 for k, weight in enumerate(weights) if weight > 0]
    assert min(present) - 1e-9 <= found.value <= max(present) + 1e-9


def no_logprobs() -> dict[str, Any]:
    return completion("4")


def bad_logprob(value: object) -> dict[str, Any]:
    answer = completion(tokens={"4": 0.5})
    answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [{"token": "4", "logprob": value}]
    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({}, "no choices"),
        ({"choices": []}, "no choices"),
        ({"choices": ["4"]}, "no choices"),
        (no_logprobs(), "no logprobs"),
        ({"choices": [{"logprobs": {"content": []}}]}, "no logprobs"),
        ({"choices": [{"logprobs": {"content": [{"token": 4, "logprob": -0.1}]}}]}, "expected a token"),
        (bad_logprob(float("nan")), "expected a token and its log-probability, got '4' and nan"),
        (bad_logprob(0.5), "got '4' and 0.5"),
        (bad_logprob(None), "got '4' and None"),
        (completion(tokens={"token_id:19": 1.0}), "names tokens by their ids"),
    ],
)
def test_an_answer_that_holds_no_judgement_has_a_reason(answer: dict[str, Any], reason: str) -> None:
    found = read_label(answer, SCALE, KEYS)
    assert math.isnan(found.value)
    assert reason in found.reason


def test_probabilities_above_one_are_no_judgement() -> None:
    found = expectation({**dict.fromkeys(SCALE.labels, 0.0), "4": 0.9, "5": 0.9}, SCALE)
    assert math.isnan(found.value)
    assert "probability 1.8" in found.reason


@pytest.mark.parametrize(("text", "value"), [("4", 0.8), (" 5.", 1.0), ('"0"', 0.0), ("3\n", 0.6)])
def test_a_label_as_text(text: str, value: float) -> None:
    found = read_answered_label(completion(text), SCALE, KEYS)
    assert found.value == pytest.approx(value)
    assert found.components == {}


@pytest.mark.parametrize("text", ["4.5", "six", "4 of 5", "45", "-1", ""])
def test_a_text_that_is_no_label_is_not_available(text: str) -> None:
    found = read_answered_label(completion(text), SCALE, KEYS)
    assert math.isnan(found.value)
    assert found.reason


def test_text_of_an_answer() -> None:
    assert content(completion("hello")) == "hello"
    with pytest.raises(Unreadable, match="no text"):
        content({"choices": [{"message": {"content": None}}]})


def test_forms_of_a_word_and_of_a_letter() -> None:
    assert {"yes", "Yes", "YES", " Yes", "▁yes", "ĠYES"} <= set(surface_forms("yes"))
    assert set(surface_forms("A")) == {"A", " A", "▁A", "ĠA"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["1"], "two or more different words"),
        (["1", "1"], "two or more different words"),
        (["a", "5"], "expected digits"),
        (["-1", "5"], "expected digits"),
        (["0"], "expected digits"),
        ([], "expected digits"),
        (["²", "5"], "expected digits"),
    ],
)
def test_labels_that_are_no_scale_are_refused(labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("yes", "Yes"), "differ in more than their case"),
        (("very good", "no"), "without spaces"),
        (("", "no"), "words"),
    ],
)
def test_words_that_are_no_labels_are_refused(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yes_no(labels)


@pytest.mark.parametrize("worth", [(1.0,), (0.5, 0.0), (1.5, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_a_worth_that_is_none_is_refused(worth: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="worth: expected"):
        LabelReadout("digits", ("A", "B"), worth)
