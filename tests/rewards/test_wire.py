"""The format of rewards over the network: nothing is lost in it, and whatever is not in it is refused by name."""

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from rewards.base import Prompt, Scores
from rewards.wire import encode_answer, encode_request, parse_answer, parse_request
from rewards.wire_images import encode_png
from rewards.wire_json import Limits, RequestError

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (5, 6, 4, 3), np.uint8)
SOURCES = (RANDOM.integers(0, 256, (3, 9, 3), np.uint8), RANDOM.integers(0, 256, (1, 1, 3), np.uint8))
EDIT = Prompt("wider", SOURCES, MappingProxyType({"n": [1, 2.5, None, True], "in": {"ü": "x"}}), "e-1", "g")
ODD = Prompt("d\udce9 \u0000 \U0001f600", id="lone surrogate")
PROMPTS = [EDIT, EDIT, ODD, EDIT, Prompt("", SOURCES[:1])]
LIMITS = Limits()
NAN = float("nan")


def png(image: np.ndarray[Any, Any] = IMAGES[0]) -> str:
    return base64.b64encode(encode_png(image, "image")).decode()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def made_png(*chunks: bytes) -> str:
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")).decode()


def document(**changes: Any) -> dict[str, Any]:
    valid = {
        "images": [png(), png()],
        "prompts": [{"text": "a", "metadata": {"k": 1}}, {"text": "b"}],
        "groups": [0, 1],
    }
    return {key: value for key, value in {**valid, **changes}.items() if value is not ...}


def body(**changes: Any) -> bytes:
    return json.dumps(document(**changes)).encode()


def test_a_request_comes_back_as_it_was() -> None:
    images, prompts = parse_request(encode_request(IMAGES, PROMPTS), LIMITS)
    np.testing.assert_array_equal(images, IMAGES)
    assert images.dtype == np.uint8
    for found, sent in zip(prompts, PROMPTS, strict=True):
        assert (found.text, found.id, found.group) == (sent.text, sent.id, sent.group)
        assert found.metadata == dict(sent.metadata)
        assert all(map(np.array_equal, found.source_images, sent.source_images))
        assert len(found.source_images) == len(sent.source_images)


def test_entries_share_a_prompt_as_before() -> None:
    """Two prompts that are equal are two groups, and one that comes back later is the same."""
    prompts = [Prompt("a"), Prompt("a")]
    order = [0, 0, 1, 0, 1]
    _, found = parse_request(encode_request(IMAGES, [prompts[i] for i in order]), LIMITS)
    assert len({id(prompt) for prompt in found}) == 2
    assert [found[2] is prompt for prompt in found] == [bool(i) for i in order]


def test_a_shared_prompt_is_sent_once() -> None:
    sent = json.loads(encode_request(IMAGES, PROMPTS))
    assert (len(sent["prompts"]), sent["groups"]) == (3, [0, 0, 1, 0, 2])
    assert sent["prompts"][1] == {"text": ODD.text, "id": ODD.id}


