"""Rewards over the network: what comes back is what the reward says here, whoever else asks and whatever they send."""

import base64
import json
import logging
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from experiments.cli import main
from rewards.base import Images, Prompt, RewardTraits, Scores, Unavailable, declare, reward_name, reward_traits
from rewards.batching import Batcher, QueueFull, RewardFailed
from rewards.cache import Cached
from rewards.checker import check_reward
from rewards.compose import WeightedSum
from rewards.pixel import redness
from rewards.remote import RemoteReward
from rewards.remote_calls import RemoteSettings
from rewards.scoring import score
from rewards.server import TOKEN_VARIABLE, RewardServer, ServerSettings, read_token
from rewards.service import ServiceSettings
from rewards.wire import encode_request
from rewards.wire_json import Limits
from tests.rewards.background_server import serving

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 6, 4, 3), np.uint8)
PROMPTS = [
    Prompt(text, metadata={"n": i}, id=str(i)) for i, text in enumerate(["a", "bb", "ccc", "dddd", "none", "ff"])
]
QUICK = RemoteSettings(deadline_seconds=5, backoff_seconds=0.01)
JSON = {"Content-Type": "application/json"}


class Judge:
    """Mean grey plus the text's length, with a part; nothing for "none"; an exception for "error"."""

    def __init__(self, **traits: Any) -> None:
        self.traits = RewardTraits(**{"fingerprint": "judge v1", **traits})
        self.sizes: list[int] = []
        self.arrived = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        self.sizes.append(len(images))
        self.arrived.release()
        assert self.gate.wait(20)
        texts = [prompt.text for prompt in prompts]
        if "error" in texts:
            raise LookupError("the secret of the server")
        total = np.array([len(text) for text in texts], np.float32) / 3 + images.mean((1, 2, 3))
        total[[text == "none" for text in texts]] = np.nan
        reasons = {i: "nothing to see" for i, text in enumerate(texts) if text == "none"}
        return Scores(total, {"part": images.std((1, 2, 3)), "half": np.where(total > 100, total, np.nan)}, reasons)


@declare(RewardTraits(scope="group", fingerprint="rank v1", concurrency=2))
async def rank(images: Images, prompts: Sequence[Prompt]) -> Scores:
    """Ranks within a group, none in a group of one; its prompt has to be one object."""
    assert len({id(prompt) for prompt in prompts}) == 1
    if len(images) < 2:
        raise Unavailable("a group of one")
    ranks = images.mean((1, 2, 3)).argsort().argsort().astype(np.float32)
    return Scores(ranks, {"size": np.full(len(images), len(images), np.float32)})


def served(reward: Any, **settings: Any) -> RewardServer:
    return RewardServer(reward, ServerSettings(service=ServiceSettings(**settings)))


def same(first: Scores, second: Scores) -> None:
    np.testing.assert_array_equal(first.total, second.total)
    assert first.total.dtype == second.total.dtype == np.float32
    assert list(first.components) == list(second.components)
    for name, values in first.components.items():
        np.testing.assert_array_equal(values, second.components[name])
    assert first.reasons == second.reasons


def body(*texts: str) -> bytes:
    return encode_request(IMAGES[: len(texts)], [Prompt(text) for text in texts])


