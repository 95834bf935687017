"""The judge as a reward, against a real server that knows the truth of each image."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.base import Images, Prompt, Scores, Unavailable, reward_statistics
from rewards.cache import Cached
from rewards.checker import check_reward
from rewards.compose import WeightedSum
from rewards.judges.client import JudgeClient
from rewards.judges.faults import JudgeConfigurationError
from rewards.judges.judge import VLMJudge
from rewards.judges.messages import data_url
from rewards.judges.settings import ClientSettings, JudgeSettings, Retry
from rewards.judges.templates import parse_template
from rewards.judges.viescore import VIEScore
from rewards.scoring import score
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

RETRY = Retry(attempts=6, first_wait=0.01, longest_wait=0.05)
CLIENT = ClientSettings(
    attempt_seconds=5, call_seconds=20, batch_seconds=60, rest_seconds=0.2, retry=RETRY, max_in_flight=8
)
NAN = float("nan")


class Bench:
    """One server, one client, and judges made of them."""

    def __init__(self) -> None:
        self.server = FakeServer(truth)
        self.server.start()
        self.client = JudgeClient(self.server.url, CLIENT)

    def judge(self, template: Any = "t2i_following.v1", **settings: Any) -> VLMJudge:
        return VLMJudge(self.client, "judge", template, JudgeSettings(**settings))

    def bodies(self) -> list[dict[str, Any]]:
        return [request.body for request in self.server.requests]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.client.close()
    made.server.stop()


def truth(request: Request) -> Reply:
    """0.6 for the digit that the image's number is, modulo 6, 0.3 for 5, the rest for a word."""
    digit = str(number(pictures(request)[-1]) % 6)
    tokens = {"The": 0.1, "5": 0.3, digit: 0.6 + 0.3 * (digit == "5")}
    return says(tokens)


def expected(index: int) -> float:
    digit = index % 6
    return 1.0 if digit == 5 else (0.6 * digit + 0.3 * 5) / 0.9 / 5


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"picture {index}") for index in range(count)]


def test_every_reward_is_its_image_s(bench: Bench) -> None:
    judge = bench.judge()
    found = score(judge, numbered(range(20)), prompts(20))
    np.testing.assert_allclose(found.total, [expected(index) for index in range(20)], rtol=1e-6)
    np.testing.assert_allclose(found.components["label_mass"], 0.9, rtol=1e-6)
    assert found.reasons == {}
    texts = {parts(request)[0]["text"].split("Request: ")[1].split("\n")[0] for request in bench.server.requests}
    assert texts == {f"picture {index}" for index in range(20)}


def test_it_keeps_the_reward_contract(bench: Bench) -> None:
    check_reward(bench.judge(), numbered(range(6)), prompts(6))


def test_an_empty_batch_asks_nothing(bench: Bench) -> None:
    assert score(bench.judge(), numbered([0])[:0], []).total.tolist() == []
    assert bench.server.requests == []


def test_what_is_sent_for_a_label(bench: Bench) -> None:
    judge = bench.judge(disable_thinking=True, extra={"seed": 0})
    score(judge, numbered([3]), [Prompt("a cat")])
    sent = bench.bodies()[0]
    content = sent.pop("messages")[0]["content"]
    assert sent == {
        "model": "judge",
        "temperature": 0.0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
        "chat_template_kwargs": {"enable_thinking": False},
        "seed": 0,
    }
    assert [part["type"] for part in content] == ["text", "image_url"]
    assert content[0]["text"].endswith("Request: a cat\n\nPicture: ")
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_the_candidate_is_last_so_that_a_group_shares_what_is_before(bench: Bench) -> None:
    source = numbered([4000])[0]
    prompt = Prompt("make it blue", (source,))
    score(bench.judge("edit_following.v1"), numbered([1, 2, 3]), [prompt] * 3)
    contents = [parts(request) for request in bench.server.requests]
    assert [part["type"] for part in contents[0]] == ["text", "image_url", "text", "image_url"]
    assert all(content[:-1] == contents[0][:-1] for content in contents)
    assert len({json.dumps(content[-1]) for content in contents}) == 3
    assert {number(pictures(request)[0]) for request in bench.server.requests} == {4000}
    assert contents[0][2]["text"] == "\n\nInstruction: make it blue\n\nAfter: "


