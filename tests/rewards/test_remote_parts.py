"""A call that is larger than a server takes at once: it is cut where it may be, and refused by name where not."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import numpy as np
import pytest

from experiments.reward import ServeOptions, _settings
from rewards.base import Images, Prompt, RewardTraits, Scores, declare
from rewards.remote import RemoteReward
from rewards.remote_calls import RemoteSettings
from rewards.scoring import score
from rewards.server import RewardServer, ServerSettings
from rewards.service import ServiceSettings
from rewards.wire import encode_request, parse_request
from rewards.wire_json import Limits, RequestError
from rewards.wire_parts import EncodedCall
from tests.rewards.background_server import serving

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (12, 16, 8, 3), np.uint8)
SOURCES = RANDOM.integers(0, 256, (6, 20, 10, 3), np.uint8)
# Every second image is of the same edit as the one before.
PROMPTS = [
    prompt
    for index, source in enumerate(SOURCES)
    for prompt in [Prompt(f"edit {index}", (source,), {"box": [1, 2, {"n": index}], "é": "ü,:"}, str(index), "g")] * 2
]
QUICK = RemoteSettings(deadline_seconds=5, backoff_seconds=0.01)
IMAGE_PIXELS, SOURCE_PIXELS = 16 * 8, 20 * 10


class Judge:
    """How far an image is from its source, with a part, and the sizes of its calls."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        self.sizes.append(len(images))
        total = np.array(
            [image.mean() - prompt.source_images[0].mean() for image, prompt in zip(images, prompts, strict=True)],
            np.float32,
        )
        return Scores(total, {"part": np.array([len(prompt.metadata) for prompt in prompts], np.float32)})


@declare(RewardTraits(scope="group"))
def rank(images: Images, prompts: Sequence[Prompt]) -> Scores:
    ranks = images.mean((1, 2, 3)).argsort().argsort().astype(np.float32)
    return Scores(ranks, {"size": np.full(len(images), len(images), np.float32)})


@contextmanager
def served(reward: Any, limits: Limits) -> Iterator[str]:
    with RewardServer(reward, ServerSettings(service=ServiceSettings(limits=limits))) as server:
        yield server.url


def answers(url: str, status: int) -> int:
    """How many requests for scores the server has answered so."""
    page = httpx.get(f"{url}/metrics", timeout=20, trust_env=False).text
    found = [line for line in page.splitlines() if line.startswith(f'pdtr_reward_requests_total{{status="{status}"}}')]
    return int(float(found[0].rsplit(" ", 1)[1])) if found else 0


def same(first: Scores, second: Scores) -> None:
    np.testing.assert_array_equal(first.total, second.total)
    assert list(first.components) == list(second.components)
    for name, values in first.components.items():
        np.testing.assert_array_equal(values, second.components[name])
    assert first.reasons == second.reasons


def test_health_tells_all_limits() -> None:
    limits = Limits(1000, 2, 3, 400, 500, 600)
    with served(Judge(), limits) as url:
        assert httpx.get(f"{url}/health", trust_env=False).json()["limits"] == asdict(limits)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(), [12]),
        # The source of two images of one edit is sent once.
        (Limits(max_request_pixels=4 * IMAGE_PIXELS + 2 * SOURCE_PIXELS), [4, 4, 4]),
        (Limits(max_request_pixels=4 * IMAGE_PIXELS + 2 * SOURCE_PIXELS - 1), [3, 3, 3, 3]),
        (Limits(max_request_pixels=IMAGE_PIXELS + SOURCE_PIXELS), [1] * 12),
        (Limits(max_source_images=1), [2] * 6),
        (Limits(max_source_images=4), [8, 4]),
    ],
)
def test_a_reward_of_single_images_is_asked_in_parts(limits: Limits, expected: list[int]) -> None:
    reward = Judge()
    with served(reward, limits) as url, RemoteReward(url, settings=QUICK) as remote:
        same(score(remote, IMAGES, PROMPTS), score(Judge(), IMAGES, PROMPTS))
        assert (answers(url, 200), answers(url, 413)) == (len(expected), 0)
    assert reward.sizes == expected


@pytest.mark.parametrize("limits", [Limits(max_body_bytes=5_000), Limits(max_values=60)])
def test_parts_stay_within_bytes_and_values(limits: Limits) -> None:
    reward = Judge()
    with pytest.raises(RequestError):
        parse_request(encode_request(IMAGES, PROMPTS), limits)
    with served(reward, limits) as url, RemoteReward(url, settings=QUICK) as remote:
        same(score(remote, IMAGES, PROMPTS), score(Judge(), IMAGES, PROMPTS))
        assert answers(url, 413) == 0
    assert sum(reward.sizes) == 12
    assert 2 <= len(reward.sizes) < 12