def test_without_groups_there_is_a_prompt_for_each_image() -> None:
    _, prompts = parse_request(body(groups=...), LIMITS)
    assert [prompt.text for prompt in prompts] == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("a", metadata={"k": {1: 2}}), r"prompt 'a', metadata\['k'\]: expected keys that are text, got 1"),
        (Prompt("a", metadata={"k": [0, NAN]}), r"metadata\['k'\]\[1\]: expected a finite number, got nan"),
        (Prompt("a", id="x", metadata={"k": {1, 2}}), r"prompt 'x', metadata\['k'\]: expected JSON, got set"),
        (Prompt("a", metadata={"k": np.zeros(2)}), "expected JSON, got ndarray"),
        (
            Prompt("a", (IMAGES[0].astype(np.float32),)),
            r"source image 0: expected an image uint8 \[H, W, 3\], got float",
        ),
        (Prompt("a", (IMAGES[0][..., :2],)), r"got uint8 \[6, 4, 2\]"),
        (Prompt("a", (IMAGES[0][:0],)), r"got uint8 \[0, 4, 3\]"),
    ],
)
def test_what_json_and_png_would_change_is_not_sent(prompt: Prompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_request(IMAGES[:1], [prompt])


def test_metadata_that_holds_itself_is_not_sent() -> None:
    metadata: dict[str, Any] = {}
    metadata["self"] = metadata
    with pytest.raises(ValueError, match="nested too deeply"):
        encode_request(IMAGES[:1], [Prompt("a", metadata=metadata)])


def test_an_answer_comes_back_to_the_last_bit_and_nan_is_null() -> None:
    numbers = np.array([0.1, NAN, -1e-40, 3.4e38, 1 / 3], np.float32)
    scores = Scores(numbers, {"p/q": numbers[::-1].copy(), "": np.zeros(5, np.float32)}, {1: "no\nanswer"})
    sent = encode_answer(scores, "v1")
    assert json.loads(sent)["total"][1] is None
    assert b"NaN" not in sent
    found, fingerprint = parse_answer(sent, 5)
    assert fingerprint == "v1"
    np.testing.assert_array_equal(found.total, numbers)
    assert found.total.dtype == np.float32
    np.testing.assert_array_equal(found.components["p/q"], numbers[::-1])
    assert list(found.components) == ["p/q", ""]
    assert found.reasons == {1: "no\nanswer"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "answer: expected JSON in UTF-8, got 6 bytes"),
        (b"[1]", "answer: expected an object, got a list of 1"),
        (b"{}", "total: expected a list of 2 numbers, got null"),
        (b'{"total": [1]}', "total: expected a list of 2 numbers, got a list of 1"),
        (b'{"total": [1, "2"]}', "total: expected numbers or null, got '2'"),
        (b'{"total": [1, true]}', "total: expected numbers or null, got True"),
        (b'{"total": [1, NaN]}', "NaN is not JSON, null is"),
        (b'{"total": [1, 1e999]}', "out of range"),
        (b'{"total": [1, 1e300]}', "total: expected numbers that a float32 holds"),
        (b'{"total": [1, 1%s]}' % (b"0" * 400), "total: expected numbers that a float32 holds"),
        (b'{"total": [1, 2], "components": {"p": [1]}}', "component 'p': expected a list of 2"),
        (b'{"total": [1, null], "reasons": {"2": "x"}}', "reasons: expected indices below 2, got '2'"),
        (b'{"total": [1, null], "reasons": {"-1": "x"}}', "reasons: expected indices below 2"),
    ],
)
def test_what_is_no_answer_is_named(answer: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_answer(answer, 2)


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"images": ...}, "body: expected a list under 'images', got nothing"),
    ({"images": []}, "images: expected at least one image"),
    ({"images": "x"}, "body: expected a list under 'images', got 'x'"),
    ({"images": [png(), 3]}, r"images\[1\]: expected a PNG in base64, got 3"),
    ({"images": [png(), "!!"]}, r"images\[1\]: expected a PNG in base64, got text that is none"),
    ({"images": [png(), "é"]}, r"images\[1\]: expected a PNG in base64"),
    ({"images": [png(), "http://127.0.0.1/a.png"]}, r"images\[1\]: expected a PNG in base64"),
    ({"images": [png(), "AAAA"]}, r"images\[1\]: expected a PNG, got 3 bytes of something else"),
    ({"images": [png(), png()[:60]]}, r"images\[1\]: expected a PNG, got a damaged one"),
    (
        {"images": [png(), png(IMAGES[0, :5])]},
        r"images\[1\]: expected all images of one size, .* \(5, 4\) after \(6, 4\)",
    ),
    ({"images": [png(), made_png(header(4, 6, 16))]}, "got depth 16, colour type 2; convert it to RGB"),
    ({"images": [png(), made_png(header(4, 6, 8, 6))]}, "got depth 8, colour type 6"),
    ({"images": [png(), made_png(header(0, 6))]}, "one whose header is damaged"),
    ({"images": [png(), made_png(chunk(b"tEXt", b"a" * 30), header(4, 6))]}, "one whose header is damaged"),
    ({"images": [png(), made_png(header(4, 6))]}, r"images\[1\]: expected a PNG, got a damaged one"),
    ({"images": [png(), made_png(header(4, 6), header(90, 90), chunk(b"IDAT", zlib.compress(b"")))]}, "two headers"),
    ({"prompts": ...}, "body: expected a list under 'prompts', got nothing"),
    ({"prompts": [{"text": "a"}, "b"]}, r"prompts\[1\]: expected an object, got 'b'"),
    ({"prompts": [{"text": "a"}, {}]}, r"prompts\[1\]: expected text under 'text', got nothing"),
    ({"prompts": [{"text": 1}]}, r"prompts\[0\]: expected text under 'text', got 1"),
    ({"prompts": [{"text": "a", "metdata": {}}]}, r"prompts\[0\]: .* got 'metdata'; did you mean 'metadata'\?"),
    ({"prompts": [{"text": "a", "metadata": []}]}, "expected an object under 'metadata', got a list of 0"),
    ({"prompts": [{"text": "a", "id": None}]}, "expected text under 'id', got null"),
    ({"prompts": [{"text": "a", "source_images": ["x"]}], "groups": [0, 0]}, r"prompts\[0\].source_images\[0\]: "),
    ({"prompts": [{"text": "a"}], "groups": ...}, "prompts: expected one for each of 2 images, got 1"),
    ({"groups": [0]}, "groups: expected the index of a prompt for each of 2 images, got 1"),
    ({"groups": [0, 2]}, r"groups\[1\]: expected an index below 2, the prompts, got 2"),
    ({"groups": [0, -1]}, r"groups\[1\]"),
    ({"groups": [0, True]}, r"groups\[1\]"),
    ({"groups": [0, 1.0]}, r"groups\[1\]"),
    ({"groups": [0, [1]]}, r"groups\[1\]"),
    ({"groups": [0, 0]}, r"prompts\[1\]: expected an image in groups, got none"),
    ({"image": []}, "body: expected the keys images, prompts, groups, got 'image'; did you mean 'images'"),
    ({"x" * 10**6: 1}, "body: expected the keys"),
]


