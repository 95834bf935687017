"""The client's rules without a network: what is tried again and when, which server is next, what is counted."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest

from rewards.judges.counters import Counters, percentile
from rewards.judges.faults import (
    Fault,
    JudgeConfigurationError,
    check_completion,
    check_status,
    excerpt,
    parse_object,
    retry_after_seconds,
)
from rewards.judges.servers import Server, asked_wait, checked_urls, choose
from rewards.judges.settings import ClientSettings, JudgeSettings, Retry
from rewards.judges.transport import located

NOW = datetime(2026, 7, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("3", 3),
        (" 0.5 ", 0.5),
        ("-1", 0),
        ("inf", 0),
        ("nan", 0),
        ("soon", 0),
        ("Wed, 01 Jul 2026 12:00:10 GMT", 10),
        ("Wed, 01 Jul 2026 12:00:10 -0000", 10),
        ("Wed, 01 Jul 2026 11:00:00 GMT", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float) -> None:
    assert retry_after_seconds(header, NOW) == seconds


def test_waits_double_up_to_the_longest_with_a_jitter_of_a_half() -> None:
    retry = Retry(first_wait=1, longest_wait=8)
    for attempt, most in enumerate([1, 2, 4, 8, 8, 8]):
        waits = [retry.wait(call, attempt) for call in range(200)]
        assert most / 2 <= min(waits) < most * 0.55
        assert most * 0.95 < max(waits) < most
    assert retry.wait(1, 10**6) < 8


def test_the_jitter_is_seeded_and_retry_after_is_a_lower_bound() -> None:
    assert Retry(seed=1).wait(3, 2) == Retry(seed=1).wait(3, 2)
    assert len({Retry(seed=seed).wait(call, 2) for seed in range(3) for call in range(3)}) == 9
    assert Retry().wait(0, 0, retry_after=30) == 30
    assert Retry().wait(0, 0, retry_after=0.01) >= 0.25


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_what_is_tried_again(status: int) -> None:
    with pytest.raises(Fault, match=f"status {status}") as caught:
        check_status(status, 2.0, b"busy", "http://judge")
    assert (caught.value.kind, caught.value.retry_after) == (f"status_{status}", 2.0)


@pytest.mark.parametrize("status", [201, 301, 400, 401, 403, 404, 405, 409, 413, 415, 422])
def test_what_is_a_mistake_in_the_configuration(status: int) -> None:
    with pytest.raises(JudgeConfigurationError, match=f"expected status 200 from http://judge, got {status}") as caught:
        check_status(status, 0, b'{"error": {"message": "no such thing"}}', "http://judge")
    assert "no such thing" in str(caught.value)
    assert caught.value.status == status


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"choices": [', b"\xff", b"[]", b"null", b"[" * 100_000])
def test_a_body_that_is_no_object_is_a_fault(body: bytes) -> None:
    with pytest.raises(Fault) as caught:
        parse_object(body, "http://judge")
    assert caught.value.kind == "garbage"
    assert len(str(caught.value)) < 500


def test_an_object_that_is_no_completion_is_a_fault() -> None:
    check_completion({"choices": [{}]}, "http://judge")
    answers: list[dict[str, Any]] = [{}, {"choices": []}, {"choices": {}}, {"choices": ["text"]}]
    for answer in answers:
        with pytest.raises(Fault, match="expected a chat completion"):
            check_completion(answer, "http://judge")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "bad model", "code": 404}}', "'bad model'"),
        (b'{"error": "bad model"}', "'bad model'"),
        (b'{"message": "bad model", "object": "error"}', "'bad model'"),
        (b"plain", "'plain'"),
        (b'["x"]', "'[\"x\"]'"),
    ],
)
def test_what_a_server_said(body: bytes, text: str) -> None:
    assert excerpt(body) == text


def test_the_least_busy_server_is_next() -> None:
    one, two, three = (Server(name) for name in ("one", "two", "three"))
    servers = [one, two, three]
    assert choose(servers, 0.0) is one
    one.started(0)
    assert choose(servers, 0.0) is two
    two.started(0)
    two.ended()
    # Of two that are idle, the one that has done less.
    assert choose(servers, 0.0) is three
    assert choose(servers, 0.0, avoid=three) is two
    assert choose([one], 0.0, avoid=one) is one


def test_an_unreachable_server_rests_and_comes_back_by_one_call_a_rest() -> None:
    one, two = Server("one"), Server("two")
    one.unreachable(5.0)
    assert choose([one, two], 4.9) is two
    assert choose([one], 4.9) is None
    assert choose([one], 5.0) is one
    one.started(10.0)
    assert choose([one], 6.0) is None
    one.reached()
    assert choose([one], 6.0) is one
    one.started(11.0)
    assert choose([one], 6.0) is one


def test_a_server_that_asks_to_wait_is_left_alone_while_there_is_another() -> None:
    one, two = Server("one"), Server("two")
    one.asked_to_wait(5.0)
    # A call that was under way before is answered: the server asks for the same time still.
    one.reached()
    assert choose([one, two], 4.9, avoid=two) is two
    assert choose([one, two], 5.0, avoid=two) is one
    assert choose([one], 4.9) is one
    assert (asked_wait([one, two], 2.0), asked_wait([one], 2.0), asked_wait([one], 6.0)) == (0.0, 3.0, 0.0)
    # The other one cannot be reached: it or the end of the wait, whichever comes first.
    two.unreachable(3.0)
    assert choose([one, two], 2.9) is None
    assert choose([one, two], 3.0) is two
    two.reached()
    two.asked_to_wait(9.0)
    assert asked_wait([one, two], 2.0) == 3.0
    assert choose([one, two], 2.0, avoid=one) is two


def test_urls() -> None:
    assert checked_urls("http://a:1/v1/") == ("http://a:1/v1",)
    assert located("http://a:1/v1", "/chat/completions") == "http://a:1/v1/chat/completions"
    assert located("http://a:1/v1", "//tokenize") == "http://a:1/tokenize"
    assert located("http://a:1", "//tokenize") == "http://a:1/tokenize"


@pytest.mark.parametrize(
    "urls", [[], "", "a:8000", "ftp://a/v1", "http://", ["http://a/v1", "http://a/v1/"], "http://a?x"]
)
def test_urls_that_are_none_are_refused(urls: Any) -> None:
    with pytest.raises(ValueError, match="base_urls: expected"):
        checked_urls(urls)


def test_percentiles_by_hand() -> None:
    values = [float(value) for value in range(1, 21)]
    assert percentile(values, 0.5) == 10
    assert percentile(values, 0.95) == 19
    assert percentile([3.0], 0.95) == 3
    assert math.isnan(percentile([], 0.5))


def test_counts() -> None:
    counters = Counters()
    counters.fault("status_429")
    counters.answered(0.5, 2, {"usage": {"prompt_tokens": 7, "completion_tokens": 1}})
    counters.answered(1.5, 1, {"usage": None})
    counters.failed("timeout", 3)
    counters.failed("deadline", 0)
    found = counters.snapshot()
    assert (found.calls, found.retries, found.prompt_tokens, found.completion_tokens) == (4, 3, 7, 1)
    assert found.faults == {"status_429": 1}
    assert found.failures == {"timeout": 1, "deadline": 1}
    assert (found.p50_seconds, found.p95_seconds) == (0.5, 1.5)
    assert found.metrics()["failures/timeout"] == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"max_in_flight": 0},
        {"attempt_seconds": 0},
        {"call_seconds": -1},
        {"batch_seconds": math.nan},
        {"rest_seconds": math.inf},
        {"max_answer_bytes": 0},
    ],
)
def test_client_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected a positive number"):
        ClientSettings(**settings)


@pytest.mark.parametrize(
    "settings", [{"attempts": 0}, {"first_wait": -1}, {"first_wait": 11}, {"longest_wait": math.inf}]
)
def test_retries_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Retry(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"long_side": 0}, "long_side: expected 1 or more"),
        ({"top_logprobs": 0}, "top_logprobs"),
        ({"group_concurrency": 0}, "group_concurrency"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"min_label_mass": 1.1}, "min_label_mass"),
        ({"max_missing_pairs": -0.1}, r"max_missing_pairs: expected a number in \[0, 1\], got -0.1"),
        ({"read": "logits"}, "read: expected 'probabilities' or 'answer', got 'logits'"),
        ({"extra": {"model": "x"}}, "extra: model: set by the judge itself"),
        ({"extra": {"chat_template_kwargs": {}}, "disable_thinking": True}, "extra: chat_template_kwargs"),
        ({"extra": {"seed": object()}}, "extra: expected JSON"),
    ],
)
def test_judge_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeSettings(**settings)


def test_a_key_is_shown_nowhere() -> None:
    assert "secret" not in repr(ClientSettings(api_key="secret"))
    with pytest.raises(ValueError, match="api_key: expected ASCII") as caught:
        ClientSettings(api_key="secret\n")
    assert "secret" not in str(caught.value)