def test_several_source_images_come_in_order_the_later_ones_as_references(bench: Bench) -> None:
    judge, sources = bench.judge("edit_following.v1"), numbered([7, 8, 9])
    for count in (3, 1):
        score(judge, numbered([5]), [Prompt("join", tuple(sources[:count]))])
    several, alone = (parts(request) for request in bench.server.requests)
    assert [number(image) for image in pictures(bench.server.requests[0])] == [7, 8, 9, 5]
    # What stands before the first one and behind the last one is what an edit of one picture has.
    assert several[:2] == alone[:2]
    assert several[-2:] == alone[-2:]
    assert several[0]["text"].endswith("\n\nBefore: ")
    assert several[2]["text"] == (
        "\n\nThe picture above, before the edit, is picture 1. Reference pictures, which the instruction may speak of "
        "and which are not edited themselves:\n\nPicture 2: "
    )
    assert several[4]["text"] == "\n\nPicture 3: "
    assert several[6]["text"] == "\n\nInstruction: join\n\nAfter: "
    assert len(alone) == 4


def test_the_second_reference_shows_in_pairs_too(bench: Bench) -> None:
    bench.server.handler = leaning([0, 0.2], bias=0)
    score(bench.judge("pairwise_edit.v1"), numbered([0, 1]), [Prompt("edit", tuple(numbered([9, 8])))] * 2)
    assert [number(image) for image in pictures(bench.server.requests[0])][:2] == [9, 8]
    assert parts(bench.server.requests[0])[2]["text"].endswith("Picture 2: ")


def test_large_images_are_scaled_down_and_small_ones_sent_as_they_are(bench: Bench) -> None:
    judge = bench.judge(long_side=64)
    wide = np.random.default_rng(0).integers(0, 256, (1, 100, 200, 3), np.uint8)
    small = np.random.default_rng(1).integers(0, 256, (1, 10, 20, 3), np.uint8)
    score(judge, wide, prompts(1))
    score(judge, small, prompts(1))
    first, second = (pictures(request)[-1] for request in bench.server.requests)
    assert first.shape == (32, 64, 3)
    np.testing.assert_array_equal(second, small[0])


def test_a_prompt_is_text_and_no_template(bench: Bench) -> None:
    text = 'draw {image} and {source} and {"a": 1}, "Größe" 猫 \ud800'
    score(bench.judge(), numbered([1]), [Prompt(text)])
    content = parts(bench.server.requests[0])
    assert [part["type"] for part in content] == ["text", "image_url"]
    assert f"Request: {text}\n" in content[0]["text"]


def test_metadata_fills_a_placeholder_and_its_lack_is_a_reason(bench: Bench) -> None:
    template = parse_template("readout: digits\n---\n{prompt} needs {metadata.requirement}: {image}", "mine")
    asked = [Prompt("a", metadata={"requirement": "a tail"}), Prompt("b"), Prompt("c", metadata={"requirement": []})]
    found = score(bench.judge(template), numbered([1, 2, 3]), asked)
    assert np.isnan(found.total).tolist() == [False, True, True]
    assert found.reasons[1] == (
        "the template mine needs metadata.requirement, a text or a number, and the prompt has None"
    )
    assert [parts(request)[0]["text"] for request in bench.server.requests] == ["a needs a tail: "]


def test_a_prompt_without_a_source_image_is_not_judged(bench: Bench) -> None:
    asked = [Prompt("a", tuple(numbered([9]))), Prompt("b")]
    found = score(bench.judge("edit_following.v1"), numbered([1, 2]), asked)
    np.testing.assert_allclose(found.total, [expected(1), NAN], rtol=1e-6)
    assert found.reasons == {1: "the template edit_following.v1 needs a source image, and the prompt has none"}


def test_a_source_that_is_no_image_is_the_caller_s_error(bench: Bench) -> None:
    bad = Prompt("a", (np.zeros((4, 4), np.uint8),))
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\], got uint8 \[4, 4\]"):
        score(bench.judge("edit_following.v1"), numbered([1]), [bad])


