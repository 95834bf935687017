"""The GenEval rule: hand-worked cases for every tag, then 10 000 random images against an independent derivation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.geneval import (
    Detection,
    GenEvalRule,
    geneval_reward,
    geneval_strict,
    validate_metadata,
)
from rewards.relations import Box, relative_position

RULE = GenEvalRule()
PUBLISHED = GenEvalRule(published_quirks=True)


def found(
    label: str, color: str | None = None, at: tuple[float, float] = (0, 0), confidence: float = 0.95
) -> Detection:
    """A 10 by 10 detection with its top left corner at ``at``."""
    return Detection(label, (at[0], at[1], at[0] + 10, at[1] + 10), color, confidence)


def asks(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "prompt": ""} | ({"exclude": list(exclude)} if exclude else {})


BENCH = asks("single_object", {"class": "bench", "count": 1})
TWO = asks("two_object", {"class": "cup", "count": 1}, {"class": "fork", "count": 1})
THREE = asks("counting", {"class": "orange", "count": 3}, exclude=[{"class": "orange", "count": 4}])
BLACK = asks("colors", {"class": "table", "count": 1, "color": "black"})
ABOVE = asks("position", {"class": "sink", "count": 1}, {"class": "tie", "count": 1, "position": ["above", 0]})
ATTR = asks(
    "color_attr", {"class": "boat", "count": 1, "color": "white"}, {"class": "cup", "count": 1, "color": "orange"}
)
RED_LEFT_OF_BLUE = asks(
    "position",
    {"class": "square", "count": 1, "color": "blue"},
    {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
)
TIE_ABOVE = [found("sink", at=(0, 50)), found("tie", at=(0, 0))]
TIE_BELOW = [found("sink", at=(0, 0)), found("tie", at=(0, 50))]
BLUE_SQUARE = found("square", "blue", at=(50, 0))

# name: (detections, metadata, official, dense score, strict, published score)
GOLDEN: dict[str, tuple[list[Detection], dict[str, Any], bool, float, bool, float]] = {
    "single: there": ([found("bench")], BENCH, True, 1.0, True, 1.0),
    "single: absent": ([found("chair")], BENCH, False, 0.0, False, 0.0),
    "single: two are enough officially": ([found("bench")] * 2, BENCH, True, 0.0, False, 0.0),
    "single: three, published count term is -1": ([found("bench")] * 3, BENCH, True, 0.0, False, -1.0),
    "two: both": ([found("cup"), found("fork")], TWO, True, 1.0, True, 1.0),
    "two: one": ([found("cup")], TWO, False, 0.5, False, 0.5),
    "two: one, and three of the other": ([found("cup")] + [found("fork")] * 3, TWO, True, 0.5, False, 0.0),
    "counting: three": ([found("orange")] * 3, THREE, True, 1.0, True, 1.0),
    "counting: two": ([found("orange")] * 2, THREE, False, 2 / 3, False, 2 / 3),
    "counting: four fall under exclude": ([found("orange")] * 4, THREE, False, 2 / 3, False, 2 / 3),
    "counting: seven, clamped": ([found("orange")] * 7, THREE, False, 0.0, False, -1 / 3),
    "colors: right": ([found("table", "black")], BLACK, True, 1.0, True, 1.0),
    "colors: wrong": ([found("table", "white")], BLACK, False, 0.5, False, 0.5),
    "colors: unknown": ([found("table")], BLACK, False, 0.5, False, 0.5),
    "colors: absent": ([], BLACK, False, 0.0, False, 0.0),
    "colors: the most confident one is tested": (
        [found("table", "white", confidence=0.5), found("table", "black", confidence=0.6)],
        BLACK, True, 0.0, False, 0.0,
    ),
    "colors: and it alone": (
        [found("table", "white", confidence=0.7), found("table", "black", confidence=0.6)],
        BLACK, False, 0.0, False, 0.0,
    ),
    "position: above": (TIE_ABOVE, ABOVE, True, 1.0, True, 1.0),
    # terms: sink 1, tie 1, position 0; published: 1, 1, and for the position 0 and 1, half a point
    "position: below": (TIE_BELOW, ABOVE, False, 2 / 3, False, 0.75),
    # terms: sink 0, tie 1, position 0 (no reference; the published code adds no 1 here)
    "position: no reference": ([found("tie")], ABOVE, False, 1 / 3, False, 1 / 3),
    "position: two references, official tests the best": (
        [*TIE_ABOVE, found("sink", at=(0, -50), confidence=0.4)], ABOVE, True, 1 / 3, False, 1 / 3,
    ),
    "position: no tie": ([found("sink")], ABOVE, False, 1 / 3, False, 1 / 3),
    "color_attr: both": ([found("boat", "white"), found("cup", "orange")], ATTR, True, 1.0, True, 1.0),
    "color_attr: swapped": ([found("boat", "orange"), found("cup", "white")], ATTR, False, 0.5, False, 0.5),
    "color_attr: one missing": ([found("boat", "white")], ATTR, False, 0.5, False, 0.5),
    # terms: square 1, blue 1, circle 1, red, left of
    "colour and position": ([found("circle", "red"), BLUE_SQUARE], RED_LEFT_OF_BLUE, True, 1.0, True, 1.0),
    "colour wrong, so position 0; unpublished": (
        [found("circle", "green"), BLUE_SQUARE], RED_LEFT_OF_BLUE, False, 3 / 5, False, 3 / 4,
    ),
    "position wrong": (
        [found("circle", "red", at=(90, 0)), BLUE_SQUARE], RED_LEFT_OF_BLUE, False, 4 / 5, False, 5 / 6,
    ),
    "another circle in another colour": (
        [found("circle", "red"), found("circle", "green", confidence=0.5), BLUE_SQUARE],
        RED_LEFT_OF_BLUE, True, 2 / 5, False, 2 / 4,
    ),
    "reference in the wrong colour": (
        [found("circle", "red"), found("square", "green", at=(50, 0))], RED_LEFT_OF_BLUE, False, 3 / 5, False, 3 / 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    detections, metadata, official, dense, strict, published = GOLDEN[name]
    result = RULE.dense(detections, metadata)
    assert RULE.official(detections, metadata) is official
    assert result.score == pytest.approx(dense)
    assert result.strict is strict
    assert (not result.reasons) is strict
    assert PUBLISHED.dense(detections, metadata).score == pytest.approx(published)
    assert PUBLISHED.dense(detections, metadata).strict is strict


def test_exclude_of_a_class_that_is_not_included() -> None:
    metadata = asks("single_object", {"class": "cup", "count": 1}, exclude=[{"class": "dog", "count": 1}])
    with_dog = [found("cup"), found("dog")]
    assert RULE.official([found("cup")], metadata)
    assert not RULE.official(with_dog, metadata)
    assert RULE.official_reasons(with_dog, metadata) == ("expected dog < 1, found 1",)
    assert (RULE.dense(with_dog, metadata).score, RULE.dense(with_dog, metadata).strict) == (1.0, False)
    assert PUBLISHED.dense(with_dog, metadata).strict


@pytest.mark.parametrize(("tag", "threshold"), [("single_object", 0.3), ("counting", 0.9)])
def test_confidence_must_exceed_the_threshold(tag: str, threshold: float) -> None:
    metadata = asks(tag, {"class": "bench", "count": 1})
    assert not RULE.official([found("bench", confidence=threshold)], metadata)
    assert RULE.official([found("bench", confidence=float(np.nextafter(threshold, 1)))], metadata)


def test_only_the_most_confident_objects_are_kept() -> None:
    crowd = [found("bench", confidence=0.4 + i / 100) for i in range(20)]
    exactly = asks("single_object", {"class": "bench", "count": 16})
    assert RULE.dense(crowd, exactly).strict
    assert not RULE.official(crowd, asks("counting", *exactly["include"]))
    assert GenEvalRule(max_objects=17).dense(crowd, exactly).score == pytest.approx(15 / 16)
    best = [*crowd[:3], found("bench", "red", confidence=0.99)]
    assert GenEvalRule(max_objects=1).dense(best, asks("colors", {"class": "bench", "count": 1, "color": "red"})).strict


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-50, 0, -40, 10), {"left of"}),
        ((50, 0, 60, 10), {"right of"}),
        ((0, -50, 10, -40), {"above"}),
        ((0, 50, 10, 60), {"below"}),
        ((-50, -50, -40, -40), {"left of", "above"}),
        ((50, 50, 60, 60), {"right of", "below"}),
        ((0, 0, 10, 10), set()),
        # Offset 2 equals the margin 0.1 * (10 + 10): nothing is left of it.
        ((2, 0, 12, 10), set()),
        # (4 - 2) / 4 is exactly one half, which is not beyond it; (4.5 - 2) / 4.5 is.
        ((4, 0, 14, 10), set()),
        ((4.5, 0, 14.5, 10), {"right of"}),
        # Unit vector of the unshrunk offset: (28 / 50, 38 / 50), and (18 / 50, 46 / 50).
        ((30, 40, 40, 50), {"right of", "below"}),
        ((14, 48, 24, 58), {"below"}),
    ],
)
def test_relative_position(box: Box, expected: set[str]) -> None:
    assert relative_position(box, (0, 0, 10, 10)) == expected


def test_relative_position_threshold() -> None:
    assert relative_position((4, 0, 14, 10), (0, 0, 10, 10), position_threshold=0.0) == {"right of"}
    assert relative_position((4, 0, 14, 10), (0, 0, 10, 10), position_threshold=0.2) == set()


def _with_clause(**changes: Any) -> dict[str, Any]:
    """The position prompt with its second clause changed."""
    return asks("position", {"class": "sink", "count": 1}, {"class": "tie", "count": 1} | changes)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (_with_clause(position=["letf of", 0]), r"include\[1\].position\[0\].*got 'letf of'; did you mean 'left of'"),
        (_with_clause(position=["above", 1]), r"include\[1\].position\[1\]: expected an index from 0 to 0, got 1"),
        (_with_clause(position=["above", -1]), r"position\[1\].*got -1"),
        (_with_clause(position=["above", True]), r"position\[1\].*got True"),
        (_with_clause(position="above"), r"position: expected \[relation, index of an earlier clause\], got 'above'"),
        (_with_clause(colour="red"), r"include\[1\], key.*got 'colour'; did you mean 'color'"),
        (_with_clause(color=None), r"include\[1\].color: expected a non-empty string, got None"),
        (_with_clause(count=0), r"include\[1\].count: expected an integer of at least 1, got 0"),
        (_with_clause(count=1.0), r"count.*got 1.0"),
        (_with_clause(count=True), r"count.*got True"),
        (_with_clause(**{"class": ""}), r"include\[1\].class: expected a non-empty string, got ''"),
        (_with_clause(**{"class": "sink"}), r"include\[1\].class: expected a class that no earlier clause has"),
        (asks("position", {"class": "a", "count": 1, "position": ["above", 0]}), "the first clause has none"),
        (asks("colors", {"count": 1}), r"include\[0\].class.*got None"),
        (asks("colors", {"class": "cup"}), r"include\[0\].count.*got None"),
        (asks("colours", {"class": "cup", "count": 1}), "tag.*got 'colours'; did you mean 'colors'"),
        ({"include": [{"class": "cup", "count": 1}]}, "tag: expected one of .* got None"),
        ({"tag": "colors"}, r"include: expected at least one clause"),
        (asks("colors"), "include: expected at least one clause"),
        ({"tag": "colors", "include": {"class": "cup"}}, "include: expected a list of clauses, got {"),
        ({"tag": "colors", "include": ["cup"]}, r"include\[0\]: expected a mapping"),
        (BENCH | {"exclude": [{"class": "cup", "count": 1, "color": "red"}]}, r"exclude\[0\], key.*got 'color'"),
        ("a photo of a cup", "metadata: expected a mapping"),
    ],
)
def test_invalid_metadata_is_named(metadata: Any, message: str) -> None:
    for read in (validate_metadata, lambda data: RULE.dense([], data), lambda data: RULE.official([], data)):
        with pytest.raises(ValueError, match=message):
            read(metadata)


@pytest.mark.parametrize(
    "field",
    [{"threshold": 1.5}, {"counting_threshold": -0.1}, {"position_threshold": float("nan")}, {"max_objects": 0}],
)
def test_invalid_rule_is_named(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))}: expected"):
        GenEvalRule(**field)


# An independent derivation: arrays, masks and pairwise tensors instead of loops over objects.


@dataclass(frozen=True)
class _Image:
    """Columns of a detection table."""

    labels: NDArray[Any]
    colors: NDArray[Any]
    boxes: NDArray[np.float64]
    confidence: NDArray[np.float64]

    def rows(self) -> list[Detection]:
        columns = zip(self.labels, self.boxes, self.colors, self.confidence, strict=True)
        return [Detection(str(a), tuple(map(float, b)), str(c), float(d)) for a, b, c, d in columns]  # type: ignore[arg-type]


def _indices(image: _Image, name: str, threshold: float, limit: int) -> NDArray[np.int64]:
    order = np.argsort(-image.confidence, kind="stable")
    kept: NDArray[np.int64] = order[(image.labels[order] == name) & (image.confidence[order] > threshold)]
    return kept[:limit]


def _all_pairs_related(a: NDArray[np.float64], b: NDArray[np.float64], relation: str) -> bool:
    corners_a, corners_b = a.reshape(-1, 1, 2, 2), b.reshape(1, -1, 2, 2)
    offset = corners_a.mean(2) - corners_b.mean(2)
    size = np.ptp(corners_a, 2) + np.ptp(corners_b, 2)
    norm = np.linalg.norm(offset, axis=-1, keepdims=True)
    unit = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * size, 0) / np.where(norm > 0, norm, 1)
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    return bool(np.all(sign * unit[..., axis] > 0.5))


def _derive(image: _Image, metadata: dict[str, Any], limit: int) -> tuple[bool, float, bool, float]:
    """(official, dense score, strict, published score) of an image."""
    threshold = {True: 0.9, False: 0.3}[metadata["tag"] == "counting"]
    kept = [_indices(image, clause["class"], threshold, limit) for clause in metadata["include"]]
    wanted = np.array([clause["count"] for clause in metadata["include"]])
    excluded = any(
        len(_indices(image, c["class"], threshold, limit)) >= c["count"] for c in metadata.get("exclude", [])
    )
    held: dict[str, list[bool]] = {"official": [], "exact": []}
    terms: list[float] = []
    published: list[float] = []
    for i, clause in enumerate(metadata["include"]):
        n, number = wanted[i], len(kept[i])
        relation, target = clause.get("position", ("", -1))
        for mode, chosen in (("official", [k[:w] for k, w in zip(kept, wanted, strict=True)]), ("exact", kept)):
            counted = number >= n if mode == "official" else number == n
            colored = bool(np.all(image.colors[chosen[i]] == clause["color"])) if "color" in clause else True
            placed = not relation or (
                held[mode][target] and _all_pairs_related(image.boxes[chosen[i]], image.boxes[chosen[target]], relation)
            )
            held[mode].append(counted and colored and placed)
        share = float(np.mean(image.colors[kept[i]] == clause["color"])) if "color" in clause and number == n else 0.0
        terms += [max(0, 1 - abs(n - number) / n)] + [share] * ("color" in clause)
        terms += [float(held["exact"][i])] * bool(relation)
        published.append(1 - abs(n - number) / n)
        if number != n:
            published += [0.0] * bool("color" in clause or relation)
            continue
        published += [share] * ("color" in clause)
        if relation and (share == 1 or "color" not in clause):
            published += [1.0] if held["exact"][i] else [0.0, 1.0] if held["exact"][target] else [0.0]
    official = all(held["official"]) and not excluded
    return official, float(np.mean(terms)), all(held["exact"]) and not excluded, float(np.mean(published))


def _random_image(rng: np.random.Generator) -> _Image:
    size = int(rng.integers(0, 8))
    corner = rng.integers(0, 40, (size, 2)).astype(float)
    return _Image(
        labels=rng.choice(np.array(["a", "b", "c"]), size),
        colors=rng.choice(np.array(["red", "blue"]), size, p=[0.8, 0.2]),
        boxes=np.concatenate([corner, corner + rng.integers(1, 9, (size, 2))], axis=1),
        confidence=rng.choice([0.1, 0.3, 0.31, 0.6, 0.9, 0.91, 0.99], size),
    )


def _random_metadata(rng: np.random.Generator) -> dict[str, Any]:
    include: list[dict[str, Any]] = []
    for i, name in enumerate(rng.permutation(["a", "b", "c"])[: rng.integers(1, 4)]):
        clause: dict[str, Any] = {"class": str(name), "count": int(rng.choice([1, 1, 1, 2, 3]))}
        if rng.random() < 0.4:
            clause["color"] = "red"
        if i and rng.random() < 0.5:
            clause["position"] = [str(rng.choice(["left of", "right of", "above", "below"])), int(rng.integers(i))]
        include.append(clause)
    exclude = [{"class": str(rng.choice(["a", "b", "c"])), "count": int(rng.integers(1, 4))}] * int(rng.random() < 0.3)
    return asks(str(rng.choice(["counting", "position", "two_object"])), *include, exclude=exclude)


def test_ten_thousand_random_images_agree_with_the_derivation() -> None:
    rng = np.random.default_rng(0)
    outcomes = []
    for trial in range(10_000):
        image, metadata = _random_image(rng), _random_metadata(rng)
        limit = (16, 2)[trial % 2]
        expected = _derive(image, metadata, limit)
        rule, quirky = GenEvalRule(max_objects=limit), GenEvalRule(max_objects=limit, published_quirks=True)
        detections = image.rows()
        result, official = rule.dense(detections, metadata), rule.official(detections, metadata)
        published = quirky.dense(detections, metadata).score
        assert (official, result.strict) == (expected[0], expected[2]), (image, metadata)
        assert (result.score, published) == pytest.approx((expected[1], expected[3])), (image, metadata)
        assert not result.strict or (official and result.score == 1.0)
        assert 0 <= result.score <= 1
        outcomes.append((official, result.strict, official and not result.strict, published != result.score))
    # Every kind of outcome must have been drawn.
    assert np.sum(outcomes, axis=0).min() > 300


def test_order_of_detections_is_irrelevant() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        image, metadata = _random_image(rng), _random_metadata(rng)
        distinct = _Image(image.labels, image.colors, image.boxes, rng.permutation(len(image.labels)) / 8 + 0.1)
        rows = distinct.rows()
        shuffled = [rows[i] for i in rng.permutation(len(rows))]
        assert RULE.dense(rows, metadata) == RULE.dense(shuffled, metadata)
        assert RULE.official_reasons(rows, metadata) == RULE.official_reasons(shuffled, metadata)


# The rewards.


@dataclass(frozen=True)
class _Asked:
    metadata: dict[str, Any]


def _bench_counter(images: NDArray[np.uint8]) -> list[list[Detection]]:
    """Finds as many benches as the first pixel says."""
    return [[found("bench")] * int(image[0, 0, 0]) for image in images]


def _images(*first_pixels: int) -> NDArray[np.uint8]:
    return np.array(first_pixels, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=-1)


def test_rewards_score_each_row_and_mask_invalid_prompts(caplog: pytest.LogCaptureFixture) -> None:
    two = asks("single_object", {"class": "bench", "count": 2})
    prompts = [_Asked(BENCH), _Asked({"tag": "edit"}), _Asked(two), _Asked(two)]
    with caplog.at_level(logging.WARNING):
        dense = geneval_reward(_bench_counter)(_images(1, 1, 1, 2), prompts)
    assert "1 of 4 samples masked; first prompt 1: tag" in caplog.text
    assert dense.dtype == np.float32
    np.testing.assert_array_equal(dense, np.array([1, np.nan, 0.5, 1], np.float32))
    strict = geneval_strict(_bench_counter)(_images(1, 1, 1, 2), prompts)
    assert strict.dtype == np.float32
    np.testing.assert_array_equal(strict, np.array([1, np.nan, 0, 1], np.float32))


def test_reward_uses_the_rule_and_keeps_a_fully_masked_batch_from_the_detector() -> None:
    published = geneval_reward(_bench_counter, PUBLISHED)
    assert published(_images(3), [_Asked(BENCH)]).tolist() == [-1.0]

    def must_not_run(images: NDArray[np.uint8]) -> list[list[Detection]]:
        raise AssertionError(images.shape)

    assert np.isnan(geneval_reward(must_not_run)(_images(1, 2), [_Asked({}), _Asked({})])).all()
    assert geneval_reward(must_not_run)(_images(), []).shape == (0,)


def test_reward_names_mismatched_inputs() -> None:
    reward = geneval_reward(_bench_counter)
    with pytest.raises(ValueError, match="prompts: expected one for each of 2 images, got 1"):
        reward(_images(1, 2), [_Asked(BENCH)])
    with pytest.raises(ValueError, match=r"images: expected uint8 \[B,H,W,3\], got float64 \[1, 1, 1, 3\]"):
        reward(_images(1).astype(np.float64), [_Asked(BENCH)])
    with pytest.raises(ValueError, match="detector: expected detections for 1 images, got 0"):
        geneval_reward(lambda images: [])(_images(1), [_Asked(BENCH)])