def test_a_load_bounds_what_is_sent_and_hardly_more() -> None:
    texts = ["", "a,b:[{", "\udce9\U0001f600" * 9]
    prompts = [*PROMPTS[:9], *(Prompt(text) for text in texts)]
    call = EncodedCall(IMAGES, prompts)
    for start, stop in [(0, 12), (0, 1), (3, 9), (11, 12), (8, 12)]:
        body, load = call.body(start, stop), call.load(start, stop)
        assert body == encode_request(IMAGES[start:stop], prompts[start:stop])
        assert len(body) <= load["max_body_bytes"] <= len(body) + 100 + 24 * (stop - start)
        limits = Limits(**{name: max(1, most) for name, most in load.items()})
        parse_request(body, limits)
        for name, slack in (("max_values", 3), ("max_images", 0), ("max_pixels", 0), ("max_request_pixels", 0)):
            if load[name] > slack + 1:
                with pytest.raises(RequestError, match="expected at most"):
                    parse_request(body, replace(limits, **{name: load[name] - slack - 1}))


def test_groups_are_cut_from_each_other_and_not_in_themselves() -> None:
    limits = Limits(max_request_pixels=4 * IMAGE_PIXELS + 2 * SOURCE_PIXELS)
    prompts = [PROMPTS[0]] * 3 + [PROMPTS[2]] * 3 + [PROMPTS[4]] * 2 + [PROMPTS[6]] * 2 + [PROMPTS[8]] * 2
    expected = score(rank, IMAGES, prompts)
    with served(rank, limits) as url, RemoteReward(url, settings=QUICK) as remote:
        same(score(remote, IMAGES, prompts), expected)
        asked = answers(url, 200)
        # All groups in one call, which score never does.
        same(remote(IMAGES, prompts), expected)
        assert (asked, answers(url, 200) - asked, answers(url, 413)) == (5, 4, 0)


@pytest.mark.parametrize(
    ("limits", "name", "flag"),
    [
        (Limits(max_body_bytes=5_000), "max_body_bytes of 5000 bytes", "--max-body-mib"),
        (Limits(max_images=11), "max_images of 11 images", "--max-images"),
        (Limits(max_request_pixels=1000), "max_request_pixels of 1000 pixels", "--max-request-pixels"),
        (Limits(max_values=45), "max_values of 45 JSON values", "--max-values"),
    ],
)
def test_a_group_that_is_too_large_names_the_limit_and_nothing_is_sent(limits: Limits, name: str, flag: str) -> None:
    with served(rank, limits) as url, RemoteReward(url, settings=QUICK) as remote:
        with pytest.raises(ValueError, match=f"a group of 12 images, which is never cut, .*{name} a request, got") as e:
            score(remote, IMAGES, PROMPTS[:1] * 12)
        assert str(e.value).startswith(f"{url}: expected a group")
        assert str(e.value).endswith(f"there (pdtr reward serve {flag})")
        assert "\n" not in str(e.value)
        assert (answers(url, 200), answers(url, 413)) == (0, 0)
        assert len(score(remote, IMAGES[:1], PROMPTS[:1]).total) == 1


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(max_pixels=IMAGE_PIXELS), "max_pixels of 128 pixels an image a request, got 200"),
        (Limits(max_request_pixels=IMAGE_PIXELS + SOURCE_PIXELS - 1), "max_request_pixels of 327 pixels"),
        (Limits(max_body_bytes=500), "max_body_bytes of 500 bytes"),
    ],
)
def test_an_image_that_is_too_large_by_itself_is_found_before_anything_is_sent(limits: Limits, name: str) -> None:
    plain = [Prompt("small")] * 11
    with served(Judge(), limits) as url, RemoteReward(url, settings=QUICK) as remote:
        with pytest.raises(ValueError, match=f"one image with its prompt within the server's {name}"):
            score(remote, IMAGES, [*plain, PROMPTS[0]])
        assert answers(url, 200) + answers(url, 500) + answers(url, 413) == 0


def test_metadata_that_is_not_json_is_found_before_anything_is_sent() -> None:
    with served(Judge(), Limits(max_images=2)) as url:
        remote = RemoteReward(url, RewardTraits(), QUICK)
        with pytest.raises(ValueError, match="metadata"):
            score(remote, IMAGES, [*PROMPTS[:11], Prompt("bad", (SOURCES[0],), {"n": {1, 2}})])
        with pytest.raises(ValueError, match="expected one prompt an image, got 11 prompts for 12 images"):
            remote(IMAGES, PROMPTS[:11])
        assert answers(url, 200) == 0