def test_a_failed_call_masks_its_image_alone(bench: Bench) -> None:
    bench.server.handler = lambda request: Reply(500) if number(pictures(request)[-1]) == 2 else truth(request)
    found = score(bench.judge(), numbered(range(5)), prompts(5))
    np.testing.assert_allclose(found.total, [expected(0), expected(1), NAN, expected(3), expected(4)], rtol=1e-6)
    assert list(found.reasons) == [2]
    assert "no answer in 6 attempts; last fault: status 500" in found.reasons[2]
    assert math.isnan(found.components["label_mass"][2])


def test_an_answer_that_is_no_label_masks_its_image_and_is_not_asked_again(bench: Bench) -> None:
    words = says({"I": 0.9, "4": 0.1})
    bench.server.handler = lambda request: words if number(pictures(request)[-1]) == 1 else truth(request)
    found = score(bench.judge(), numbered(range(3)), prompts(3))
    assert np.isnan(found.total).tolist() == [False, True, False]
    assert "label mass 0.1 is below 0.5" in found.reasons[1]
    assert found.components["label_mass"][1] == pytest.approx(0.1)
    assert len(bench.server.requests) == 3


def test_a_mistake_in_the_configuration_is_fatal(bench: Bench) -> None:
    bench.server.handler = lambda request: as_json({"error": {"message": "no such model"}}, 404)
    with pytest.raises(JudgeConfigurationError, match="no such model"):
        score(bench.judge(), numbered(range(3)), prompts(3))


def test_a_label_as_text_for_servers_without_logprobs(bench: Bench) -> None:
    bench.server.handler = lambda request: as_json(completion(str(number(pictures(request)[-1]))))
    found = score(bench.judge(read="answer"), numbered([0, 4, 5, 6]), prompts(4))
    np.testing.assert_allclose(found.total, [0, 0.8, 1, NAN], rtol=1e-6)
    assert found.components == {}
    assert "got the text '6'" in found.reasons[3]
    assert "logprobs" not in bench.bodies()[0]
    assert bench.bodies()[0]["max_tokens"] == 8


def test_yes_or_no(bench: Bench) -> None:
    bench.server.handler = lambda request: says({"Yes": 0.5, "yes": 0.1, "No": 0.2})
    assert score(bench.judge("yes_no.v1"), numbered([0]), prompts(1)).total[0] == pytest.approx(0.75)


def rubric(**scores: float) -> Reply:
    return as_json(completion(json.dumps({"reasoning": "seen", **scores})))


def test_a_rubric_has_its_dimensions_as_components(bench: Bench) -> None:
    bench.server.handler = lambda request: rubric(compliance=4, seamlessness=3, preservation=5)
    found = score(bench.judge("imgedit.v1"), numbered([0]), [Prompt("a", tuple(numbered([9])))])
    assert found.total[0] == pytest.approx(0.75)
    assert {name: float(values[0]) for name, values in found.components.items()} == {
        "compliance": 4,
        "seamlessness": 3,
        "preservation": 5,
    }
    sent = bench.bodies()[0]
    assert sent["response_format"]["json_schema"]["schema"]["required"][0] == "reasoning"
    assert sent["max_tokens"] == 1024
    assert "logprobs" not in sent


def test_a_rubric_without_a_schema(bench: Bench) -> None:
    bench.server.handler = lambda request: as_json(completion("naturalness is 9"))
    found = score(bench.judge("viescore_pq.v1", structured=False, max_tokens=50), numbered([0]), prompts(1))
    assert "expected JSON with naturalness, artifacts" in found.reasons[0]
    assert "response_format" not in bench.bodies()[0]
    assert bench.bodies()[0]["max_tokens"] == 50


def test_viescore_multiplies_two_judges(bench: Bench) -> None:
    """SC = min(9, 8), PQ = min(2, 5): sqrt(0.8 * 0.2) = 0.4. Image 1 has no quality, image 2 no answer at all."""

    def handler(request: Request) -> Reply:
        index, is_quality = number(pictures(request)[-1]), len(pictures(request)) == 1
        if index == 2 or (index == 1 and is_quality):
            return as_json(completion("no"))
        return rubric(naturalness=2, artifacts=5) if is_quality else rubric(edit_success=9, restraint=8)

    bench.server.handler = handler
    reward = VIEScore(bench.judge("viescore_sc.v1"), bench.judge("viescore_pq.v1"))
    found = score(reward, numbered(range(3)), [Prompt("edit", tuple(numbered([9])))] * 3)
    np.testing.assert_allclose(found.total, [0.4, NAN, NAN], rtol=1e-6)
    np.testing.assert_allclose(found.components["consistency"], [0.8, 0.8, NAN], rtol=1e-6)
    np.testing.assert_allclose(found.components["quality/artifacts"], [5, NAN, NAN])
    assert found.reasons[1].startswith("quality: expected JSON")
    assert "consistency: expected JSON" in found.reasons[2]
    assert "; quality: " in found.reasons[2]
    with pytest.raises(ValueError, match="expected a judge of single images"):
        VIEScore(bench.judge("viescore_sc.v1"), bench.judge("pairwise_t2i.v1"))