@pytest.mark.parametrize(("changes", "message"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_request_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_request(body(**changes), LIMITS)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe{}",
        "{}".encode("utf-16"),
        b'{"images": NaN}',
        b'{"images": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"images": 1%s}' % (b"0" * 5000),
    ],
    ids=range(10),
)
def test_what_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(RequestError, match=r"body: expected (JSON|an object)") as caught:
        parse_request(text, LIMITS)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("changes", "limits", "message"),
    [
        ({}, {"max_body_bytes": 100}, "body: expected at most 100 bytes"),
        ({}, {"max_images": 1}, "images: expected at most 1 images, got 2"),
        ({}, {"max_pixels": 23}, r"images\[0\]: expected at most 23 pixels, got 24"),
        ({}, {"max_request_pixels": 47}, "body: expected at most 47 pixels, got 48"),
        ({}, {"max_values": 10}, "body: expected at most 10 values"),
        (
            {"prompts": [{"text": "a", "source_images": [png(), png()]}, {"text": "b"}]},
            {"max_source_images": 1},
            "source_images: expected at most 1 source images, got 2",
        ),
        ({"images": [made_png(header(2**31 - 1, 2**31 - 1))] * 2}, {}, r"images\[0\]: expected at most \d+ pixels"),
        ({"metadata": [[]] * 2**20}, {}, "body: expected at most 1048576 values"),
    ],
    ids=range(8),
)
def test_what_is_too_large_is_refused_with_413(changes: dict[str, Any], limits: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_request(body(**changes), Limits(**limits))
    assert caught.value.status == 413


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("PIL.Image.open", never)
    bomb = made_png(header(30_000, 30_000), chunk(b"IDAT", zlib.compress(b"\0" * 10**6)))
    with pytest.raises(RequestError, match="expected at most 4194304 pixels, got 900000000"):
        parse_request(body(images=[png(), bomb]), LIMITS)


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="max_pixels: expected 1 or more, got 0"):
        Limits(max_pixels=0)


# Anything at all: it is refused with a reason, or it is a request.

VALUES: list[Any] = [None, True, -1, 2**70, 0.5, "", "x", "\ud800", [], [[]], {}, {"a": 1}, "AAAA", [0, 0], [None] * 5]


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from nodes(entry, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    if new is ...:
        del copy[path[0]]
    if new is not ... or len(path) > 1:
        copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def with_another_node(valid: dict[str, Any], draw: random.Random) -> bytes:
    path = draw.choice(list(nodes(valid))[1:])
    return json.dumps(replaced(valid, path, draw.choice(VALUES))).encode()


def with_another_key(valid: dict[str, Any], draw: random.Random) -> bytes:
    place = draw.choice([valid, valid["prompts"][0]])
    changed = {**place, draw.choice(["image", "url", "file", "", "text ", "__class__"]): draw.choice(VALUES)}
    return json.dumps(changed if place is valid else {**valid, "prompts": [changed, *valid["prompts"][1:]]}).encode()


def cut_short(valid: dict[str, Any], draw: random.Random) -> bytes:
    text = json.dumps(valid).encode()
    return text[: draw.randrange(len(text) - 1)]


def with_other_bytes(valid: dict[str, Any], draw: random.Random) -> bytes:
    text = bytearray(json.dumps(valid).encode())
    for _ in range(draw.randint(1, 4)):
        text[draw.randrange(len(text))] = draw.randrange(256)
    return bytes(text)


def with_a_damaged_png(valid: dict[str, Any], draw: random.Random) -> bytes:
    data = bytearray(base64.b64decode(png()))
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    damaged = base64.b64encode(data[: draw.randint(1, len(data))]).decode()
    return json.dumps({**valid, "images": [png(), damaged]}).encode()


def noise(valid: dict[str, Any], draw: random.Random) -> bytes:
    return draw.randbytes(draw.randint(0, 200))


FUZZERS: list[Callable[[dict[str, Any], random.Random], bytes]] = [
    with_another_node,
    with_another_key,
    cut_short,
    with_other_bytes,
    with_a_damaged_png,
    noise,
]


def fuzzed(count: int, seed: int) -> Iterator[bytes]:
    """Bodies of which nearly all are malformed."""
    draw = random.Random(seed)
    rows = [{"text": "a", "source_images": [png()], "metadata": {"k": [1]}, "id": "i", "group": "g"}, {"text": "b"}]
    valid = document(prompts=rows)
    for i in range(count):
        yield FUZZERS[i % len(FUZZERS)](valid, draw)


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Image appears to be a malformed")
def test_ten_thousand_malformed_bodies_are_refused_with_a_reason() -> None:
    refusals, accepted = [], 0
    for text in fuzzed(14_000, seed=1):
        try:
            images, prompts = parse_request(text, LIMITS)
        except RequestError as error:
            refusals.append(error)
            continue
        accepted += 1
        assert len(images) == len(prompts)
    assert len(refusals) >= 10_000, (len(refusals), accepted)
    assert {error.status for error in refusals} <= {400, 413}
    assert all(0 < len(str(error)) < 400 for error in refusals)
