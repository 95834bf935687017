"""Another number of processes goes on with the files: no row of an epoch is lost, and none comes twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.data.batches import BatchSettings
from envs.data.buckets import ProgressiveResolution
from envs.data.dealing import Leg, Legs, dealt_rows, redealt
from envs.data.order import Cursor, Order, OrderedRow
from envs.data.pictures import Limits
from envs.data.records import RecordFiles, RecordSet
from envs.data.stream import StreamBatches
from tests.envs.record_files import png, write_rows

FILE_SIZES = (7, 1, 5, 11)
Placed = tuple[int, int, int]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> RecordFiles:
    folder = tmp_path_factory.mktemp("dealt")
    for index, size in enumerate(FILE_SIZES):
        write_rows(folder / f"{index}.jsonl", [{"prompt": f"{index} {n}", "image": "a.png"} for n in range(size)])
    return RecordFiles(RecordSet((f"{folder}/*.jsonl",)), "t2i", Limits())


def placed(row: OrderedRow) -> Placed:
    return row.epoch, row.shard, row.number


def rows_of(files: RecordFiles, order: Order, legs: Legs) -> Iterator[tuple[OrderedRow, Legs]]:
    """From a position that was JSON in between."""
    told = json.loads(json.dumps([{**vars(leg), "cursor": vars(leg.cursor)} for leg in legs]))
    return dealt_rows(files, order, tuple(map(Leg.of, told)))


@settings(max_examples=120, deadline=None)
@given(
    sittings=st.lists(
        st.tuples(st.integers(1, 4), st.lists(st.integers(0, 40), min_size=4, max_size=4)), min_size=1, max_size=4
    ),
    window=st.sampled_from([0, 1, 5, 64]),
    share=st.sampled_from(["auto", "rows", "files"]),
    seed=st.integers(0, 3),
)
def test_every_row_of_an_epoch_comes_once_however_often_the_number_of_processes_changes(
    files: RecordFiles, sittings: Sequence[tuple[int, list[int]]], window: int, share: Any, seed: int
) -> None:
    """Processes may be in different epochs, and a change may come while the last one is still being finished."""
    order = Order(seed, window, 2**20, share=share)
    found: Counter[Placed] = Counter()
    shares: list[Legs] = []
    for world_size, counts in sittings:
        fresh = [(Leg(rank, world_size),) for rank in range(world_size)]
        shares = [redealt(shares, rank, world_size) for rank in range(world_size)] if shares else list(fresh)
        for rank, count in zip(range(world_size), counts, strict=False):
            for row, behind in islice(rows_of(files, order, shares[rank]), count):
                found[placed(row)] += 1
                shares[rank] = behind
    whole = 1 + max(epoch for epoch, *_ in found) if found else 0
    for legs in shares:
        for row, _ in rows_of(files, order, legs):
            if row.epoch > whole:
                break
            found[placed(row)] += 1
    expected = {
        (epoch, shard, number)
        for epoch in range(whole + 1)
        for shard, size in enumerate(FILE_SIZES)
        for number in range(size)
    }
    assert set(found) == expected
    assert set(found.values()) == {1}


@settings(max_examples=40, deadline=None)
@given(before=st.integers(1, 4), taken=st.integers(0, 30), after=st.integers(1, 4), at=st.integers(0, 12))
def test_a_dealt_position_goes_on_to_the_same_rows(
    files: RecordFiles, before: int, taken: int, after: int, at: int
) -> None:
    order = Order(seed=1, window=5)
    shares: list[Legs] = [(Leg(rank, before),) for rank in range(before)]
    for rank in range(before):
        for _, behind in islice(dealt_rows(files, order, shares[rank]), taken + rank):
            shares[rank] = behind
    for rank in range(after):
        legs = redealt(shares, rank, after)
        whole = list(islice(dealt_rows(files, order, legs), at + 20))
        behind = whole[at - 1][1] if at else legs
        again = list(islice(rows_of(files, order, behind), 20))
        assert [placed(row) for row, _ in again] == [placed(row) for row, _ in whole[at:]]


def test_shares_that_had_not_begun_are_begun_as_new_ones() -> None:
    begun = [(Leg(rank, 3, Cursor(2)),) for rank in range(3)]
    assert [redealt(begun, rank, 2) for rank in range(2)] == [(Leg(rank, 2, Cursor(2)),) for rank in range(2)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[RecordSet]]:
    """Two sets of squares, with more rows than are asked for."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("a", 60), ("b", 60)):
        write_rows(folder / f"{name}.jsonl", [{"prompt": f"{name} {n}", "image": png(n)} for n in range(size)])
    return {"t2i": [RecordSet((f"{folder}/{name}.jsonl",)) for name in ("a", "b")]}


BATCHES = BatchSettings(batch_size=2, resolution=ProgressiveResolution((32, 64), (0, 8)), window=4, num_workers=0)


def waiting(state: dict[str, Any]) -> list[tuple[int, int, int]]:
    return [tuple(place) for place in state["tasks"]["t2i"]["waiting"]]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_go_on_with_the_rows_that_are_left_and_at_the_same_resolution(
    pictures: dict[str, list[RecordSet]], before: int, after: int, prefetch: int
) -> None:
    config = replace(BATCHES, prefetch=prefetch)
    texts: Counter[str] = Counter()
    states = []
    for rank in range(before):
        source = StreamBatches(pictures, config, rank, before)
        for _ in range(2):
            texts.update(source.next_batch("t2i").texts)
        states.append(json.loads(json.dumps(source.state_dict())))
        source.close()
    sources = [StreamBatches(pictures, config, rank, after) for rank in range(after)]
    for source in sources:
        source.load_shares(states)
    dealt = [source.state_dict() for source in sources]
    assert sorted(place for state in dealt for place in waiting(state)) == sorted(
        place for state in states for place in waiting(state)
    )
    done = 2 * before
    for source in sources:
        for turn in range(8):
            batch = source.next_batch("t2i")
            assert batch.targets.shape[1] == (32 if done + turn * after < 8 else 64)
            texts.update(batch.texts)
        source.close()
    assert texts.total() == 2 * (2 * before + 8 * after)
    assert set(texts.values()) == {1}


def test_positions_of_other_files_or_of_too_few_processes_are_refused(
    pictures: dict[str, list[RecordSet]], tmp_path: Path
) -> None:
    states = [StreamBatches(pictures, BATCHES, rank, 2).state_dict() for rank in range(2)]
    with pytest.raises(ValueError, match=r"position with the same world_size \(1\), got one with 2"):
        StreamBatches(pictures, BATCHES).load_shares(states[:1])
    with pytest.raises(ValueError, match=r"position with the same rank \(0\), got one with 1"):
        StreamBatches(pictures, BATCHES).load_shares(states[::-1])
    write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "image": png()}])
    other = {"t2i": [RecordSet((f"{tmp_path}/a.jsonl",)), pictures["t2i"][1]]}
    with pytest.raises(ValueError, match="position with the same files"):
        StreamBatches(other, BATCHES).load_shares(states)


def test_tasks_may_have_settings_of_their_own(pictures: dict[str, list[RecordSet]]) -> None:
    source = StreamBatches(pictures, {"t2i": replace(BATCHES, batch_size=3)})
    assert len(source.next_batch("t2i").texts) == 3
    source.close()