def test_the_flags_of_the_command_are_the_limits() -> None:
    options = ServeOptions("m:r", max_body_mib=1, max_images=2, max_source_images=3)
    options = replace(options, max_pixels=4, max_request_pixels=5, max_values=6)
    assert _settings(options).service.limits == Limits(2**20, 2, 3, 4, 5, 6)
    assert _settings(ServeOptions("m:r")).service.limits == Limits()


# Servers that say less, and servers that stop answering


class Scripted(BaseHTTPRequestHandler):
    """Tells the health of its server, and answers requests for scores with a number an image until it is full."""

    def do_GET(self) -> None:
        self.answer(200, self.server.health)  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"])
        sizes: list[int] = self.server.sizes  # type: ignore[attr-defined]
        sizes.append(count)
        if len(sizes) > self.server.most:  # type: ignore[attr-defined]
            self.answer(503, {"error": "full"})
        else:
            self.answer(200, {"total": [0.5] * count, "components": {"part": [1] * count}, "fingerprint": "v1"})

    def answer(self, status: int, document: Any) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def scripted(limits: dict[str, Any], most: int = 1000) -> Iterator[Any]:
    traits = asdict(RewardTraits(fingerprint="v1"))
    with serving(Scripted) as server:
        server.health = {"status": "ok", "reward": "r", "traits": traits, "limits": limits}
        server.sizes, server.most = [], most
        yield server


def test_a_server_that_tells_fewer_limits_is_asked_within_the_default_ones() -> None:
    """As servers were before they told more than the first, and as they are where nobody has asked them."""
    images = np.zeros((3, 2048, 2049, 3), np.uint8)
    with scripted({"max_images": 2}) as server:
        assert score(RemoteReward(server.url, settings=QUICK), images, PROMPTS[:3]).total.tolist() == [0.5] * 3
        # Larger than a server takes by default; this one may take more, and is not second-guessed.
        assert server.sizes == [1, 1, 1]
        assert len(score(RemoteReward(server.url, settings=QUICK), IMAGES[:5], PROMPTS[:5]).total) == 5
        assert sorted(server.sizes[3:]) == [1, 2, 2]
        many = np.zeros((520, 1, 1, 3), np.uint8)
        assert len(score(RemoteReward(server.url, RewardTraits(), QUICK), many, [Prompt("a")] * 520).total) == 520
        assert server.sizes[6:] == [512, 8]


def test_limits_that_a_newer_server_adds_are_passed_over() -> None:
    with scripted({**asdict(Limits(max_images=2)), "max_letters": "many"}) as server:
        assert len(score(RemoteReward(server.url, settings=QUICK), IMAGES[:3], PROMPTS[:3]).total) == 3
        assert sorted(server.sizes) == [1, 2]


@pytest.mark.parametrize("wrong", ["many", 0, None])
def test_limits_that_are_none_are_found_at_once(wrong: Any) -> None:
    told = {"max_images": 2, "max_body_bytes": wrong}
    with scripted(told) as server, pytest.raises(ValueError, match="url: expected a reward server"):
        RemoteReward(server.url, settings=QUICK)


def test_what_was_answered_in_time_is_kept() -> None:
    impatient = RemoteSettings(deadline_seconds=2, backoff_seconds=0.2)
    with scripted(asdict(Limits(max_request_pixels=2 * IMAGE_PIXELS + SOURCE_PIXELS)), most=2) as server:
        remote = RemoteReward(server.url, settings=impatient)
        found = score(remote, IMAGES[:7], PROMPTS[:7])
        np.testing.assert_array_equal(found.total, [0.5] * 4 + [np.nan] * 3)
        np.testing.assert_array_equal(found.components["part"], [1] * 4 + [np.nan] * 3)
        assert sorted(found.reasons) == [4, 5, 6]
        assert all("no answer within 2 s" in reason and "503: full" in reason for reason in found.reasons.values())
        # The third request was tried until its time was over, and the last one, of a single image, was not sent.
        assert server.sizes[:2] == [2, 2]
        assert set(server.sizes[2:]) == {2}
        missing = score(remote, IMAGES[:7], PROMPTS[:7])
        assert np.isnan(missing.total).all()
        assert sorted(missing.reasons) == list(range(7))
