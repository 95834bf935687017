"""UnifiedReward and VQAScore: configurations of the judge, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from rewards.base import Prompt
from rewards.checker import check_reward
from rewards.judges.client import JudgeClient
from rewards.judges.judge import VLMJudge
from rewards.judges.settings import ClientSettings, Retry
from rewards.scoring import score
from rewards.unified import (
    unified_dimensions,
    unified_dimensions_template,
    unified_score,
    unified_score_template,
    vqa_score,
    vqa_score_template,
)
from tests.rewards.judges.fake_server import (
    FakeServer,
    Handler,
    Reply,
    Request,
    as_json,
    completion,
    number,
    numbered,
    parts,
    pictures,
    says,
)

CLIENT = ClientSettings(attempt_seconds=5, call_seconds=20, retry=Retry(first_wait=0.01, longest_wait=0.05))
CAT = Prompt('a cat in a "red" box')


class Bench:
    def __init__(self) -> None:
        self.server = FakeServer(lambda request: Reply(500))
        self.server.start()
        self.client = JudgeClient(self.server.url, CLIENT)

    def answers(self, handler: Handler) -> JudgeClient:
        self.server.handler = handler
        return self.client


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.client.close()
    made.server.stop()


def test_vqa_score_is_the_share_of_yes(bench: Bench) -> None:
    judge = vqa_score(bench.answers(lambda request: says({"Yes": 0.5, " yes": 0.1, "No": 0.2, "It": 0.2})), "judge")
    scores = score(judge, numbered([1]), [CAT])
    assert scores.total[0] == pytest.approx(0.6 / 0.8)
    # The published score is over the whole vocabulary.
    assert scores.total[0] * scores.components["label_mass"][0] == pytest.approx(0.6)
    sent = parts(bench.server.requests[0])
    assert sent[0]["text"].strip() == 'Does this figure show "a cat in a "red" box"? Please answer Yes or No.'


def test_unified_score_is_the_expected_digit_over_five(bench: Bench) -> None:
    judge = unified_score(bench.answers(lambda request: says({"4": 0.6, "5": 0.2, "Final": 0.2})), "judge")
    scores = score(judge, numbered([1]), [CAT])
    assert scores.total[0] == pytest.approx((0.6 * 4 + 0.2 * 5) / 0.8 / 5)


def test_a_judge_that_writes_a_sentence_has_no_score(bench: Bench) -> None:
    judge = unified_score(bench.answers(lambda request: says({"Final": 0.9, "4": 0.1})), "judge")
    assert "label mass 0.1 is below 0.5" in score(judge, numbered([1]), [CAT]).reasons[0]


def test_unified_dimensions_are_the_mean_of_three(bench: Bench) -> None:
    filled = json.dumps({"reasoning": "x", "alignment": 5, "coherence": 3, "style": 1})
    judge = unified_dimensions(bench.answers(lambda request: as_json(completion(filled))), "judge")
    scores = score(judge, numbered([1]), [CAT])
    assert scores.total[0] == pytest.approx((1 + 0.5 + 0) / 3)
    assert {name: values[0] for name, values in scores.components.items()} == {
        "alignment": 5, "coherence": 3, "style": 1,
    }  # fmt: skip
    schema = bench.server.requests[0].body["response_format"]["json_schema"]["schema"]
    assert {"alignment", "coherence", "style"} < set(schema["properties"])


def test_they_keep_the_contract(bench: Bench) -> None:
    def truth(request: Request) -> Reply:
        good = 0.1 + 0.1 * (number(pictures(request)[-1]) % 8)
        return says({"Yes": good, "No": 0.9 - good, "5": 0.05, "1": 0.05})

    check_reward(vqa_score(bench.answers(truth), "judge"), numbered(range(4)), [CAT] * 4)


def test_they_are_the_judge_and_nothing_more(bench: Bench) -> None:
    made = [make(bench.client, "judge") for make in (vqa_score, unified_score, unified_dimensions)]
    assert {type(judge) for judge in made} == {VLMJudge}
    templates = [vqa_score_template(), unified_score_template(), unified_dimensions_template()]
    fingerprints = [json.loads(judge.traits.fingerprint)["template"] for judge in made]
    assert [entry["sha256"] for entry in fingerprints] == [template.sha256 for template in templates]
    assert [entry["name"] for entry in fingerprints] == ["vqa_score.v1", "unified_score.v1", "unified_dimensions.v1"]