def test_viescore_passes_on_what_its_judges_count_and_read(bench: Bench) -> None:
    bench.server.handler = lambda request: (
        rubric(naturalness=2, artifacts=5) if len(pictures(request)) == 1 else rubric(edit_success=9, restraint=8)
    )
    with JudgeClient(bench.server.url, CLIENT) as other:
        reward = VIEScore(bench.judge("viescore_sc.v1"), VLMJudge(other, "judge", "viescore_pq.v1"))
        read = asyncio.run(reward.warm_up())
        score(reward, numbered(range(2)), [Prompt("edit", tuple(numbered([9])))] * 2)
        counts = reward_statistics(reward)
    assert {name: reading.value for name, reading in read.items()} == {
        f"consistency/{bench.server.url}": pytest.approx(0.8),
        f"quality/{bench.server.url}": pytest.approx(0.2),
    }
    assert (counts["consistency/calls"], counts["quality/calls"]) == (2, 2)
    assert counts["quality/prompt_tokens"] == 14


def leaning(strengths: Sequence[float], bias: float = 0.1) -> Handler:
    """P(A) is 0.5 plus the difference in strength, plus a liking for the first."""

    def handler(request: Request) -> Reply:
        first, second = (strengths[number(image)] for image in pictures(request)[-2:])
        return says({"A": (0.5 + first - second + bias) * 0.8, "B": (0.5 - first + second - bias) * 0.8, "x": 0.2})

    return handler


def test_pairs_become_win_rates_and_a_position_s_bias_cancels(bench: Bench) -> None:
    """Strengths 0, 0.1, 0.3: rates 0.5 + mean difference: (-0.1 - 0.3)/2, (0.1 - 0.2)/2, (0.3 + 0.2)/2."""
    bench.server.handler = leaning([0, 0.1, 0.3])
    judge = bench.judge("pairwise_t2i.v1")
    assert (judge.traits.scope, judge.traits.concurrency) == ("group", 16)
    group = Prompt("a cat")
    found = score(judge, numbered([0, 1, 2]), [group] * 3)
    np.testing.assert_allclose(found.total, [0.3, 0.45, 0.75], rtol=1e-5)
    np.testing.assert_allclose(found.components["label_mass"], 0.8, rtol=1e-6)
    # A bias of 0.1 turns nothing over but the closest pair, whose one order is a tie.
    np.testing.assert_allclose(found.components["order_agreement"], [0.5, 0.5, 1])
    assert len(bench.server.requests) == 6


@pytest.mark.parametrize("template", ["pairwise_edit.v1", "edit_following.v1"])
def test_images_that_requests_share_are_encoded_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    encoded: list[int] = []

    def counting(image: Images, long_side: int) -> str:
        encoded.append(number(image))
        return data_url(image, long_side)

    monkeypatch.setattr("rewards.judges.judge.data_url", counting)
    bench.server.handler = lambda request: says({"A": 0.5, "5": 0.5})
    score(bench.judge(template), numbered(range(5)), [Prompt("edit", tuple(numbered([9])))] * 5)
    assert sorted(encoded) == [0, 1, 2, 3, 4, 9]


def test_groups_are_compared_within_themselves(bench: Bench) -> None:
    bench.server.handler = leaning([0, 0.1, 0.2, 0.3, 0.4])
    one, two, three = Prompt("a"), Prompt("b"), Prompt("c")
    found = score(bench.judge("pairwise_t2i.v1"), numbered(range(5)), [one, one, two, two, three])
    np.testing.assert_allclose(found.total, [0.4, 0.6, 0.4, 0.6, NAN], rtol=1e-5)
    assert found.reasons == {4: "a group of one has no pair to compare"}
    with pytest.raises(ValueError, match="expected one group, all of one prompt"):
        asyncio.run(bench.judge("pairwise_t2i.v1")(numbered(range(2)), [one, two]))


