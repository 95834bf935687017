"""The rule of question graphs, by hand and by brute force, and the judge that answers them."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import Prompt, reward_statistics
from rewards.judges.client import JudgeClient
from rewards.judges.judge import VLMJudge
from rewards.judges.settings import ClientSettings, Retry
from rewards.judges.templates import parse_template
from rewards.questions import (
    QUESTION_TEMPLATE,
    Question,
    QuestionGraph,
    check_graph,
    counted,
    graph_score,
    questions_of,
)
from rewards.scoring import score
from tests.rewards.judges.fake_server import (
    FakeServer,
    Reply,
    Request,
    as_json,
    number,
    numbered,
    parts,
    pictures,
    says,
)

NAN = float("nan")
CAR = (Question(1, "a car?"), Question(2, "red?", (1,)), Question(3, "a lake?", (0,)), Question(4, "by it?", (1, 3)))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((0, 1, 1, 1), (0, 0, 1, 0)),
        ((1, 0, 0, 1), (1, 0, 0, 0)),
        ((1, NAN, 1, 1), (1, NAN, 1, 1)),
        # Unknown, but the lake is not there, so that nothing is by it.
        ((NAN, 0, 0, 1), (NAN, 0, 0, 0)),
        ((NAN, 1, 1, 1), (NAN, NAN, 1, NAN)),
    ],
)
def test_a_child_counts_only_where_its_parents_do(answers: Sequence[float], expected: Sequence[float]) -> None:
    found = counted(dict(zip((1, 2, 3, 4), answers, strict=True)), CAR)
    assert [found[i] for i in (1, 2, 3, 4)] == pytest.approx(expected, nan_ok=True)


def test_a_grandchild_falls_with_its_grandparent_in_any_order_of_the_file() -> None:
    chain = (Question(1, "c", (2,)), Question(2, "b", (3,)), Question(3, "a"))
    for order in itertools.permutations(chain):
        assert counted({1: 1.0, 2: 1.0, 3: 0.0}, order) == {1: 0.0, 2: 0.0, 3: 0.0}


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), st.integers(0, 3))
def test_a_missing_answer_bounds_the_score_by_what_it_might_have_been(answers: list[float], lost: int) -> None:
    known = dict(zip((1, 2, 3, 4), answers, strict=True))
    unknown = counted({**known, lost + 1: NAN}, CAR)
    either = [counted({**known, lost + 1: value}, CAR) for value in (0.0, 1.0)]
    for name, value in unknown.items():
        outcomes = {found[name] for found in either}
        assert (value in outcomes and len(outcomes) == 1) if not math.isnan(value) else len(outcomes) == 2


def test_the_score_is_the_share_where_all_is_known() -> None:
    assert graph_score({1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0}, CAR) == pytest.approx(0.75)
    # No car: nothing that hangs on it counts, whatever the answer.
    assert graph_score({1: 0.0, 3: 1.0}, CAR) == pytest.approx(0.25)


@pytest.mark.parametrize("answers", [{}, {1: 1.0, 3: 1.0, 4: 1.0}, {1: 1.0}, {1: 1.0, 2: NAN, 3: NAN, 4: NAN}])
def test_a_score_is_not_made_up_of_what_is_known(answers: dict[int, float]) -> None:
    assert math.isnan(graph_score(answers, CAR))


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ((), "one or more"),
        ((Question(1, "a"), Question(1, "b")), "different ids"),
        ((Question(0, "a"),), "from 1 on"),
        ((Question(1, "a", (7,)),), "parents among"),
        ((Question(1, "a", (2,)), Question(2, "b", (1,))), "circle"),
        ((Question(1, "a", (1,)),), "circle"),
    ],
)
def test_what_is_no_graph_is_refused(questions: tuple[Question, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_graph(questions)


def test_metadata_without_a_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="questions"):
        questions_of({"tag": "x"})
    with pytest.raises(ValueError, match="id, text"):
        questions_of({"questions": [{"name": 1}]})


# With a server that sees a number in each picture: bit k - 1 of it is the answer to question k.


def metadata(*graph: Question) -> dict[str, Any]:
    return {
        "questions": [{"id": q.id, "text": q.text, "parents": list(q.parents), "category": q.category} for q in graph]
    }


def truth(request: Request) -> Reply:
    if request.path == "/tokenize":
        return as_json({"detail": "Not Found"}, 404)
    texts = "".join(part.get("text", "") for part in parts(request))
    if "broken" in texts:
        return as_json({"choices": []}, 200)
    if "grey" in texts:
        return says({"no": 1.0})
    asked = next(q.id for q in CAR if f"Question: {q.text}" in texts)
    yes = number(pictures(request)[0]) >> (asked - 1) & 1
    return says({"yes": 0.8 if yes else 0.1, "no": 0.1 if yes else 0.8})


@pytest.fixture
def graph() -> Iterator[QuestionGraph]:
    settings = ClientSettings(call_seconds=10, retry=Retry(attempts=2, first_wait=0.01, longest_wait=0.02))
    with FakeServer(truth) as server, JudgeClient(server.url, settings) as client:
        yield QuestionGraph(VLMJudge(client, "judge", parse_template(QUESTION_TEMPLATE, "question.v1")))


def test_a_judge_s_answers_are_counted_by_the_graph(graph: QuestionGraph) -> None:
    prompts = [Prompt("x", metadata=metadata(*CAR)), Prompt("y", metadata=metadata(*CAR[:2])), Prompt("z")]
    scores = score(graph, numbered([0b1101, 0b10, 0b1111]), prompts)
    # 1, 3 and 4 are yes: 3 of 4 count. Of the second only the colour of no car is: 0 of 2. The third asks nothing.
    assert scores.total.tolist() == pytest.approx([0.75, 0.0, NAN], nan_ok=True)
    assert scores.components["question/2"].tolist() == pytest.approx([0.0, 1.0, NAN], nan_ok=True)
    assert "questions" in scores.reasons[2]
    assert set(scores.reasons) == {2}


def test_an_answer_that_fails_masks_its_image_unless_nothing_hangs_on_it(graph: QuestionGraph) -> None:
    """One yes and two that fail are no 1.0; where there is no car the broken questions are of nothing."""
    asked = (Question(1, "a car?"), Question(2, "broken?", (1,)), Question(3, "broken as well?", (1,)))
    scores = score(graph, numbered([0b1, 0b0]), [Prompt("x", metadata=metadata(*asked))] * 2)
    assert scores.total.tolist() == pytest.approx([NAN, 0.0], nan_ok=True)
    assert scores.components["question/1"].tolist() == [1.0, 0.0]
    assert np.isnan(scores.components["question/2"]).all()
    assert all("2 of 3 questions have no answer" in scores.reasons[row] for row in (0, 1))


def test_the_judge_s_counts_and_warm_up_are_passed_on(graph: QuestionGraph) -> None:
    found = asyncio.run(graph.warm_up())
    assert list(found) == list(graph.judge.client.base_urls)
    score(graph, numbered([0b1]), [Prompt("x", metadata=metadata(*CAR))])
    assert reward_statistics(graph) == graph.judge.statistics()
    assert reward_statistics(graph)["calls"] == 4


def test_a_judge_of_another_readout_is_refused() -> None:
    with JudgeClient("http://127.0.0.1:9/v1") as client, pytest.raises(ValueError, match="yes_no"):
        QuestionGraph(VLMJudge(client, "judge", "t2i_following.v1"))
