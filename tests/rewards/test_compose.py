"""The weighted sum: its numbers, what masks it, how members are called, what cannot be composed."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rewards.base import Images, Prompt, Reward, RewardTraits, Scores, Unavailable, declare, reward_traits
from rewards.checker import check_reward
from rewards.compose import WeightedSum, weighted_scores
from rewards.pixel import redness
from rewards.scoring import score

PROMPTS = [Prompt(text) for text in ("a", "bb", "ccc", "dddd")]
IMAGES = np.arange(4, dtype=np.uint8).repeat(2 * 2 * 3).reshape(4, 2, 2, 3) * 10
NAN = float("nan")


def light(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """0, 10, 20, 30 on IMAGES."""
    return np.asarray(images.mean((1, 2, 3)), np.float32)


async def length(images: Images, prompts: Sequence[Prompt]) -> Scores:
    """1, 2, 3, 4 on PROMPTS, with a part."""
    await asyncio.sleep(0)
    values = np.array([len(prompt.text) for prompt in prompts], np.float32)
    return Scores(values, {"half": values * np.float32(0.5)})


@declare(RewardTraits(scope="group", fingerprint="rank v1"))
def rank(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    return np.asarray(images.mean((1, 2, 3)).argsort().argsort(), np.float32)


def returns(*values: float) -> Reward:
    def constant(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        return np.array(values[: len(images)], np.float32)

    return constant


def missing(images: Images, prompts: Sequence[Prompt]) -> Scores:
    raise Unavailable("the judge is down")


def test_the_sum_and_its_components() -> None:
    found = score(WeightedSum({"light": light, "length": length}, {"light": 0.1, "length": -2.0}), IMAGES, PROMPTS)
    np.testing.assert_allclose(found.total, [-2, -3, -4, -5], rtol=1e-6)
    assert found.total.dtype == np.float32
    assert {name: values.tolist() for name, values in found.components.items()} == {
        "light": [0, 10, 20, 30],
        "length": [1, 2, 3, 4],
        "length/half": [0.5, 1, 1.5, 2],
    }
    assert found.reasons == {}


def test_a_held_out_reward_is_logged_and_enters_nothing() -> None:
    weighted = WeightedSum({"light": light}, {"light": 2}, {"down": missing, "length": length})
    found = score(weighted, IMAGES, PROMPTS)
    assert found.total.tolist() == [0, 20, 40, 60]
    assert np.isnan(found.components["down"]).all()
    assert found.components["length/half"].tolist() == [0.5, 1, 1.5, 2]
    assert found.reasons == {}


def test_a_missing_member_masks_the_sum_unless_its_weight_is_zero() -> None:
    rewards = {"light": light, "gaps": returns(NAN, 1, NAN, 1), "other": returns(NAN, NAN, 1, 1)}
    found = score(WeightedSum(rewards, {"light": 1, "gaps": 1, "other": 0}), IMAGES, PROMPTS)
    np.testing.assert_array_equal(found.total, np.array([NAN, 11, NAN, 31], np.float32))
    assert found.reasons == {index: "gaps: constant gave NaN without a reason" for index in (0, 2)}


def test_reasons_of_all_that_is_missing_are_joined() -> None:
    weighted = WeightedSum({"judge": missing, "gaps": returns(1, NAN)}, {"judge": 1, "gaps": 1})
    assert score(weighted, IMAGES[:2], PROMPTS[:2]).reasons == {
        0: "judge: the judge is down",
        1: "judge: the judge is down; gaps: constant gave NaN without a reason",
    }


def test_a_member_s_defect_is_the_sum_s() -> None:
    def fails(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        raise LookupError("a defect")

    with pytest.raises(LookupError, match="a defect"):
        score(WeightedSum({"light": light, "bad": fails}, {"light": 1, "bad": 0}), IMAGES, PROMPTS)
    with pytest.raises(LookupError, match="a defect"):
        score(WeightedSum({"light": light}, {"light": 1}, {"bad": fails}), IMAGES, PROMPTS)


def test_a_member_s_wrong_shape_is_named_by_the_member() -> None:
    with pytest.raises(ValueError, match=r"constant: expected one number an image, shape \(4,\), got float32 \(1,\)"):
        score(WeightedSum({"a": returns(1)}, {"a": 1}), IMAGES, PROMPTS)


def test_members_run_at_the_same_time() -> None:
    barrier = threading.Barrier(2)

    def meets(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        barrier.wait(timeout=10)  # Passes only while the other one is running.
        return light(images, prompts)

    def meets_too(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        return meets(images, prompts)

    weighted = WeightedSum({"a": meets, "b": meets_too}, {"a": 1, "b": 1})
    assert score(weighted, IMAGES, PROMPTS).total.tolist() == [0, 20, 40, 60]


def test_each_member_has_its_own_batches_and_groups() -> None:
    sizes: dict[str, list[int]] = {"sample": [], "group": []}

    def sized(name: str, traits: RewardTraits) -> Reward:
        @declare(traits)
        def reward(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
            sizes[name].append(len(images))
            return light(images, prompts)

        return reward

    rewards = {
        "sample": sized("sample", RewardTraits(batch_size=2)),
        "group": sized("group", RewardTraits(scope="group")),
    }
    weighted = WeightedSum(rewards, {"sample": 1, "group": 1})
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    assert score(weighted, IMAGES, prompts).total.tolist() == [0, 20, 40, 60]
    assert sizes == {"sample": [2, 1, 1], "group": [3, 1]}


@pytest.mark.parametrize("is_async", [False, True])
def test_a_member_s_concurrency_holds_over_all_groups(is_async: bool) -> None:
    """Groups are scored four at a time, as one member asks, and the other is still called once at a time."""
    lock, running, most = threading.Lock(), 0, 0

    def count(change: int) -> None:
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)

    @declare(RewardTraits(batch_size=1, concurrency=2))
    async def asynchronous(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        count(+1)
        await asyncio.sleep(0.01)
        count(-1)
        return light(images, prompts)

    @declare(RewardTraits(batch_size=1, concurrency=2))
    def plain(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        count(+1)
        threading.Event().wait(0.01)
        count(-1)
        return light(images, prompts)

    groups = declare(RewardTraits(scope="group", concurrency=4))(lambda images, prompts: rank(images, prompts))
    bounded: Reward = asynchronous if is_async else plain
    weighted = WeightedSum({"bounded": bounded, "rank": groups}, {"bounded": 1, "rank": 0})
    assert reward_traits(weighted).concurrency == 4
    assert score(weighted, IMAGES, PROMPTS).total.tolist() == [0, 10, 20, 30]
    assert most == 2


def test_a_member_may_score_in_a_thread_itself() -> None:
    """Its event loops are others than the sum's, and share nothing that belongs to one loop."""
    slow = declare(RewardTraits(batch_size=1, concurrency=1))(length)

    def inner(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        return score(slow, images, prompts).total

    def inner_too(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        return inner(images, prompts)

    weighted = WeightedSum({"a": inner, "b": inner_too, "c": slow}, {"a": 1, "b": 1, "c": 1})
    assert score(weighted, IMAGES, PROMPTS).total.tolist() == [3, 6, 9, 12]


def test_sums_of_sums() -> None:
    inner = WeightedSum({"light": light, "length": length}, {"light": 1, "length": 1})
    found = score(WeightedSum({"inner": inner, "rank": rank}, {"inner": 2, "rank": 1}), IMAGES, [PROMPTS[0]] * 4)
    assert found.total.tolist() == [2, 23, 44, 65]
    assert set(found.components) == {"inner", "inner/light", "inner/length", "inner/length/half", "rank"}


def test_within_a_running_event_loop() -> None:
    async def cell() -> Scores:
        return score(WeightedSum({"light": light, "length": length}, {"light": 1, "length": 1}), IMAGES, PROMPTS)

    assert asyncio.run(cell()).total.tolist() == [1, 12, 23, 34]


def test_an_empty_batch() -> None:
    assert score(WeightedSum({"length": length}, {"length": 1}), IMAGES[:0], []).total.tolist() == []


def test_the_contract_holds() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    check_reward(WeightedSum({"red": redness, "length": length}, {"red": 0.5, "length": 0.5}), images, prompts)
    check_reward(WeightedSum({"red": redness, "rank": rank}, {"red": 1, "rank": 1}, {"len": length}), images, prompts)


def test_traits() -> None:
    sample = reward_traits(WeightedSum({"light": light}, {"light": 1}))
    group = reward_traits(WeightedSum({"light": light}, {"light": 1}, {"rank": rank}))
    assert (sample.scope, group.scope) == ("sample", "group")
    assert sample.batch_size is None


def test_the_fingerprint_is_made_of_all_that_matters() -> None:
    def of(rewards: Mapping[str, Reward], weights: Mapping[str, float], **held_out: Reward) -> str:
        return reward_traits(WeightedSum(rewards, weights, held_out)).fingerprint

    base = of({"a": light, "b": rank}, {"a": 1, "b": 2})
    assert "rank v1" in base
    assert base == of({"b": rank, "a": light}, {"b": 2.0, "a": 1.0})
    others = [
        of({"a": light, "c": rank}, {"a": 1, "c": 2}),
        of({"a": light, "b": rank}, {"a": 1, "b": 3}),
        of({"a": redness, "b": rank}, {"a": 1, "b": 2}),
        of({"a": light, "b": declare(RewardTraits(scope="group", fingerprint="v2"))(returns(1))}, {"a": 1, "b": 2}),
        of({"a": light, "b": rank}, {"a": 1, "b": 2}, c=light),
    ]
    assert len({base, *others}) == 6


values = st.one_of(st.just(NAN), st.floats(-1e3, 1e3, width=32))


@given(st.lists(st.tuples(values, values), min_size=1, max_size=6), st.floats(-5, 5), st.floats(-5, 5))
@settings(max_examples=60, deadline=None)
def test_the_sum_is_linear_and_missing_only_where_it_has_to_be(
    rows: list[tuple[float, float]], first: float, second: float
) -> None:
    a, b = np.array(rows, np.float32).T
    found = weighted_scores(
        {"a": _filled(a), "b": _filled(b), "held_out": _filled(np.full_like(a, NAN))}, {"a": first, "b": second}
    )
    expected = (0 if first == 0 else first * a.astype(float)) + (0 if second == 0 else second * b.astype(float))
    np.testing.assert_allclose(found.total, np.broadcast_to(expected, a.shape), rtol=1e-5, atol=1e-3, equal_nan=True)
    assert set(found.reasons) == set(np.flatnonzero(np.isnan(found.total)).tolist())


def _filled(total: NDArray[np.float32]) -> Scores:
    return Scores(total, {}, dict.fromkeys(np.flatnonzero(np.isnan(total)).tolist(), "why"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WeightedSum({"light": light}, {"ligth": 1}), "'ligth' is not among the rewards 'light'; did you mean"),
        (lambda: WeightedSum({}, {"x": 1}), r"'x' is not among the rewards \(none\); take it away"),
        (lambda: WeightedSum({"a": light, "b": light}, {"a": 1}), "got none for 'b'; give it one"),
        (lambda: WeightedSum({"a": light}, {"a": NAN}), r"weights\['a'\]: expected a finite number, got nan"),
        (lambda: WeightedSum({"a": light}, {"a": True}), "expected a finite number, got True"),
        (lambda: WeightedSum({"a": light}, {"a": "1"}), "expected a finite number, got '1'"),  # type: ignore[dict-item]
        (lambda: WeightedSum({"a": light}, {"a": 0}), "at least one that is not 0, .* belong in held_out"),
        (lambda: WeightedSum({}, {}), "at least one that is not 0"),
        (lambda: WeightedSum({"a": light}, {"a": 1}, {"a": light}), "'a' is in rewards too"),
        (lambda: WeightedSum({"a": light}, {"a": 1, "b": 1}, {"b": light}), "'b' is held out .* take its weight away"),
        (lambda: WeightedSum({"a": 3}, {"a": 1}), "a: expected a reward, which is callable, got int"),  # type: ignore[dict-item]
        (lambda: WeightedSum({"a/b": light}, {"a/b": 1}), "text without '/' .* got 'a/b'; rename it"),
        (lambda: WeightedSum({"total": light}, {"total": 1}), "is not 'total'"),
        (lambda: WeightedSum({"": light}, {"": 1}), "got ''"),
    ],
)
def test_what_cannot_be_composed_is_refused_at_once(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