def test_a_lost_pair_is_left_out_of_the_win_rates(bench: Bench) -> None:
    fair = leaning([0, 0.1, 0.3], bias=0)

    def handler(request: Request) -> Reply:
        pair = [number(image) for image in pictures(request)[-2:]]
        return Reply(503) if pair == [1, 2] else fair(request)

    bench.server.handler = handler
    judge = bench.judge("pairwise_t2i.v1", max_missing_pairs=0.5)
    found = score(judge, numbered([0, 1, 2]), [Prompt("a cat")] * 3)
    np.testing.assert_allclose(found.total, [0.3, 0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(found.components["missing_pairs"], [0, 0.5, 0.5])
    found = score(bench.judge("pairwise_t2i.v1"), numbered([0, 1, 2]), [Prompt("a cat")] * 3)
    np.testing.assert_allclose(found.total, [0.3, NAN, NAN], rtol=1e-5)
    assert "status 503" in found.reasons[1]


@pytest.mark.parametrize("max_missing", [0.25, 1.0])
@pytest.mark.parametrize("in_sum", [False, True])
def test_a_group_with_a_lost_pair_is_in_no_cache(
    bench: Bench, tmp_path: Path, max_missing: float, in_sum: bool
) -> None:
    fair = leaning([0, 0.1, 0.3], bias=0)
    is_away = True

    def handler(request: Request) -> Reply:
        pair = [number(image) for image in pictures(request)[-2:]]
        return Reply(503) if is_away and pair == [1, 2] else fair(request)

    bench.server.handler = handler
    judge = bench.judge("pairwise_t2i.v1", max_missing_pairs=max_missing)
    cached = Cached(WeightedSum({"wins": judge}, {"wins": 1.0}) if in_sum else judge, tmp_path / "cache")
    group = [Prompt("a cat")] * 3
    assert np.isnan(score(cached, numbered([0, 1, 2]), group).total).any() == (max_missing < 0.5)
    is_away = False
    for hits in (0, 3):
        found = score(cached, numbered([0, 1, 2]), group)
        np.testing.assert_allclose(found.total, [0.3, 0.45, 0.75], rtol=1e-5)
        assert cached.hits == hits


def test_pairs_of_edits_need_their_source(bench: Bench) -> None:
    bench.server.handler = leaning([0, 0.2], bias=0)
    judge = bench.judge("pairwise_edit.v1")
    found = score(judge, numbered([0, 1]), [Prompt("edit", tuple(numbered([9])))] * 2)
    np.testing.assert_allclose(found.total, [0.3, 0.7], rtol=1e-5)
    assert number(pictures(bench.server.requests[0])[0]) == 9
    lacking = Prompt("edit")
    assert set(score(judge, numbered([0, 1]), [lacking] * 2).reasons) == {0, 1}


def test_a_pairwise_judge_keeps_the_reward_contract(bench: Bench) -> None:
    bench.server.handler = leaning([0, 0.1, 0.2, 0.3])
    one, two = Prompt("a"), Prompt("b")
    check_reward(bench.judge("pairwise_t2i.v1"), numbered(range(4)), [one, one, two, two])


def tokenizer(request: Request) -> Reply:
    """Digits are the ids 15 to 24, with a space 115 to 124; other texts are their letters' codes."""
    text = request.body["prompt"]
    bare = text.strip()
    if len(bare) == 1 and bare.isdigit():
        return as_json({"tokens": [15 + int(bare) + 100 * (text != bare)]})
    return as_json({"tokens": [ord(letter) for letter in text]})


def with_tokenizer(answer: Handler) -> Handler:
    return lambda request: tokenizer(request) if request.path == "/tokenize" else answer(request)


def test_labels_by_their_served_ids(bench: Bench) -> None:
    """Id 19 is 4, id 120 is ' 5': (0.6 * 4 + 0.2 * 5) / 0.8 / 5 = 0.85. A token of another id counts nothing."""
    bench.server.handler = with_tokenizer(
        lambda request: says({"token_id:19": 0.6, "token_id:120": 0.2, "token_id:52": 0.2})
    )
    judge = bench.judge(token_ids=True)
    for _ in range(2):
        assert score(judge, numbered([0]), prompts(1)).total[0] == pytest.approx(0.85)
    asked = [body for body in bench.bodies() if "prompt" in body]
    assert asked[0] == {"model": "judge", "prompt": "0", "add_special_tokens": False}
    assert len(asked) == 12, "two forms of six labels, once"
    assert [body["return_tokens_as_token_ids"] for body in bench.bodies() if "messages" in body] == [True, True]
    assert asyncio.run(judge.check_labels())["4"] == (19, 119)


def test_labels_that_are_no_single_tokens_are_named(bench: Bench) -> None:
    bench.server.handler = with_tokenizer(truth)
    template = parse_template("readout: digits\nlabels: 0 5 10\n---\n{image}", "ten")
    with pytest.raises(
        JudgeConfigurationError, match=r"label '10': expected a single token of judge, got 2: \[49, 48\]"
    ):
        score(bench.judge(template, token_ids=True), numbered([0]), prompts(1))
    with pytest.raises(JudgeConfigurationError, match="choose labels such as 0 to 9 or A to E"):
        asyncio.run(bench.judge(template).check_labels())


def test_two_labels_of_one_token_are_named(bench: Bench) -> None:
    bench.server.handler = lambda request: as_json({"tokens": [3]})
    with pytest.raises(JudgeConfigurationError, match="labels 'A' and 'B': the same token 3"):
        asyncio.run(bench.judge("pairwise_t2i.v1").check_labels())


@pytest.mark.parametrize(
    ("labels", "pair"),
    [
        (" ".join(map(str, range(11))), "'1' and '10'"),
        ("0 5 50", "'5' and '50'"),
        # "1" may be the first token of 12, whatever stands between them.
        ("12 3 1", "'1' and '12'"),
    ],
)
def test_labels_that_begin_with_another_need_ids(bench: Bench, labels: str, pair: str) -> None:
    template = parse_template(f"readout: digits\nlabels: {labels}\n---\n{{image}}", "scale")
    message = rf"labels of scale: expected none that another begins with, got {pair}: .*set token_ids=True \(vLLM\)"
    with pytest.raises(ValueError, match=message):
        bench.judge(template)
    assert bench.judge(template, token_ids=True).settings.token_ids
    # A label that is read as text is read whole.
    assert bench.judge(template, read="answer").settings.read == "answer"


@pytest.mark.parametrize(
    ("labels", "is_refused"), [("Sure SURELY", True), ("A AB", True), ("a Ab", True), ("b Ab", False)]
)
def test_a_beginning_is_one_in_any_case_and_form(bench: Bench, labels: str, is_refused: bool) -> None:
    template = parse_template(f"readout: yes_no\nlabels: {labels}\n---\n{{image}}", "words")
    with pytest.raises(ValueError, match="labels of words") if is_refused else nullcontext():
        bench.judge(template)


def test_warm_up_names_labels_that_are_no_single_tokens_where_the_server_tells(bench: Bench) -> None:
    bench.server.handler = with_tokenizer(lambda request: says({"5": 0.9}))
    template = parse_template("readout: digits\nlabels: 0 5 10\n---\n{image}", "ten")
    with pytest.raises(JudgeConfigurationError, match="label '10': expected a single token of judge, got 2"):
        asyncio.run(bench.judge(template).warm_up())
    assert asyncio.run(bench.judge(template).warm_up(check_tokens=False))[bench.server.url].value == 0.5
    assert asyncio.run(bench.judge().warm_up())[bench.server.url].value == 1.0


@pytest.mark.parametrize(
    "reply",
    [
        as_json({"detail": "Not Found"}, 404),
        as_json({"detail": "not this path"}, 403),
        as_json({"tokens": None}),
        Reply(503),
        Reply(200, b"<html>"),
        Reply(200, sent=0.0),
    ],
)
def test_warm_up_carries_on_where_labels_cannot_be_checked(bench: Bench, reply: Reply) -> None:
    bench.server.handler = lambda request: reply if request.path == "/tokenize" else says({"5": 0.9})
    assert asyncio.run(bench.judge().warm_up())[bench.server.url].value == 1.0
    assert [request.path for request in bench.server.requests].count("/tokenize") == 1


def test_warm_up_asks_for_no_tokens_of_what_has_no_label_probabilities(bench: Bench) -> None:
    bench.server.handler = lambda request: as_json(completion("3"))
    asyncio.run(bench.judge("imgedit.v1").warm_up())
    asyncio.run(bench.judge(read="answer").warm_up())
    assert {request.path for request in bench.server.requests} == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (as_json({"detail": "Not Found"}, 404), "has no /tokenize, as vLLM does; set token_ids=False"),
        (as_json({"tokens": ["4"]}), "expected token ids from /tokenize"),
        (as_json({}), "expected token ids from /tokenize, got None"),
    ],
)
def test_a_server_without_a_tokenizer_is_named(bench: Bench, reply: Reply, message: str) -> None:
    bench.server.handler = lambda request: reply
    with pytest.raises(JudgeConfigurationError, match=message):
        score(bench.judge(token_ids=True), numbered([0]), prompts(1))


