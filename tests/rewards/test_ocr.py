"""The OCR rule by hand, and the reward on text that is really rendered and really read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import Images, Prompt
from rewards.checker import check_reward
from rewards.ocr import OCR, OCRSettings, Unread, levenshtein, ocr_score, ocr_target
from rewards.scoring import score
from tests.rewards.tiny_models import pictures, written

SIGN = Prompt('a sign that says "Open Now"')


def reads(*lines: tuple[str, float]) -> Callable[[Images], Sequence[tuple[str, float]]]:
    def read(image: Images) -> Sequence[tuple[str, float]]:
        return lines

    return read


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_levenshtein(first: str, second: str, distance: int) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == distance


@given(st.text("ab", max_size=6), st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_levenshtein_is_a_metric(a: str, b: str, c: str) -> None:
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("target", "text", "expected"),
    [
        ("opennow", "opennow", 1.0),
        ("opennow", "xxopennowxx", 1.0),
        ("opennow", "opennov", 1 - 1 / 7),
        ("opennow", "open", 1 - 3 / 7),
        ("opennow", "", 0.0),
        # The distance is 12, more than the target is long.
        ("open", "abcdefghijkl", 0.0),
    ],
)
def test_the_rule_by_hand(target: str, text: str, expected: float) -> None:
    assert ocr_score(target, text) == pytest.approx(expected)


def test_case_and_spaces_count_in_neither_and_lines_are_joined() -> None:
    reward = OCR(read=reads(("OPEN", 0.9), (" n ow", 0.8), ("noise", 0.4)))
    scores = score(reward, pictures(1), [SIGN])
    assert scores.total.tolist() == [1.0]
    assert scores.components["exact"].tolist() == [1.0]
    with_noise = OCR(OCRSettings(min_confidence=0.3), read=reads(("OPEN", 0.9), ("now", 0.8), ("noise", 0.4)))
    scores = score(with_noise, pictures(1), [SIGN])
    assert (scores.total[0], scores.components["exact"][0]) == (1.0, 0.0)
    assert scores.components["excess"][0] == pytest.approx(5 / 7)


def test_repeated_text_costs_what_the_penalty_says() -> None:
    twice = reads(("open now open now", 0.9))
    assert score(OCR(read=twice), pictures(1), [SIGN]).total[0] == 1.0
    assert score(OCR(OCRSettings(excess_penalty=0.4), read=twice), pictures(1), [SIGN]).total[0] == pytest.approx(0.6)
    wrong = OCR(OCRSettings(excess_penalty=1.0), read=reads(("something else altogether", 0.9)))
    assert score(wrong, pictures(1), [SIGN]).total[0] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a sign", "expected the text to render in straight quotation marks"),
        ('a sign that says "Open', "got 'a sign that says \"Open'"),
        ("a sign that says “Open”", "replace “ and its like by straight ones"),
        ('a sign that says ""', "expected a text in the first pair of quotation marks, got nothing"),
        ('a sign that says " "', "got nothing"),
    ],
)
def test_a_prompt_without_a_target_is_an_error_at_load_and_nan_in_a_run(text: str, message: str) -> None:
    with pytest.raises(Unread, match=message):
        ocr_target(text)
    scores = score(OCR(read=reads(("open now", 0.9))), pictures(2), [Prompt(text), SIGN])
    assert np.isnan(scores.total).tolist() == [True, False]
    assert message.split("'")[0] in scores.reasons[0]


@pytest.mark.parametrize(
    ("text", "target"),
    [('"A" and "B"', "A"), ('A poster that reads "Grand Opening" in red', "Grand Opening"), ('"50% off!"', "50% off!")],
)
def test_the_target_is_the_first_quotation(text: str, target: str) -> None:
    assert ocr_target(text) == target


def test_an_image_that_cannot_be_read_is_nan_and_the_others_are_scored() -> None:
    def read(image: Images) -> Sequence[tuple[str, float]]:
        if image.mean() < 1:
            raise RuntimeError("bad shape")
        return [("open now", 1.0)]

    scores = score(OCR(read=read), np.stack([written("x"), np.zeros((256, 256, 3), np.uint8)]), [SIGN, SIGN])
    assert np.isnan(scores.total).tolist() == [False, True]
    assert scores.reasons == {1: "the image could not be read: RuntimeError: bad shape"}


@pytest.mark.parametrize("field", [{"min_confidence": 1.5}, {"excess_penalty": -1}, {"threads": 0}, {"batch_size": 0}])
def test_a_wrong_setting_is_named(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))}: expected"):
        OCRSettings(**field)  # type: ignore[arg-type]


def test_a_missing_rapidocr_is_named_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'rapidocr', and it is not installed: pip install 'pdtr\[ocr\]'"):
        OCR()


# With RapidOCR's own models.


@pytest.fixture(scope="module")
def reward() -> OCR:
    pytest.importorskip("rapidocr")
    return OCR(OCRSettings(batch_size=2))


def test_rendered_text_is_read(reward: OCR) -> None:
    images = np.stack([written("Open Now"), written("Open", "Now"), written("Closed"), written()])
    scores = score(reward, images, [SIGN] * 4)
    assert scores.total[:2].tolist() == [1.0, 1.0]
    # "closed" against "opennow": nothing but chance letters.
    assert scores.total[2] == pytest.approx(1 - levenshtein("opennow", "closed") / 7)
    assert scores.total[3] == 0.0
    assert scores.components["exact"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_spelling_mistake_costs_its_share(reward: OCR) -> None:
    scores = score(reward, written("Opeh Now")[None], [SIGN])
    assert scores.total[0] == pytest.approx(1 - 1 / 7)


def test_coloured_and_small_images_are_read(reward: OCR) -> None:
    image = written("HELLO", side=128, size=32).copy()
    image[image.max(-1) < 128] = (200, 0, 0)
    assert score(reward, image[None], [Prompt('"Hello"')]).total[0] == 1.0
    assert score(reward, pictures(1, side=8), [SIGN]).total[0] == 0.0


def test_it_keeps_the_contract(reward: OCR) -> None:
    check_reward(reward, np.stack([written("Open Now"), written("Shut"), written()]), [SIGN, SIGN, Prompt("no text")])