def post(url: str, content: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/score", content=content, headers={**JSON, **headers}, timeout=20, trust_env=False)


def get(url: str, path: str, **headers: str) -> httpx.Response:
    return httpx.get(url + path, headers=headers, timeout=20, trust_env=False)


def metrics(url: str) -> dict[str, float]:
    lines = [line for line in get(url, "/metrics").text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("pdtr_reward_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a server that stays up through whatever the tests of this file send."""
    with served(Judge()) as server:
        yield server.url
        assert post(server.url, body("a")).status_code == 200


# Remote equals local


@pytest.mark.parametrize("traits", [{}, {"batch_size": 1}, {"batch_size": 4, "concurrency": 3}])
def test_remote_equals_local(traits: dict[str, Any]) -> None:
    with served(Judge(**traits)) as server, RemoteReward(server.url, settings=QUICK) as remote:
        same(score(remote, IMAGES, PROMPTS), score(Judge(**traits), IMAGES, PROMPTS))
        same(score(remote, IMAGES[:1, :1], PROMPTS[:1]), score(Judge(), IMAGES[:1, :1], PROMPTS[:1]))
        check_reward(remote, IMAGES, PROMPTS)
        assert len(score(remote, IMAGES[:0], []).total) == 0
        assert reward_name(remote) == "Judge"
        assert reward_traits(remote).fingerprint == "judge v1"


def test_remote_equals_local_for_groups() -> None:
    one, other = PROMPTS[:2]
    prompts = [one, one, other, other, other, one]
    with served(rank) as server, RemoteReward(server.url, settings=QUICK) as remote:
        assert remote.traits == RewardTraits("group", None, 4, "rank v1")
        found = score(remote, IMAGES, prompts)
        same(found, score(rank, IMAGES, prompts))
        assert found.reasons == {5: "a group of one"}
        # Several groups in one request, as another client may send them.
        answer = post(server.url, encode_request(IMAGES, prompts)).json()
        assert answer["total"][:5] == found.total[:5].tolist()
        assert (answer["total"][5], answer["reasons"]) == (None, {"5": "a group of one"})


def test_in_a_sum_and_in_a_cache(url: str, tmp_path: Path) -> None:
    remote = RemoteReward(url, settings=QUICK)
    both = score(WeightedSum({"judge": remote, "red": redness}, {"judge": 1.0, "red": 0.5}), IMAGES, PROMPTS)
    local = score(WeightedSum({"judge": Judge(), "red": redness}, {"judge": 1.0, "red": 0.5}), IMAGES, PROMPTS)
    same(both, local)
    # The name and the fingerprint are the reward's own, and so is the cache's key.
    score(Cached(Judge(), tmp_path / "c"), IMAGES[:2], PROMPTS[:2])
    cached = Cached(remote, tmp_path / "c")
    prompts = [Prompt("x"), Prompt("y")]
    score(cached, IMAGES[:2], prompts)
    score(cached, IMAGES[:2], prompts)
    assert (cached.hits, cached.misses) == (2, 2)


# Batches across clients


def test_two_clients_at_a_time_are_answered_with_one_call() -> None:
    reward = Judge(batch_size=4)
    with served(reward) as server, ThreadPoolExecutor(4) as clients:
        reward.gate.clear()
        first = clients.submit(post, server.url, body("a"))
        assert reward.arrived.acquire(timeout=20)
        waiting = [clients.submit(post, server.url, body(text, text)) for text in ("bb", "ccc")]
        waiting.append(clients.submit(post, server.url, body("dddd")))
        wait_for(lambda: metrics(server.url)["queue_length"] == 5)
        reward.gate.set()
        answers = [future.result().json() for future in (first, *waiting)]
    assert reward.sizes[0] == 1
    assert sorted(reward.sizes[1:]) in ([1, 4], [2, 3])
    for answer, texts in zip(answers, (["a"], ["bb"] * 2, ["ccc"] * 2, ["dddd"]), strict=True):
        expected = score(Judge(), IMAGES[: len(texts)], [Prompt(text) for text in texts])
        assert answer["total"] == expected.total.tolist()


def test_images_of_another_size_and_groups_are_calls_of_their_own() -> None:
    judge, seen = Judge(), []

    @declare(RewardTraits(scope="group", batch_size=2))
    def groups(images: Images, prompts: Sequence[Prompt]) -> Scores:
        seen.append([prompt.text for prompt in prompts])
        return judge(images, prompts)

    for reward, sizes in ((judge, [1, 3, 2]), (groups, [1, 3, 1, 1, 1])):
        judge.sizes.clear()
        judge.gate.clear()
        batcher = Batcher(reward, 100)
        first = batcher.submit(IMAGES[:1], [Prompt("hold")])
        assert judge.arrived.acquire(timeout=20)
        one = Prompt("one")
        waiting = batcher.submit(IMAGES[:3], [one] * 3) if reward is groups else batcher.submit(IMAGES[:2], PROMPTS[:2])
        waiting += batcher.submit(IMAGES[:2, :3], PROMPTS[:2])
        waiting += batcher.submit(IMAGES[:1], PROMPTS[:1])
        judge.gate.set()
        for future in (*first, *waiting):
            future.result(timeout=20)
        assert judge.sizes == sizes
        batcher.close(1)
    assert seen[1] == ["one"] * 3


def test_no_more_calls_at_a_time_than_the_reward_declares() -> None:
    running, most, lock = 0, 0, threading.Lock()

    @declare(RewardTraits(batch_size=1, concurrency=2))
    def slow(images: Images, prompts: Sequence[Prompt]) -> Images:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return images.mean((1, 2, 3))

    batcher = Batcher(slow, 100)
    futures = [future for _ in range(4) for future in batcher.submit(IMAGES[:3], PROMPTS[:3])]
    assert [len(future.result(timeout=20).total) for future in futures] == [1] * 12
    assert most == 2
    batcher.close(1)


def test_an_exception_reaches_only_whose_images_raise_it(caplog: pytest.LogCaptureFixture) -> None:
    reward = Judge()
    reward.gate.clear()
    batcher = Batcher(reward, 100)
    batcher.submit(IMAGES[:1], PROMPTS[:1])
    assert reward.arrived.acquire(timeout=20)
    (good,), (bad,) = batcher.submit(IMAGES[:1], PROMPTS[:1]), batcher.submit(IMAGES[:1], [Prompt("error")])
    reward.gate.set()
    assert len(good.result(timeout=20).total) == 1
    with pytest.raises(RewardFailed) as caught:
        bad.result(timeout=20)
    assert isinstance(caught.value.__cause__, LookupError)
    assert reward.sizes == [1, 2, 1, 1]
    assert "scored apart" in caplog.text
    batcher.close(1)


def test_a_full_queue_refuses_and_a_closed_one_cancels() -> None:
    reward = Judge()
    reward.gate.clear()
    batcher = Batcher(reward, max_waiting=3)
    batcher.submit(IMAGES, PROMPTS)
    assert reward.arrived.acquire(timeout=20)
    (waiting,) = batcher.submit(IMAGES, PROMPTS)
    with pytest.raises(QueueFull):
        batcher.submit(IMAGES[:1], PROMPTS[:1])
    assert batcher.waiting == 6
    waiting.cancel()
    assert batcher.waiting == 0
    (other,) = batcher.submit(IMAGES[:1], PROMPTS[:1])
    batcher.close(0.01)
    assert other.cancelled()
    reward.gate.set()


# Clients that are slow, busy or gone


def test_a_slow_client_holds_nobody_and_is_sent_away() -> None:
    with served(Judge(), body_seconds=1.5) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with closing(socket.create_connection((host, int(port)), timeout=20)) as slow:
            slow.sendall(
                b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            )
            started = time.monotonic()
            assert post(server.url, body("a")).status_code == 200
            assert time.monotonic() - started < 1
            answer = slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert metrics(server.url)['requests_total{status="408"}'] == 1


def test_a_client_that_goes_away_is_not_scored() -> None:
    reward = Judge()
    with served(reward) as server, ThreadPoolExecutor(1) as clients:
        reward.gate.clear()
        first = clients.submit(post, server.url, body("a"))
        assert reward.arrived.acquire(timeout=20)
        impatient = RemoteReward(server.url, RewardTraits(), RemoteSettings(deadline_seconds=0.3))
        with pytest.raises(Unavailable, match=r"no answer within 0\.3 s"):
            impatient(IMAGES[:2], PROMPTS[:2])
        wait_for(lambda: metrics(server.url)["queue_length"] == 0)
        reward.gate.set()
        assert first.result().status_code == 200
        assert post(server.url, body("a", "b", "c")).status_code == 200
        found = metrics(server.url)
    assert reward.sizes == [1, 3]
    assert found['requests_total{status="499"}'] == 1


def test_a_busy_server_says_so_and_a_client_comes_again() -> None:
    reward = Judge()
    with served(reward, max_requests=1) as server, ThreadPoolExecutor(2) as clients:
        reward.gate.clear()
        first = clients.submit(post, server.url, body("a"))
        assert reward.arrived.acquire(timeout=20)
        refused = post(server.url, body("a"))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "busy" in refused.json()["error"]
        second = clients.submit(RemoteReward(server.url, settings=QUICK), IMAGES[:1], PROMPTS[:1])
        wait_for(lambda: metrics(server.url)['requests_total{status="503"}'] == 2)
        reward.gate.set()
        assert first.result().status_code == 200
        same(second.result(), score(Judge(), IMAGES[:1], PROMPTS[:1]))


def test_a_full_queue_is_503() -> None:
    reward = Judge()
    with served(reward, max_waiting_images=1) as server, ThreadPoolExecutor(2) as clients:
        reward.gate.clear()
        waiting = [clients.submit(post, server.url, body("a"))]
        assert reward.arrived.acquire(timeout=20)
        waiting.append(clients.submit(post, server.url, body("a")))
        wait_for(lambda: metrics(server.url)["queue_length"] == 1)
        refused = post(server.url, body("a"))
        assert (refused.status_code, refused.json()["error"]) == (503, "the server is busy: 1 images wait, and 1 may")
        reward.gate.set()
        assert [future.result().status_code for future in waiting] == [200, 200]


# What is refused


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Image appears to be a malformed")
def test_malformed_bodies_get_a_reason_and_the_server_goes_on(url: str) -> None:
    draw, valid = random.Random(0), body("a", "bb")
    with httpx.Client(headers=JSON, timeout=20, trust_env=False) as client:
        for i in range(400):
            content = bytearray(valid)
            if i % 3 == 0:
                content = content[: draw.randrange(len(valid))]
            elif i % 3 == 1:
                content[draw.randrange(60)] = draw.choice(b"\x00\xff!;")
            else:
                content = bytearray(draw.randbytes(draw.randrange(300)))
            answer = client.post(f"{url}/score", content=bytes(content))
            assert answer.status_code in (400, 413), content
            assert answer.json()["error"]
            if i % 40 == 0:
                assert client.post(f"{url}/score", content=valid).status_code == 200


def test_requests_that_are_none_get_json_too(url: str) -> None:
    assert get(url, "/score").status_code == 405
    assert get(url, "/nothing").json() == {"error": "GET /nothing: Not Found"}
    plain = post(url, body("a"), **{"Content-Type": "text/plain"})
    assert (plain.status_code, plain.json()["error"]) == (
        415,
        "Content-Type: expected application/json, got text/plain",
    )
    host, port = url.removeprefix("http://").split(":")
    for raw in (
        b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"POST /score HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with closing(socket.create_connection((host, int(port)), timeout=20)) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(99)[:12] in (b"HTTP/1.1 400", b"")
    assert get(url, "/health").status_code == 200


def test_large_bodies_and_bombs_are_413() -> None:
    limits = Limits(max_body_bytes=20_000, max_images=4, max_pixels=24)
    with served(Judge(), limits=limits) as server:
        for content in (b" " * 20_001, iter([b" " * 15_000] * 2)):
            answer = post(server.url, content)  # type: ignore[arg-type]
            assert answer.status_code == 413
            assert "body: expected at most 20000 bytes" in answer.json()["error"]
        assert post(server.url, body(*"abcde")).status_code == 413
        large = encode_request(np.zeros((1, 5, 5, 3), np.uint8), [Prompt("a")])
        assert post(server.url, large).json()["error"].startswith("images[0]: expected at most 24 pixels, got 25")
        remote = RemoteReward(server.url, settings=QUICK)
        assert remote.traits.batch_size == 4
        same(score(remote, IMAGES, PROMPTS), score(Judge(), IMAGES, PROMPTS))
        # Asked for what it takes, the server is sent no more than that; who has not asked is refused by it.
        image = np.zeros((1, 5, 5, 3), np.uint8)
        with pytest.raises(ValueError, match=r"one image with its prompt within the server's max_pixels of 24 pixels"):
            remote(image, PROMPTS[:1])
        with pytest.raises(ValueError, match=r"the server refuses the request, 413: images\[0\]: expected at most 24"):
            RemoteReward(server.url, RewardTraits(), QUICK)(image, PROMPTS[:1])


def test_the_token() -> None:
    with served(Judge(), token="s3cret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic s3cret"},
        ):
            answer = post(server.url, b"{", **headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert get(server.url, "/metrics", **headers).status_code == 401
        assert get(server.url, "/health").json() == {"status": "ok"}
        assert get(server.url, "/health", Authorization="Bearer no").status_code == 401
        with pytest.raises(ValueError, match=r"the server wants a token; give RemoteSettings\(token=...\)"):
            RemoteReward(server.url, settings=QUICK)
        with pytest.raises(ValueError, match=r"401: .*give RemoteSettings\(token=...\)"):
            RemoteReward(server.url, settings=RemoteSettings("wrong"))
        remote = RemoteReward(server.url, settings=RemoteSettings("s3cret"))
        same(score(remote, IMAGES, PROMPTS), score(Judge(), IMAGES, PROMPTS))
    assert "s3cret" not in repr([ServiceSettings("s3cret"), RemoteSettings("s3cret")])


def test_where_a_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token() == ""
    monkeypatch.setenv(TOKEN_VARIABLE, "abc\n")
    assert read_token() == "abc"
    path = tmp_path / "token"
    path.write_text("xyz\n")
    assert read_token(path) == "xyz"
    for content, message in ((b"\n", "got an empty file"), (b"a b", "got blanks"), (b"\xff", "got other bytes")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_token(path)


# What goes wrong inside


def test_an_exception_of_the_reward_is_logged_and_not_told(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = post(url, body("a", "error"))
    assert (answer.status_code, answer.json()) == (500, {"error": "the reward failed; the server's log says why"})
    assert "LookupError: the secret of the server" in caplog.text
    assert 'raise LookupError("the secret' in caplog.text
    with pytest.raises(RuntimeError, match="500: the reward failed; the server's log says why"):
        score(RemoteReward(url, settings=QUICK), IMAGES[:1], [Prompt("error")])
    assert post(url, body("a")).status_code == 200


def test_an_answer_of_the_wrong_shape_is_500() -> None:
    def wrong(images: Images, prompts: Sequence[Prompt]) -> Images:
        return images[:, 0]

    def leaves(images: Images, prompts: Sequence[Prompt]) -> Images:
        sys.exit(3)

    for reward in (wrong, leaves):
        with served(reward) as server:
            assert [post(server.url, body("a")).status_code for _ in range(2)] == [500, 500]
            assert get(server.url, "/health").json()["status"] == "ok"


def test_metrics_add_up() -> None:
    with served(Judge(batch_size=2)) as server:
        for content in (body("a", "none", "none"), body("bb"), b"{", b"[]", body("error")):
            post(server.url, content)
        page = get(server.url, "/metrics")
        found = metrics(server.url)
    assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert [found[f'requests_total{{status="{status}"}}'] for status in (200, 400, 500)] == [2, 2, 1]
    assert (found["images_total"], found["missing_answers_total"], found["queue_length"]) == (4, 2, 0)
    assert (found["calls_total"], found["called_images_total"]) == (4, 5)
    buckets = [value for name, value in found.items() if name.startswith("request_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found["request_seconds_count"] == 5
    assert found["request_seconds_sum"] > 0
    for line in page.text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"\})? [0-9.e+-]+', line), line


# The client against servers that are none


class Script(BaseHTTPRequestHandler):
    """Answers with what the server's list has next, its last entry for ever; an empty one breaks the connection."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        script: list[tuple[int, bytes]] = self.server.script  # type: ignore[attr-defined]
        self.server.asked += 1  # type: ignore[attr-defined]
        status, content = script.pop(0) if len(script) > 1 else script[0]
        if not status:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def script() -> Iterator[Any]:
    with serving(Script) as server:
        server.asked = 0
        yield server


GOOD = (200, b'{"total": [0.5], "components": {}, "reasons": {}}')


def test_what_passes_is_tried_again(script: Any) -> None:
    script.script = [(503, b"{}"), (429, b""), (0, b""), (502, b"<html>"), GOOD]
    remote = RemoteReward(script.url, RewardTraits(), QUICK)
    assert score(remote, IMAGES[:1], PROMPTS[:1]).total.tolist() == [0.5]
    assert script.asked == 5


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((400, b'{"error": "no such thing"}'), ValueError, "the server refuses the request, 400: no such thing$"),
        ((404, b"<html>\n gone"), ValueError, "404: <html> gone$"),
        ((302, b""), ValueError, "expected a reward server, got an answer with status 302: no reason given"),
        ((500, b'{"error": "failed"}'), RuntimeError, "500: failed$"),
        ((200, b"<html>"), ValueError, "answer: expected JSON"),
        ((200, b'{"total": [1, 2]}'), ValueError, "total: expected a list of 1 numbers"),
        (
            (200, b'{"total": [1], "fingerprint": "v2"}'),
            ValueError,
            "expected the reward with the fingerprint 'v1', got 'v2'",
        ),
    ],
)
def test_what_would_not_pass_is_asked_once(script: Any, answer: Any, error: type[Exception], message: str) -> None:
    script.script = [answer]
    with pytest.raises(error, match=message) as caught:
        score(RemoteReward(script.url, RewardTraits(fingerprint="v1"), QUICK), IMAGES[:1], PROMPTS[:1])
    assert str(caught.value).startswith(script.url)
    assert script.asked == 1


def test_without_an_answer_in_time_a_reward_is_missing(script: Any) -> None:
    script.script = [(503, b'{"error": "full"}')]
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as silent,
        closing(socket.create_server(("127.0.0.1", 0))) as gone,
    ):
        urls = {f"http://127.0.0.1:{s.getsockname()[1]}": s for s in (silent, gone)}
        gone.close()
        expected = [(script.url, "503: full"), (next(iter(urls)), "waiting"), (list(urls)[1], "refused")]
        for url, reason in expected:
            remote = RemoteReward(url, RewardTraits(), RemoteSettings(deadline_seconds=0.4, backoff_seconds=0.01))
            started = time.monotonic()
            found = score(remote, IMAGES[:2], PROMPTS[:2])
            assert time.monotonic() - started < 5
            assert np.isnan(found.total).all()
            assert found.reasons[0] == found.reasons[1]
            assert re.match(rf"{url}: no answer within 0.4 s \(\d+ (try|tries), the last: .*{reason}", found.reasons[0])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b"hello"), "answer: expected JSON"),
        ((200, b"{}"), "answer: expected text under 'reward', got nothing"),
        ((200, b'{"reward": "r", "limits": {"max_images": 1}, "traits": {"scope": "x"}}'), "scope: expected"),
        ((200, b'{"reward": "r", "limits": {"max_images": 1}, "traits": {"batch_size": "x"}}'), "not supported"),
        ((200, b'{"reward": "r", "limits": {"max_images": 1}, "traits": {"size": 1}}'), "unexpected keyword"),
        ((200, b'{"reward": "r", "limits": {}, "traits": {}}'), "max_images"),
        ((404, b"gone"), "404: gone"),
        ((500, b"oh"), "500: oh"),
        ((503, b"oh"), r"503: oh\); start it \(pdtr reward serve MODULE:REWARD\)"),
    ],
    ids=range(9),
)
def test_what_is_no_reward_server_is_found_at_once(script: Any, answer: Any, message: str) -> None:
    script.script = [answer]
    # Only a busy server is asked until the time is over.
    seconds = 2 if answer[0] == 503 else 20
    with pytest.raises(ValueError, match=f"^url: expected a reward server, got .*{message}"):
        RemoteReward(script.url, settings=RemoteSettings(deadline_seconds=seconds, backoff_seconds=0.05))


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:80", "ftp://a", "http://", "http://a:x", "http://a?b=1", "http://u:pass@a", "file:///etc"]
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="url: expected one such as") as caught:
        RemoteReward(url)
    assert "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ServerSettings, {"port": 70000}, "port: expected 0 to 65535"),
        (ServerSettings, {"shutdown_seconds": 0}, "shutdown_seconds"),
        (
            ServerSettings,
            {"host": "0.0.0.0"},
            "host: expected this machine's own address without a token, got '0.0.0.0'",
        ),
        (ServerSettings, {"host": "::"}, "--token-file"),
        (ServiceSettings, {"token": "a b"}, "token: expected one word"),
        (ServiceSettings, {"max_requests": 0}, "max_requests"),
        (ServiceSettings, {"body_seconds": 0}, "body_seconds"),
        (RemoteSettings, {"token": "é"}, "token: expected one word"),
        (RemoteSettings, {"deadline_seconds": float("inf")}, "deadline_seconds"),
    ],
)
def test_settings_that_cannot_be(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_all_addresses_with_a_token_and_version_six() -> None:
    ServerSettings(host="0.0.0.0", service=ServiceSettings("t"))
    try:
        server = RewardServer(Judge(), ServerSettings(host="::1"))
    except ValueError:
        pytest.skip("this machine has no IPv6")
    with server:
        assert server.url.startswith("http://[::1]:")
        assert get(server.url, "/health").status_code == 200


# The command

MODULE = """
import time
import numpy as np
from rewards.base import RewardTraits

class Slow:
    traits = RewardTraits(fingerprint="slow v1")
    def __call__(self, images, prompts):
        print("called", flush=True)
        time.sleep(0.5)
        return images.mean((1, 2, 3))

def stuck(images, prompts):
    print("called", flush=True)
    time.sleep(60)

slow, number = Slow(), 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import no_such_package")
    (tmp_path / "my_typo.py").write_text("def (")
    (tmp_path / "empty").write_text("\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 143, ""), (signal.SIGINT, 130, "pdtr: stopped\n")]
)
def test_the_command_answers_until_a_signal(here: Path, root: Path, number: int, code: int, said: str) -> None:
    command = [sys.executable, "-m", "experiments.cli", "reward", "serve", "my_rewards:slow", "--port", "0"]
    environment = {"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1", TOKEN_VARIABLE: "t0ken"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(command, cwd=here, env=environment, **pipes) as process,  # type: ignore[call-overload]
        ThreadPoolExecutor(1) as clients,
    ):
        line = process.stdout.readline()
        assert re.fullmatch(r"serving Slow at http://127\.0\.0\.1:\d+\n", line), process.stderr.read()
        remote = RemoteReward(line.split()[-1], settings=RemoteSettings("t0ken", deadline_seconds=20))
        assert remote.traits.fingerprint == "slow v1"
        answer = clients.submit(remote, IMAGES[:2], PROMPTS[:2])
        assert process.stdout.readline() == "called\n"
        process.send_signal(number)
        # What was taken is answered.
        assert answer.result().total.tolist() == np.float32(IMAGES[:2].mean((1, 2, 3))).tolist()
        assert process.wait(20) == code
        assert process.stderr.read() == said


def test_a_reward_that_never_returns_does_not_keep_the_process(here: Path, root: Path) -> None:
    command = [sys.executable, "-m", "experiments.cli", "reward", "serve", "my_rewards:stuck", "--port", "0"]
    environment = {"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"}
    with (
        subprocess.Popen(
            [*command, "--shutdown-seconds", "1"], cwd=here, env=environment, stdout=subprocess.PIPE, text=True
        ) as process,
        ThreadPoolExecutor(1) as clients,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        answer = clients.submit(post, url, body("a"))
        assert process.stdout.readline() == "called\n"
        process.terminate()
        assert process.wait(20) == 143
        # Nothing, or 500 where there is still time for it.
        assert answer.exception() is not None or answer.result().status_code == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reward: expected what to do, serve, got none"),
        (["server"], "reward: expected what to do, serve, got server"),
        (["serve"], "MODULE:REWARD"),
        (["serve", "my_rewards"], "expected MODULE:REWARD such as .*, or MODULE:CLASS=ARGUMENT, got 'my_rewards'"),
        (
            ["serve", "my_reward:slow"],
            "my_reward: expected a module that can be imported .* No module named 'my_reward'",
        ),
        (["serve", "my_broken:slow"], "No module named 'no_such_package'"),
        (["serve", "my_typo:slow"], "my_typo: expected a module .* SyntaxError"),
        (["serve", "my_rewards:slaw"], "without 'slaw'; did you mean 'slow'"),
        (["serve", "my_rewards:number"], "expected a reward, which is callable, got int 3"),
        (["serve", "my_rewards:Slow"], "expected a reward, got a class"),
        (["serve", "os:getcwd"], "expected a function that can be called as getcwd"),
        (["serve", "my_rewards:slow", "--prot", "1"], "Perhaps you meant: --port|did you mean --port"),
        (
            ["serve", "my_rewards:slow", "--host", "0.0.0.0"],
            "host: expected this machine's own address without a token",
        ),
        (["serve", "my_rewards:slow", "--token-file", "empty"], "empty: expected a token"),
        (["serve", "my_rewards:slow", "--token-file", "nowhere"], "nowhere: No such file"),
        (["serve", "my_rewards:slow", "--max-images", "0"], "max_images: expected 1 or more, got 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["reward", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.search(message, captured.err), captured.err


def test_a_port_that_is_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert main(["reward", "serve", "my_rewards:slow", "--port", port]) == 2
    assert f"got '127.0.0.1' and {port}: Address already in use; choose another port" in capsys.readouterr().err


def test_nothing_in_a_request_is_fetched_or_unpickled(url: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as bait:
        bait.settimeout(0.2)
        address = f"http://127.0.0.1:{bait.getsockname()[1]}/a.png"
        for image in (address, f"data:image/png;base64,{base64.b64encode(b'x').decode()}", "file:///etc/passwd"):
            content = json.dumps({"images": [image], "prompts": [{"text": address, "metadata": {"url": address}}]})
            assert post(url, content.encode()).status_code == 400
        with pytest.raises(TimeoutError):
            bait.accept()
