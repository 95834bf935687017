import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cli import main
from rewards.cache import Cached
from rewards.compose import WeightedSum
from rewards.judges.check import (
    TEMPLATES,
    check_readout,
    judges_of,
    measure,
    pictures,
    served_model,
    summed,
    try_out,
)
from rewards.judges.client import JudgeClient
from rewards.judges.counters import Counters
from rewards.judges.judge import VLMJudge
from rewards.judges.settings import ClientSettings, JudgeSettings
from rewards.judges.viescore import VIEScore
from rewards.pixel import redness
from rewards.questions import QuestionGraph
from tests.rewards.judges.fake_server import FakeServer, Reply, Request, as_json, completion
from tests.rewards.judges.fake_server import pictures as shown

ANSWERS = {"0 1 2 3 4 5": {"4": 0.8, "x": 0.2}, "yes no": {"yes": 0.6, "no": 0.3}, "A B": {"A": 0.7, "B": 0.2}}
RUBRIC = '{"reasoning": "a\tb", "edit_success": 3, "restraint": 4}'


def answer(request: Request) -> Reply:
    """A server that can do everything, as vLLM can."""
    if request.path.endswith("/models"):
        return as_json({"data": [{"id": "judge"}, {"id": "other"}]})
    if request.path == "/tokenize":
        return as_json({"tokens": [100 + ord(request.body["prompt"].strip()[0])]})
    if "response_format" in request.body:
        return as_json(completion(RUBRIC))
    text = json.dumps(request.body["messages"])
    labels = "yes no" if "yes or no" in text else "A B" if "A or B" in text else "0 1 2 3 4 5"
    tokens: Mapping[str, float] = ANSWERS[labels]
    if request.body.get("return_tokens_as_token_ids"):
        tokens = {f"token_id:{100 + ord(token[0])}": p for token, p in tokens.items()}
    body = completion(tokens=tokens)
    body["usage"]["prompt_tokens_details"] = {"cached_tokens": 5}
    return as_json(body)


def without(path: str = "", field: str = "") -> Callable[[Request], Reply]:
    """The same server without a path, or one that refuses requests with a field."""

    def handler(request: Request) -> Reply:
        if path and request.path == path:
            return as_json({"detail": "Not Found"}, status=404)
        if field and request.body and field in request.body:
            return as_json({"error": {"message": f"no {field} here"}}, status=400)
        return answer(request)

    return handler


def report(handler: Callable[[Request], Reply], readout: str, **settings: Any) -> Any:
    with FakeServer(handler) as server, JudgeClient(server.url) as client:
        return check_readout(client, "judge", readout, JudgeSettings(**settings), pictures(3, 16, 0))


@pytest.mark.parametrize(("readout", "mass"), [("digits", 0.8), ("yes_no", 0.9), ("pairwise", 0.9)])
def test_label_readouts(readout: str, mass: float) -> None:
    found = report(answer, readout)
    assert found.works
    assert found.label_mass == pytest.approx(mass)
    assert (found.labels, found.reason) == ("by id", "")


def test_a_rubric_with_a_bare_tab() -> None:
    found = report(answer, "rubric")
    assert found.works
    assert math.isnan(found.label_mass)
    assert found.labels == ""


def test_a_server_without_tokenize_is_read_by_text() -> None:
    found = report(without(path="/tokenize"), "digits")
    assert found.works
    assert found.labels == "by text"


def test_what_a_server_refuses_is_in_the_report() -> None:
    found = report(without(field="response_format"), "rubric")
    assert not found.works
    assert found.available == 0
    assert "no response_format here" in found.reason
    assert report(answer, "digits").works


def test_a_low_label_mass_is_in_the_report() -> None:
    found = report(answer, "digits", min_label_mass=0.9)
    assert not found.works
    assert found.label_mass == pytest.approx(0.8)
    assert "label mass" in found.reason


def test_load_keeps_so_many_in_flight() -> None:
    with FakeServer(lambda request: Reply(200, answer(request).body, seconds=0.02)) as server:
        load = measure(server.url, "judge", ClientSettings(max_in_flight=4), JudgeSettings(), pictures(24, 16, 1))
        assert server.busiest == 4
        sources = {shown(request)[0].tobytes() for request in server.requests}
        images = {shown(request)[1].tobytes() for request in server.requests}
    assert (load.concurrency, load.statistics.calls, load.statistics.failures) == (4, 24, {})
    assert 0 < load.calls_per_second <= 200
    # Groups of eight share a source; no image is seen twice.
    assert (len(sources), len(images)) == (3, 24)


