import json
from copy import deepcopy

import numpy as np
import pytest
from gymnasium.spaces import Dict, Discrete, Tuple
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from hypothesis import given
from hypothesis import strategies as st

from envs.spaces import MAX_PROMPT_LENGTH, UnicodeText

TEXTS = st.text(st.characters(exclude_categories=("Cs",)))


@given(TEXTS)
def test_any_text_is_inside_and_survives_json(text: str) -> None:
    space = UnicodeText()
    assert text in space
    assert space.from_jsonable(json.loads(json.dumps(space.to_jsonable([text])))) == [text]


@pytest.mark.parametrize("text", ["", "👩‍🚀🇪🇺", "שלום ‮abc‬", "a\n\t\x00b", "a" * MAX_PROMPT_LENGTH])
def test_edges_are_inside(text: str) -> None:
    assert text in UnicodeText()


@pytest.mark.parametrize("value", ["abcd", "\ud800", None, 3, b"ab", ["a"], np.zeros(2)])
def test_other_values_are_outside(value: object) -> None:
    assert value not in UnicodeText(3)


def test_length_counts_code_points() -> None:
    assert "👩‍🚀" in UnicodeText(3)
    assert "👩‍🚀" not in UnicodeText(2)


def test_samples_are_inside_seeded_and_of_many_scripts() -> None:
    space, twin = UnicodeText(40, seed=3), UnicodeText(40, seed=3)
    samples = [space.sample() for _ in range(300)]
    assert samples == [twin.sample() for _ in range(300)]
    assert all(sample in space for sample in samples)
    assert {0, 40} <= {len(sample) for sample in samples}
    assert max(map(ord, "".join(samples))) > 0xFFFF
    assert UnicodeText(0).sample() == ""


def test_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="no mask"):
        UnicodeText().sample(mask=1)


def test_equality_hash_and_repr() -> None:
    assert UnicodeText(5) == UnicodeText(5, seed=1)
    assert UnicodeText(5) != UnicodeText(6)
    assert UnicodeText(5) != Discrete(5)
    assert len({UnicodeText(5), UnicodeText(5), UnicodeText(6)}) == 2
    assert repr(UnicodeText(5)) == "UnicodeText(5)"
    assert deepcopy(UnicodeText(5)) == UnicodeText(5)


def test_in_a_dict_and_in_a_batch() -> None:
    space = Dict({"prompt": UnicodeText(9), "number": Discrete(3)})
    batched = batch_space(space, 2)
    assert isinstance(batched["prompt"], Tuple)
    items = [{"prompt": "é", "number": 1}, {"prompt": "", "number": 2}]
    together = concatenate(space, items, create_empty_array(space, 2))
    assert together["prompt"] == ("é", "")
    assert together in batched
    assert [member["prompt"] for member in iterate(batched, together)] == ["é", ""]


def test_batched_samples_differ() -> None:
    first, second = batch_space(UnicodeText(50, seed=0), 2).sample()
    assert first != second


@pytest.mark.parametrize("length", [-1, 2.5, True, "9"])
def test_bad_length(length: object) -> None:
    with pytest.raises(ValueError, match="max_length: expected an integer of at least 0"):
        UnicodeText(length)  # type: ignore[arg-type]


def test_json_outside_the_space_is_named() -> None:
    with pytest.raises(ValueError, match=r"entry 1: expected a text of at most 2 .* got 'abc' \(3 code points\)"):
        UnicodeText(2).from_jsonable(["a", "abc"])