def test_ids_that_no_server_tells_mask_the_batch_and_are_asked_for_again(bench: Bench) -> None:
    bench.server.handler = lambda request: Reply(503)
    judge = bench.judge(token_ids=True)
    found = score(judge, numbered([0, 1]), prompts(2))
    assert np.isnan(found.total).all()
    assert "the labels' ids are not known: status 503" in found.reasons[1]
    with pytest.raises(Unavailable):
        asyncio.run(judge.warm_up())
    bench.server.handler = with_tokenizer(lambda request: says({"token_id:20": 1.0}))
    assert score(judge, numbered([0]), prompts(1)).total.tolist() == [1.0]


def test_a_rubric_has_no_labels_to_check(bench: Bench) -> None:
    assert asyncio.run(bench.judge("imgedit.v1").check_labels()) == {}


@pytest.mark.parametrize("template", ["edit_following.v1", "pairwise_edit.v1"])
def test_warm_up_is_one_real_request(bench: Bench, template: str) -> None:
    bench.server.handler = lambda request: says({"3": 0.9} if "following" in template else {"A": 0.45, "B": 0.45})
    found = asyncio.run(bench.judge(template).warm_up())
    assert found[bench.server.url].value == pytest.approx(0.6 if "following" in template else 0.5)
    judged = [request for request in bench.server.requests if request.path != "/tokenize"]
    assert len(judged) == 1
    assert len(pictures(judged[0])) == (2 if "following" in template else 3)