def test_the_model_is_the_first_or_the_one_that_is_named() -> None:
    with FakeServer(answer) as server, JudgeClient(server.url) as client:
        assert served_model(client) == "judge"
        assert served_model(client, "other") == "other"
        with pytest.raises(ValueError, match="the nearest is 'other'"):
            served_model(client, "othr")


@pytest.mark.parametrize(
    ("handler", "part"),
    [
        (lambda request: as_json({"data": []}), "without any"),
        (lambda request: as_json({"detail": "Not Found"}, status=404), "ends in /v1"),
        (lambda request: as_json({"error": "no key"}, status=401), "set api_key"),
        (lambda request: Reply(200, b"<html>"), "expected JSON"),
    ],
    ids=["no model", "another path", "no key", "no json"],
)
def test_a_server_that_is_no_judge_is_one_line(
    handler: Callable[[Request], Reply], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(handler) as server:
        assert main(["judge", "check", server.url]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert part in captured.err


def test_the_command_reports_readouts_load_and_counters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDTR_JUDGE_KEY", "secret")
    with FakeServer(without(field="response_format")) as server:
        assert main(["judge", "check", server.url, "--calls", "8", "--concurrencies", "1", "2", "--side", "16"]) == 0
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer secret"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"judge at {server.url}"
    assert [line.split()[0] for line in lines[1:5]] == list(TEMPLATES)
    assert lines[1] == "digits    works: label mass 0.800; labels by id"
    assert lines[3].startswith("rubric    does not work: ")
    assert [line.split()[0] for line in lines[6:8]] == ["1", "2"]
    # Four images by digits, four by yes and no, twelve pairs, two times eight for load; refused ones have no answer.
    assert "cached_tokens 180" in lines[-1], lines[-1]
    assert "failures/status_400 4" in lines[-1]


def test_the_judges_of_a_reward_are_found_within_it(tmp_path: Path) -> None:
    with JudgeClient("http://127.0.0.1:9/v1") as client:
        consistency, quality, questions = (
            VLMJudge(client, "judge", name) for name in ("viescore_sc.v1", "viescore_pq.v1", "yes_no.v1")
        )
        both = VIEScore(consistency, quality)
        parts = WeightedSum(
            {"edit": both, "red": redness}, {"edit": 1.0, "red": 1.0}, {"asked": QuestionGraph(questions)}
        )
        assert judges_of(Cached(both, tmp_path / "cache")) == judges_of(both) == [consistency, quality]
        assert judges_of(parts) == [consistency, quality, questions]
        assert judges_of(redness) == []


def test_a_judge_is_tried_with_as_many_sources_as_it_will_be_sent() -> None:
    """A server of three pictures a request, as ``pdtr judge serve`` starts one."""

    def handler(request: Request) -> Reply:
        if len(shown(request)) > 3:
            return as_json({"error": {"message": "At most 3 image(s) may be provided in one prompt."}}, status=400)
        return answer(request)

    with FakeServer(handler) as server, JudgeClient(server.url) as client:
        judge, pairs = (VLMJudge(client, "judge", name) for name in ("edit_following.v1", "pairwise_edit.v1"))
        try_out(judge)
        try_out(judge, num_sources=2)
        try_out(pairs)
        for refused, count in ((judge, 3), (pairs, 2)):
            with pytest.raises(ValueError, match=r"At most 3 image.*have 4 pictures with .*--max-images 4") as raised:
                try_out(refused, count)
            assert f"with {count} source images" in str(raised.value)
    with (
        pytest.raises(ValueError, match=r"expected judge to judge by edit_following.v1 with 2 source images, got none"),
        JudgeClient(server.url) as client,
    ):
        try_out(VLMJudge(client, "judge", "edit_following.v1"), 2)


def test_counters_of_several_clients_add_up() -> None:
    first, second = Counters(), Counters()
    details = {"prompt_tokens": 10, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 8}}
    first.answered(0.1, 1, {"usage": details})
    second.answered(0.1, 3, {"usage": {"prompt_tokens": 10, "prompt_tokens_details": None}})
    second.answered(0.1, 1, {"usage": "none"})
    second.failed("timeout", 2)
    total = summed([first.snapshot(), second.snapshot()])
    expected = {"calls": 4, "retries": 3, "prompt_tokens": 20, "completion_tokens": 1, "cached_tokens": 8}
    assert total == {**expected, "failures/timeout": 1}


def test_pictures_differ_and_have_their_size() -> None:
    made = pictures(3, 20, 0)
    assert (made.shape, made.dtype) == ((3, 20, 20, 3), np.uint8)
    assert (made[0, :8, :8] == made[0, 0, 0]).all()
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made, pictures(3, 20, 1))
