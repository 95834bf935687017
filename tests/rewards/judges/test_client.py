"""The client against a real server that misbehaves on purpose: every call ends in an answer or in a reason."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rewards.judges.calls import Outcome
from rewards.judges.client import JudgeClient
from rewards.judges.faults import Fault, JudgeConfigurationError
from rewards.judges.settings import ClientSettings, Retry
from tests.rewards.judges.fake_server import FOREVER, FakeServer, Handler, Reply, Request, as_json, completion

GOOD = as_json(completion("4"))
QUICK = {
    "attempt_seconds": 5.0,
    "call_seconds": 20.0,
    "batch_seconds": 30.0,
    "rest_seconds": 0.2,
    "retry": Retry(attempts=6, first_wait=0.01, longest_wait=0.05),
}


def settings(**changes: Any) -> ClientSettings:
    return ClientSettings(**{**QUICK, **changes})


def body(index: int = 0) -> Mapping[str, Any]:
    return {"model": "judge", "messages": [], "index": index}


def ask(client: JudgeClient, count: int = 1) -> list[Outcome]:
    return asyncio.run(client.ask([partial(body, index) for index in range(count)]))


def first_then(*replies: Reply) -> Handler:
    """These replies, one a request, and good ones ever after."""
    left: Iterator[Reply] = iter(replies)
    return lambda request: next(left, GOOD)


@pytest.fixture
def serve() -> Iterator[Callable[[Handler], FakeServer]]:
    servers: list[FakeServer] = []

    def start(handler: Handler) -> FakeServer:
        servers.append(FakeServer(handler))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


Serve = Callable[[Handler], FakeServer]


def test_an_answer_comes_back_with_who_gave_it(serve: Serve) -> None:
    server = serve(lambda request: as_json({**completion("4"), "index": request.body["index"]}))
    with JudgeClient(server.url, settings(api_key="secret")) as client:
        outcomes = ask(client, 5)
        found = client.statistics()
    assert [outcome.answer["index"] for outcome in outcomes if outcome.answer] == [0, 1, 2, 3, 4]
    assert {outcome.url for outcome in outcomes} == {server.url}
    assert server.requests[0].path == "/v1/chat/completions"
    assert server.requests[0].headers["authorization"] == "Bearer secret"
    assert (found.calls, found.retries, found.prompt_tokens, found.completion_tokens) == (5, 0, 35, 5)
    assert 0 < found.p50_seconds <= found.p95_seconds < 5


FAULTS = {
    "status_429": Reply(429, b"slow down"),
    "status_500": Reply(500, b'{"error": {"message": "CUDA out of memory"}}'),
    "status_503": Reply(503, b""),
    "status_408": Reply(408, b""),
    "garbage": Reply(200, b"<html>gateway</html>"),
    "garbage in UTF-8": Reply(200, b"\xff\xfe"),
    "garbage that says it is packed": Reply(200, b"{}", headers={"Content-Encoding": "gzip"}),
    "garbage object": as_json({"detail": "starting"}),
    "connection": Reply(200, GOOD.body, sent=0.5),
    "connection at once": Reply(200, GOOD.body, sent=0.0),
    "timeout": Reply(200, GOOD.body, seconds=FOREVER),
    "too_large": Reply(200, json.dumps({**completion("4"), "more": "x" * 20_000}).encode()),
}


@pytest.mark.parametrize("kind", list(FAULTS))
def test_a_fault_is_tried_again_and_counted(serve: Serve, kind: str) -> None:
    server = serve(first_then(FAULTS[kind], FAULTS[kind]))
    # Long enough for a busy machine; the one fault that lasts has to end.
    seconds = 1.0 if kind == "timeout" else 5.0
    with JudgeClient(server.url, settings(attempt_seconds=seconds, max_answer_bytes=10_000)) as client:
        outcome = ask(client)[0]
        found = client.statistics()
    assert outcome.answer is not None
    assert (outcome.reason, outcome.attempts) == ("", 3)
    assert found.faults == {kind.split(" ")[0]: 2}
    assert (found.calls, found.retries, found.failures) == (1, 2, {})


def test_a_fault_that_stays_ends_in_a_reason(serve: Serve) -> None:
    server = serve(lambda request: FAULTS["status_500"])
    with JudgeClient(server.url, settings()) as client:
        outcome = ask(client)[0]
        found = client.statistics()
    assert outcome.answer is None
    assert outcome.reason.startswith("no answer in 6 attempts; last fault: status 500 from http://127.0.0.1")
    assert "CUDA out of memory" in outcome.reason
    assert len(server.requests) == 6
    assert found.failures == {"status_500": 1}


def test_retry_after_is_waited_for(serve: Serve) -> None:
    server = serve(first_then(Reply(429, b"", {"Retry-After": "0.6"})))
    with JudgeClient(server.url, settings()) as client:
        start = time.monotonic()
        assert ask(client)[0].answer is not None
    assert time.monotonic() - start >= 0.6


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(serve: Serve) -> None:
    server = serve(lambda request: Reply(429, b"", {"Retry-After": "3600"}))
    with JudgeClient(server.url, settings()) as client:
        start = time.monotonic()
        outcome = ask(client)[0]
    assert time.monotonic() - start < 5
    assert outcome.reason.startswith("no answer in 1 attempts; last fault: status 429")


BUSY = Reply(429, b"", {"Retry-After": "60"})


def test_a_server_that_asks_to_wait_leaves_its_calls_to_another(serve: Serve) -> None:
    busy, good = serve(lambda request: BUSY), serve(lambda request: GOOD)
    with JudgeClient([busy.url, good.url], settings(max_in_flight=4)) as client:
        start = time.monotonic()
        outcomes = [outcome for _ in range(3) for outcome in ask(client, 8)]
        assert time.monotonic() - start < 10
    assert all(outcome.answer for outcome in outcomes)
    # Those that were under way when it first said so.
    assert 1 <= len(busy.requests) <= 4


def test_a_server_is_asked_again_when_the_time_that_it_asked_for_is_over(serve: Serve) -> None:
    busy, good = serve(first_then(Reply(429, b"", {"Retry-After": "0.6"}))), serve(lambda request: GOOD)
    with JudgeClient([busy.url, good.url], settings(max_in_flight=1)) as client:
        ask(client, 6)
        assert len(busy.requests) == 1
        time.sleep(0.7)
        ask(client, 6)
    assert len(busy.requests) >= 4


def test_the_shortest_of_all_servers_waits_is_waited_for(serve: Serve) -> None:
    long, short = serve(lambda request: BUSY), serve(first_then(Reply(503, b"", {"Retry-After": "0.6"})))
    with JudgeClient([long.url, short.url], settings()) as client:
        start = time.monotonic()
        outcome = ask(client)[0]
        assert 0.5 <= time.monotonic() - start < 10
    assert (outcome.url, outcome.attempts) == (short.url, 3)


@pytest.mark.parametrize("status", [400, 401, 403, 413, 422, 302])
def test_a_mistake_in_the_configuration_ends_the_batch_at_once(serve: Serve, status: int) -> None:
    refusal = Reply(status, b'{"error": {"message": "max_logprobs is 5"}}')
    server = serve(lambda request: refusal if request.body["index"] == 3 else Reply(200, b"", seconds=FOREVER))
    with JudgeClient(server.url, settings()) as client:
        start = time.monotonic()
        with pytest.raises(JudgeConfigurationError, match=f"got {status}: 'max_logprobs is 5'"):
            ask(client, 8)
    assert time.monotonic() - start < 4
    assert len([request for request in server.requests if request.body["index"] == 3]) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_alone_is_a_reason(serve: Serve, status: int) -> None:
    refusal = Reply(status, b'{"error": {"message": "the prompt is too long"}}')
    server = serve(lambda request: refusal if request.body["index"] == 3 else GOOD)
    with JudgeClient(server.url, settings()) as client:
        assert all(outcome.answer for outcome in ask(client, 3))
        outcomes = ask(client, 5)
        assert [outcome.answer is None for outcome in outcomes] == [False, False, False, True, False]
        assert "the prompt is too long" in outcomes[3].reason
        assert client.statistics().failures == {f"status_{status}": 1}
    assert len([request for request in server.requests if request.body["index"] == 3]) == 1


def test_a_request_that_is_refused_alone_after_a_warm_up_is_a_reason(serve: Serve) -> None:
    server = serve(lambda request: Reply(413, b"too long") if request.body["index"] == 3 else GOOD)
    with JudgeClient(server.url, settings()) as client:
        asyncio.run(client.warm_up(body()))
        outcome = asyncio.run(client.ask([partial(body, 3)]))[0]
    assert "too long" in outcome.reason


def test_an_answer_of_another_path_says_nothing_of_completions(serve: Serve) -> None:
    server = serve(lambda request: as_json({}) if request.path == "/tokenize" else Reply(400, b"no images here"))
    with JudgeClient(server.url, settings()) as client:
        asyncio.run(client.ask_path("//tokenize", {}))
        with pytest.raises(JudgeConfigurationError, match="no images here"):
            ask(client)


@pytest.mark.parametrize("status", [401, 404])
def test_a_key_or_a_model_is_never_about_one_request(serve: Serve, status: int) -> None:
    server = serve(lambda request: Reply(status, b"{}") if request.body["index"] == 3 else GOOD)
    with JudgeClient(server.url, settings()) as client:
        ask(client, 3)
        with pytest.raises(JudgeConfigurationError):
            ask(client, 5)


def unknown_model(request: Request) -> Reply:
    if request.path == "/v1/models":
        return as_json({"data": [{"id": "Qwen/Qwen2.5-VL-7B-Instruct"}, {"id": "other"}]})
    return as_json({"error": {"message": f"The model `{request.body['model']}` does not exist."}}, 404)


def test_a_model_that_is_not_served_is_answered_with_the_nearest(serve: Serve) -> None:
    server = serve(unknown_model)
    ask_for = lambda: {"model": "Qwen2.5-VL-7B"}  # noqa: E731 - a body is a function.
    with JudgeClient(server.url, settings()) as client, pytest.raises(JudgeConfigurationError) as caught:
        asyncio.run(client.ask([ask_for]))
    assert "does not exist" in str(caught.value)
    assert "check the model's name and the base URL" in str(caught.value)
    assert "the nearest to 'Qwen2.5-VL-7B' is 'Qwen/Qwen2.5-VL-7B-Instruct'" in str(caught.value)


def test_a_wrong_path_without_a_list_of_models_is_still_named(serve: Serve) -> None:
    server = serve(lambda request: as_json({"detail": "Not Found"}, 404))
    with JudgeClient(server.url, settings()) as client, pytest.raises(JudgeConfigurationError, match="ends in /v1"):
        ask(client)


def test_connections_are_reused_over_batches_and_event_loops(serve: Serve) -> None:
    server = serve(lambda request: GOOD)
    with JudgeClient(server.url, settings(max_in_flight=3)) as client:
        for _ in range(5):
            assert all(outcome.answer for outcome in ask(client, 6))
    assert len(server.requests) == 30
    assert server.connections <= 3


def test_no_more_calls_in_flight_than_allowed_and_as_many(serve: Serve) -> None:
    server = serve(lambda request: Reply(200, GOOD.body, seconds=0.02))
    with JudgeClient(server.url, settings(max_in_flight=4)) as client:
        ask(client, 24)
    assert server.busiest == 4


def test_bodies_are_made_when_their_turn_comes(serve: Serve) -> None:
    made = 0

    def make() -> Mapping[str, Any]:
        nonlocal made
        made += 1
        return body()

    server = serve(lambda request: Reply(200, GOOD.body, seconds=FOREVER))
    with JudgeClient(server.url, settings(max_in_flight=2, batch_seconds=1.0)) as client:
        asyncio.run(client.ask([make] * 10))
    # Two in flight, and as many lie ready for when they have been answered.
    assert made == 4


def test_a_defect_of_a_body_is_the_caller_s_own_error(serve: Serve) -> None:
    def fails() -> Mapping[str, Any]:
        raise LookupError("no such picture")

    server = serve(lambda request: GOOD)
    with JudgeClient(server.url, settings()) as client, pytest.raises(LookupError, match="no such picture"):
        asyncio.run(client.ask([body, fails]))


def test_the_deadline_of_a_call(serve: Serve) -> None:
    server = serve(lambda request: Reply(200, GOOD.body, seconds=FOREVER if request.body["index"] == 1 else 0))
    with JudgeClient(server.url, settings(attempt_seconds=0.8, call_seconds=2.0)) as client:
        outcomes = ask(client, 3)
        found = client.statistics()
    assert [outcome.answer is None for outcome in outcomes] == [False, True, False]
    assert "last fault: no whole answer" in outcomes[1].reason
    assert found.failures == {"timeout": 1}


def test_the_deadline_of_a_batch_bounds_the_wait_for_a_turn(serve: Serve) -> None:
    server = serve(lambda request: Reply(200, GOOD.body, seconds=FOREVER))
    with JudgeClient(server.url, settings(max_in_flight=2, batch_seconds=0.5)) as client:
        start = time.monotonic()
        outcomes = ask(client, 6)
        assert time.monotonic() - start < 3
        assert {outcome.reason for outcome in outcomes} == {"the batch's 0.5 s are over"}
        assert client.statistics().failures == {"deadline": 6}
        server.handler = lambda request: GOOD
        assert all(outcome.answer for outcome in ask(client, 6)), "the next batch is not held up by the last"


def test_an_answer_that_trickles_is_cut_off_by_its_time(serve: Serve) -> None:
    """The server says that more will come and keeps the connection open: no single read takes long."""
    server = serve(first_then(Reply(200, GOOD.body, {"Content-Length": str(len(GOOD.body) + 1)})))
    with JudgeClient(server.url, settings(attempt_seconds=1.0)) as client:
        assert ask(client)[0].attempts == 2
        assert client.statistics().faults == {"timeout": 1}


def test_calls_are_shared_out_evenly(serve: Serve) -> None:
    servers = [serve(lambda request: Reply(200, GOOD.body, seconds=0.005)) for _ in range(3)]
    with JudgeClient([server.url for server in servers], settings(max_in_flight=6)) as client:
        assert all(outcome.answer for outcome in ask(client, 60))
    assert all(15 <= len(server.requests) <= 25 for server in servers)


def test_a_slow_server_gets_less(serve: Serve) -> None:
    slow = serve(lambda request: Reply(200, GOOD.body, seconds=0.2))
    fast = serve(lambda request: Reply(200, GOOD.body, seconds=0.005))
    with JudgeClient([slow.url, fast.url], settings(max_in_flight=4)) as client:
        assert all(outcome.answer for outcome in ask(client, 60))
    assert len(fast.requests) > 3 * len(slow.requests)


def test_a_failed_attempt_goes_to_another_server(serve: Serve) -> None:
    bad, good = serve(lambda request: FAULTS["status_500"]), serve(lambda request: GOOD)
    with JudgeClient([bad.url, good.url], settings()) as client:
        assert all(outcome.answer and outcome.attempts <= 2 for outcome in ask(client, 20))


def test_a_dead_server_rests_and_comes_back(serve: Serve) -> None:
    # The second batch lasts longer than the one call on trial, also where the machine is busy.
    one, two = (serve(lambda request: Reply(200, GOOD.body, seconds=0.02)) for _ in range(2))
    with JudgeClient([one.url, two.url], settings(max_in_flight=4, rest_seconds=0.3)) as client:
        one.stop()
        assert all(outcome.answer for outcome in ask(client, 40))
        assert client.statistics().faults["connection"] <= 16
        assert len(two.requests) == 40
        one.start()
        time.sleep(0.35)
        ask(client, 40)
    assert len(one.requests) >= 10


def test_a_server_that_restarts_costs_no_answer(serve: Serve) -> None:
    """The only one there is: the calls wait for it, and with two attempts each none is lost."""
    server = serve(lambda request: GOOD)
    retry = Retry(attempts=2, first_wait=0.01, longest_wait=0.05)
    with JudgeClient(server.url, settings(max_in_flight=4, retry=retry)) as client:
        ask(client, 4)
        server.stop()
        threading.Timer(1.0, server.start).start()
        outcomes = ask(client, 12)
        found = client.statistics()
    assert all(outcome.answer for outcome in outcomes)
    # About one call is spent a rest on finding out, not every call all the time.
    assert found.faults["connection"] <= 24


HUNG = Reply(200, GOOD.body, seconds=FOREVER)


def test_a_server_that_hangs_rests_and_a_good_one_gets_its_calls(serve: Serve) -> None:
    hung, good = serve(lambda request: HUNG), serve(lambda request: Reply(200, GOOD.body, seconds=0.02))
    with JudgeClient([hung.url, good.url], settings(max_in_flight=4, attempt_seconds=1.0, rest_seconds=60)) as client:
        outcomes = [outcome for _ in range(4) for outcome in ask(client, 8)]
        found = client.statistics()
    assert all(outcome.answer for outcome in outcomes)
    # Those that were under way before the first of them was given up; no later batch loses a second to it.
    assert 1 <= len(hung.requests) <= 4
    assert found.faults == {"timeout": len(hung.requests)}


def test_a_server_that_hung_comes_back(serve: Serve) -> None:
    one, two = serve(first_then(HUNG)), serve(lambda request: GOOD)
    quick = settings(max_in_flight=1, attempt_seconds=1.0, rest_seconds=0.5)
    with JudgeClient([one.url, two.url], quick) as client:
        ask(client, 4)
        assert len(one.requests) == 1
        time.sleep(0.6)
        ask(client, 8)
    assert len(one.requests) >= 4


def test_a_slow_call_puts_no_server_to_rest_that_answers_others(serve: Serve) -> None:
    """One call takes forever; the server that has it answers its share of the others, and nothing after them."""
    reply = lambda request: HUNG if request.body["index"] == 0 else Reply(200, GOOD.body, seconds=0.05)  # noqa: E731
    one, two = serve(reply), serve(reply)
    retry = Retry(attempts=1)
    patient = settings(max_in_flight=5, attempt_seconds=3.0, rest_seconds=60, retry=retry)
    with JudgeClient([one.url, two.url], patient) as client:
        outcomes = ask(client, 24)
        before = len(one.requests), len(two.requests)
        asyncio.run(client.ask([partial(body, index) for index in range(1, 41)]))
    assert [index for index, outcome in enumerate(outcomes) if outcome.answer is None] == [0]
    after = len(one.requests), len(two.requests)
    assert min(late - early for early, late in zip(before, after, strict=True)) >= 10


def test_a_server_that_is_alone_is_not_put_to_rest_for_being_slow(serve: Serve) -> None:
    server = serve(first_then(HUNG))
    with JudgeClient(server.url, settings(attempt_seconds=1.0, rest_seconds=60)) as client:
        start = time.monotonic()
        assert ask(client)[0].attempts == 2
        assert time.monotonic() - start < 10


def test_attempts_are_spent_where_every_server_hangs(serve: Serve) -> None:
    urls = [serve(lambda request: HUNG).url for _ in range(2)]
    retry = Retry(attempts=3, first_wait=0.01, longest_wait=0.05)
    with JudgeClient(urls, settings(attempt_seconds=1.0, rest_seconds=60, retry=retry)) as client:
        start = time.monotonic()
        outcomes = ask(client, 2)
        assert time.monotonic() - start < 10
    assert {outcome.reason.split(" from ")[0] for outcome in outcomes} == {
        "no answer in 3 attempts; last fault: no whole answer"
    }


def test_no_server_at_all_is_a_reason() -> None:
    with JudgeClient("http://127.0.0.1:9/v1", settings(call_seconds=0.5)) as client:
        outcomes = ask(client, 3)
    assert all("cannot connect to http://127.0.0.1:9" in outcome.reason for outcome in outcomes)


def test_one_call_in_a_hundred_is_slow_and_holds_up_no_other(serve: Serve) -> None:
    def handler(request: Request) -> Reply:
        return Reply(200, GOOD.body, seconds=1.0 if request.body["index"] % 100 == 0 else 0)

    server = serve(handler)
    with JudgeClient(server.url, settings(max_in_flight=8)) as client:
        assert all(outcome.answer for outcome in ask(client, 200))
        found = client.statistics()
    assert found.p50_seconds < 0.5
    assert found.p95_seconds < 0.8


def test_warm_up_asks_every_server_once(serve: Serve) -> None:
    good, bad = serve(lambda request: GOOD), serve(lambda request: FAULTS["status_503"])
    with JudgeClient([good.url, bad.url], settings()) as client:
        found = asyncio.run(client.warm_up(body()))
    assert found[good.url] == completion("4")
    assert "status 503" in found[bad.url]
    assert (len(good.requests), len(bad.requests)) == (1, 1)


def test_a_path_beside_the_base(serve: Serve) -> None:
    server = serve(first_then(Reply(500, b""), as_json({"tokens": [19]}), Reply(500, b"down"), *[Reply(500)] * 9))
    with JudgeClient(server.url, settings()) as client:
        assert asyncio.run(client.ask_path("//tokenize", {"prompt": "4"})) == {"tokens": [19]}
        assert server.requests[-1].path == "/tokenize"
        with pytest.raises(Fault, match="status 500"):
            asyncio.run(client.ask_path("//tokenize", {"prompt": "4"}))
        asked = len(server.requests)
        server.handler = lambda request: Reply(500)
        with pytest.raises(Fault, match="status 500"):
            asyncio.run(client.ask_path("//tokenize", {"prompt": "4"}, attempts=1))
        assert len(server.requests) == asked + 1


def judge_threads() -> int:
    return sum(thread.name == "client of the judge" for thread in threading.enumerate())


def test_closing_ends_the_thread_and_refuses_more(serve: Serve) -> None:
    server = serve(lambda request: GOOD)
    before = judge_threads()
    client = JudgeClient(server.url, settings())
    assert judge_threads() == before, "no thread before the first call"
    ask(client)
    assert judge_threads() == before + 1
    client.close()
    client.close()
    assert judge_threads() == before
    with pytest.raises(RuntimeError, match="the client of the judge is closed"):
        ask(client)


def test_a_client_from_before_a_fork_says_so_and_does_not_hang(serve: Serve, root: Path) -> None:
    server = serve(lambda request: GOOD)
    program = (
        "import asyncio, os; from rewards.judges.client import JudgeClient; "
        f"client = JudgeClient({server.url!r}); ask = lambda: asyncio.run(client.ask([dict])); ask()\n"
        "if child := os.fork():\n"
        "    os.waitpid(child, 0)\n"
        "else:\n"
        "    try:\n"
        "        ask()\n"
        "    except RuntimeError as error:\n"
        "        print(error, flush=True)\n"
        "    os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert "as after a fork; make one in each process" in done.stdout, done.stderr


def test_closing_cancels_what_runs(serve: Serve) -> None:
    server = serve(lambda request: Reply(200, GOOD.body, seconds=FOREVER))
    client = JudgeClient(server.url, settings())
    threading.Timer(0.3, client.close).start()
    start = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        ask(client, 3)
    assert time.monotonic() - start < 4


def test_a_caller_that_gives_up_frees_its_calls(serve: Serve) -> None:
    server = serve(lambda request: Reply(200, GOOD.body, seconds=FOREVER))

    async def impatient(client: JudgeClient) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.ask([body, body])

    with JudgeClient(server.url, settings(max_in_flight=2)) as client:
        asyncio.run(impatient(client))
        server.handler = lambda request: GOOD
        assert ask(client)[0].answer is not None


def test_a_forgotten_client_ends_its_thread(serve: Serve) -> None:
    server = serve(lambda request: GOOD)
    before = judge_threads()
    client = JudgeClient(server.url, settings())
    ask(client)
    del client
    gc.collect()
    assert judge_threads() == before


def test_an_interpreter_ends_with_a_client_left_open(serve: Serve, root: Path) -> None:
    server = serve(lambda request: GOOD)
    program = (
        "import asyncio; from rewards.judges.client import JudgeClient; "
        f"client = JudgeClient({server.url!r}); print(len(asyncio.run(client.ask([dict]))))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_aiohttp_waits_until_a_call(root: Path) -> None:
    program = (
        "import sys; from rewards.judges.judge import VLMJudge; from rewards.judges.client import JudgeClient; "
        "VLMJudge(JudgeClient('http://127.0.0.1:9/v1'), 'm', 'yes_no.v1'); print('aiohttp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_missing_aiohttp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.judges.client.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pdtr\[judge\]'"):
        JudgeClient("http://127.0.0.1:9/v1")