@pytest.mark.parametrize(
    ("template", "count"), [("edit_following.v1", 4), ("pairwise_edit.v1", 5), ("t2i_following.v1", 1)]
)
def test_warm_up_sends_as_many_sources_as_it_is_told(bench: Bench, template: str, count: int) -> None:
    judge = bench.judge(template)
    bench.server.handler = lambda request: says({"3": 0.5, "A": 0.5})
    asyncio.run(judge.warm_up(check_tokens=False, num_sources=3))
    assert [len(pictures(request)) for request in bench.server.requests] == [count]
    assert judge.template.num_pictures(3) == count


def test_warm_up_tells_a_server_that_drops_logprobs(bench: Bench) -> None:
    bench.server.handler = lambda request: as_json(completion("3"))
    with pytest.raises(JudgeConfigurationError, match=r"no logprobs.*set read='answer', or serve the judge with vLLM"):
        asyncio.run(bench.judge().warm_up())
    assert asyncio.run(bench.judge(read="answer").warm_up())[bench.server.url].value == pytest.approx(0.6)


def test_warm_up_of_a_server_that_is_down_says_so(bench: Bench) -> None:
    bench.server.stop()
    found = asyncio.run(bench.judge().warm_up())[bench.server.url]
    assert math.isnan(found.value)
    assert "cannot connect" in found.reason


def test_the_fingerprint_is_what_the_answers_depend_on(bench: Bench) -> None:
    base = bench.judge().traits.fingerprint
    assert bench.judge().traits.fingerprint == base
    template = parse_template("readout: digits\n---\n{image}", "t2i_following.v1")
    others = [
        bench.judge("edit_following.v1"),
        bench.judge(template),
        bench.judge(temperature=0.5),
        bench.judge(long_side=512),
        bench.judge(read="answer"),
        bench.judge(extra={"seed": 1}),
        VLMJudge(bench.client, "other", "t2i_following.v1"),
    ]
    assert len({base, *(judge.traits.fingerprint for judge in others)}) == 8
    assert bench.judge().template.sha256 in base
    assert bench.server.url not in base


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        ("imgedit.v1", {"token_ids": True}, "token_ids: only for label probabilities, got the readout rubric"),
        ("yes_no.v1", {"token_ids": True, "read": "answer"}, "token_ids: only for label probabilities"),
        ("t2i_following.v1", {"top_logprobs": 5}, "top_logprobs: expected 6 or more"),
        ("t2i_folowing", {}, "the nearest is 't2i_following.v1'"),
    ],
)
def test_judges_that_cannot_be_are_refused(bench: Bench, template: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.judge(template, **settings)
    with pytest.raises(ValueError, match="model: expected the name"):
        VLMJudge(bench.client, " ", "yes_no.v1")


def test_a_slow_image_in_a_hundred_is_waited_for_and_nothing_else_is(bench: Bench) -> None:
    def handler(request: Request) -> Reply:
        reply = truth(request)
        return Reply(reply.status, reply.body, seconds=1.0 if number(pictures(request)[-1]) % 100 == 50 else 0.0)

    bench.server.handler = handler
    start = time.monotonic()
    found = score(bench.judge(), numbered(range(200)), prompts(200))
    assert time.monotonic() - start < 20
    np.testing.assert_allclose(found.total, [expected(index) for index in range(200)], rtol=1e-6)
    assert bench.client.statistics().p50_seconds < 0.5


def test_several_judges_and_threads_share_a_client(bench: Bench) -> None:
    """As where two tasks are scored while the next chunk is drawn."""

    async def both() -> list[Scores]:
        calls = [
            asyncio.to_thread(score, bench.judge(), numbered(range(start, start + 20)), prompts(20))
            for start in (0, 20)
        ]
        return list(await asyncio.gather(*calls))

    found = asyncio.run(both())
    totals = np.concatenate([part.total for part in found])
    np.testing.assert_allclose(totals, [expected(index) for index in range(40)], rtol=1e-6)
    assert bench.server.connections <= CLIENT.max_in_flight


CHAOS: list[Callable[[Reply], Reply]] = [
    lambda good: Reply(429, b"", {"Retry-After": "0.01"}),
    lambda good: Reply(500, b"oops"),
    lambda good: Reply(200, good.body, sent=0.5),
    lambda good: Reply(200, b'{"choices": ['),
    lambda good: Reply(200, b"<html></html>"),
    lambda good: Reply(200, good.body, sent=0.0),
    lambda good: Reply(503, b""),
]


@pytest.mark.timeout(280)
def test_ten_thousand_calls_with_a_fifth_of_faults_lose_and_invent_nothing(bench: Bench) -> None:
    """Every call that gets through tells its own image's truth; three images are beyond help and stay NaN."""
    generator = np.random.default_rng(0)
    hopeless = {1234, 5678, 9999}

    def handler(request: Request) -> Reply:
        index = number(pictures(request)[-1])
        if index not in hopeless and generator.random() >= 0.2:
            return truth(request)
        return CHAOS[int(generator.integers(len(CHAOS)))](truth(request))

    bench.server.handler = handler
    count = 10_000
    # 0.2^20 for 10 000 calls: a call that runs out of attempts would be one run in 10^10.
    retry = Retry(attempts=20, first_wait=0.001, longest_wait=0.01)
    settings = ClientSettings(max_in_flight=16, rest_seconds=0.1, retry=retry, batch_seconds=270, call_seconds=60)
    with JudgeClient(bench.server.url, settings) as client:
        judge = VLMJudge(client, "judge", "t2i_following.v1")
        found = score(judge, numbered(range(count), side=2), [Prompt("x")] * count)
        statistics = client.statistics()
    truths = np.array([NAN if index in hopeless else expected(index) for index in range(count)])
    np.testing.assert_allclose(found.total, truths, rtol=1e-6)
    assert set(found.reasons) == hopeless
    assert (statistics.calls, sum(statistics.failures.values())) == (count, 3)
    assert 2000 < statistics.retries < 3000
    assert sum(statistics.faults.values()) == statistics.retries + 3
    assert {"status_429", "status_500", "status_503", "garbage", "connection"} == set(statistics.faults)
