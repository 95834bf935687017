import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from envs.data.batches import BatchSettings
from envs.data.buckets import RATIOS, ProgressiveResolution, bucket_size
from envs.data.order import Cursor, Order, OrderedRow, ordered_rows
from envs.data.pictures import Limits
from envs.data.records import RecordFiles, RecordSet
from envs.data.stream import StreamBatches
from envs.scenes.pretraining import SupervisedBatch
from tests.envs.record_files import FORMATS, number_of, png, write_rows

SHAPES = [(12, 12), (16, 12), (12, 16), (18, 12), (16, 9), (9, 16), (12, 12)]
# Files of 7, 1, 5, 11 and 3 rows.
COUNTS = {"jsonl": 7, "json": 1, "csv": 5, "parquet": 11, "tar": 3}
NUM_ROWS = sum(COUNTS.values())
SMALL = BatchSettings(batch_size=2, resolution=ProgressiveResolution((96,)), window=4, num_workers=0, prefetch=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 26 in five formats, t2i and edit; every sixth is bad."""
    folder = tmp_path_factory.mktemp("records")
    number = 0
    for suffix in FORMATS:
        t2i, edit = [], []
        for _ in range(COUNTS[suffix]):
            shape = SHAPES[number % len(SHAPES)]
            target = png(number, *shape) if number % 6 != 5 else b"damaged"
            t2i.append({"prompt": f"t2i {number}", "image": target})
            edit.append(
                {"instruction": f"edit {number}", "input_image": png(number + 500, *shape), "output_image": target}
            )
            number += 1
        write_rows(folder / f"t2i.{suffix}", t2i)
        write_rows(folder / f"edit.{suffix}", edit)
    assert number == NUM_ROWS
    return folder


def sets(folder: Path) -> dict[str, list[RecordSet]]:
    first = RecordSet((f"{folder}/t2i.json*", f"{folder}/t2i.csv"), weight=2.0)
    return {
        "t2i": [first, RecordSet((f"{folder}/t2i.parquet", f"{folder}/t2i.tar"))],
        "edit": [RecordSet((f"{folder}/edit.*sv", f"{folder}/edit.[!c]*"))],
    }


def same(one: SupervisedBatch, other: SupervisedBatch) -> bool:
    sources = (one.sources is None) == (other.sources is None) and (
        one.sources is None or np.array_equal(one.sources, other.sources)
    )
    return list(one.texts) == list(other.texts) and np.array_equal(one.targets, other.targets) and sources


@settings(max_examples=40, deadline=None)
@given(
    tasks=st.lists(st.sampled_from(["t2i", "edit"]), max_size=14),
    after=st.lists(st.sampled_from(["t2i", "edit"]), min_size=1, max_size=10),
    window=st.sampled_from([0, 1, 3, 8, 100]),
    window_bytes=st.sampled_from([200, 2**20]),
    balanced=st.booleans(),
    threads=st.sampled_from([(0, 0), (2, 2), (0, 3), (3, 0)]),
    resumed_threads=st.sampled_from([(0, 0), (2, 2)]),
    process=st.sampled_from([(0, 1), (1, 2), (2, 3)]),
    seed=st.integers(0, 3),
)
def test_a_resumed_stream_gives_exactly_the_next_batches(
    folder: Path, tasks: list[str], after: list[str], balanced: bool, seed: int, **drawn: Any
) -> None:
    """At any point, whatever was made ahead, through a change of resolution and of batch size."""
    config = BatchSettings(
        batch_size=2,
        resolution=ProgressiveResolution((64, 96), (0, 5), (2, 3)),
        balanced=balanced,
        patience=2,
        window=drawn["window"],
        window_bytes=drawn["window_bytes"],
        seed=seed,
    )
    first, second = (
        replace(config, num_workers=drawn[name][0], prefetch=drawn[name][1]) for name in ("threads", "resumed_threads")
    )
    going = StreamBatches(sets(folder), first, *drawn["process"])
    for task in tasks:
        going.next_batch(task)
    state = json.loads(json.dumps(going.state_dict()))
    expected = [going.next_batch(task) for task in after]
    resumed = StreamBatches(sets(folder), second, *drawn["process"])
    resumed.next_batch("t2i")  # A position that is given up.
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert all(same(resumed.next_batch(task), batch) for task, batch in zip(after, expected, strict=True))
    assert resumed.state_dict() == going.state_dict()
    going.close()
    resumed.close()


def epoch_at(source: StreamBatches) -> int:
    """The epoch of the first set of texts and pictures."""
    epoch = source.state_dict()["tasks"]["t2i"]["legs"][0][0]["cursor"]["epoch"]
    assert isinstance(epoch, int)
    return epoch


def epoch_of(files: RecordFiles, order: Order, epoch: int) -> list[OrderedRow]:
    found = []
    for row in ordered_rows(files, order, Cursor()):
        if row.epoch > epoch:
            return found
        if row.epoch == epoch:
            found.append(row)
    raise AssertionError


@settings(max_examples=40, deadline=None)
@given(
    world_size=st.integers(1, 6),
    share=st.sampled_from(["auto", "files", "rows"]),
    window=st.sampled_from([0, 1, 5, 64]),
    epoch=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_every_row_of_an_epoch_comes_to_exactly_one_process(
    folder: Path, world_size: int, share: Any, window: int, epoch: int, seed: int
) -> None:
    files = RecordFiles(RecordSet((f"{folder}/t2i.*",)), "t2i", Limits())
    ranks = range(world_size)
    if share == "files":
        world_size = min(world_size, len(files.shards))
        ranks = range(world_size)
    found = [epoch_of(files, Order(seed, window, 2**20, rank, world_size, share), epoch) for rank in ranks]
    places = Counter((row.shard, row.number) for rows in found for row in rows)
    expected = {(i, n) for i, shard in enumerate(files.shards) for n in range(COUNTS[shard.path.suffix[1:]])}
    assert set(places) == expected
    assert set(places.values()) == {1}
    if share == "rows":
        assert max(map(len, found)) - min(map(len, found)) <= len(files.shards)


def test_files_and_rows_are_shuffled_anew_each_epoch_and_not_without_a_window(folder: Path) -> None:
    files = RecordFiles(RecordSet((f"{folder}/t2i.*",)), "t2i", Limits())
    shuffled = [[(r.shard, r.number) for r in epoch_of(files, Order(seed=0, window=64), epoch)] for epoch in range(3)]
    plain = [[(r.shard, r.number) for r in epoch_of(files, Order(window=0), epoch)] for epoch in range(2)]
    assert plain[0] == plain[1] == sorted(plain[0])
    assert len({tuple(places) for places in [*shuffled, plain[0]]}) == 4
    assert [sorted(places) for places in shuffled] == [plain[0]] * 3
    other = [(r.shard, r.number) for r in epoch_of(files, Order(seed=1, window=64), 0)]
    assert other != shuffled[0]


def test_a_window_ends_where_its_rows_hold_too_much(folder: Path) -> None:
    files = RecordFiles(RecordSet((f"{folder}/t2i.parquet",)), "t2i", Limits())
    rows = epoch_of(files, Order(window=100, window_bytes=1), 0)
    assert [row.number for row in rows] == list(range(11))  # Windows of one row each.


def test_every_example_of_an_epoch_is_in_a_batch_or_waits(folder: Path) -> None:
    data = RecordSet((f"{folder}/t2i.*",))
    files = RecordFiles(data, "t2i", Limits())
    seen: list[str] = []
    for rank in range(2):
        source = StreamBatches({"t2i": [data]}, SMALL, rank, 2)
        of_rank: list[str] = []
        while epoch_at(source) == 0:
            of_rank += source.next_batch("t2i").texts
        state = source.state_dict()["tasks"]["t2i"]
        for _, shard, number in state["waiting"]:
            of_rank.append(files.record(files.rows_at(shard, [number])[number], shard, number).text)
        assert len(of_rank) == state["draws"] - source.problems()["t2i"].num_bad
        seen += of_rank
    assert set(seen) == {f"t2i {number}" for number in range(NUM_ROWS) if number % 6 != 5}


def test_batches_are_of_one_bucket_and_pictures_stay_with_their_texts(folder: Path) -> None:
    source = StreamBatches(sets(folder), SMALL)
    sizes = {bucket_size(ratio, 96) for ratio in RATIOS}
    for task in ["t2i", "edit"] * 12:
        batch = source.next_batch(task)
        assert batch.targets.dtype == np.uint8
        assert batch.targets.shape[0] == len(batch.texts) == 2
        assert batch.targets.shape[1:3] in sizes
        numbers = [int(text.split()[1]) for text in batch.texts]
        assert [number_of(image) for image in batch.targets] == numbers
        assert all(text.startswith(task) for text in batch.texts)
        if task == "edit":
            assert batch.sources is not None
            assert batch.sources.shape == batch.targets.shape
            assert [number_of(image) for image in batch.sources] == [number + 500 for number in numbers]
        else:
            assert batch.sources is None


def test_the_resolution_and_the_batch_size_follow_the_schedule(folder: Path) -> None:
    resolution = ProgressiveResolution((64, 128), (0, 2), (3, 1))
    source = StreamBatches(sets(folder), replace(SMALL, resolution=resolution))
    shapes = [source.next_batch("t2i").targets.shape for _ in range(4)]
    assert [shape[0] for shape in shapes] == [3, 3, 1, 1]
    assert all(shape[1:3] in {bucket_size(ratio, 64) for ratio in RATIOS} for shape in shapes[:2])
    assert all(shape[1:3] in {bucket_size(ratio, 128) for ratio in RATIOS} for shape in shapes[2:])
    assert source.next_batch("edit").targets.shape[0] == 3  # A task's batches are counted by themselves.


def test_balanced_batches_give_ratios_turns(tmp_path: Path) -> None:
    """Nine squares to one wide picture: alone the ratio of batches follows the data, balanced they are equal."""
    rows = [{"prompt": f"r {n}", "image": png(n, *((16, 9) if n % 10 == 0 else (12, 12)))} for n in range(100)]
    write_rows(tmp_path / "set.jsonl", rows)
    data = {"t2i": [RecordSet((str(tmp_path / "set.jsonl"),))]}
    counts = {}
    for balanced in (False, True):
        source = StreamBatches(data, replace(SMALL, balanced=balanced, patience=20))
        shapes = Counter(source.next_batch("t2i").targets.shape[1:3] for _ in range(40))
        counts[balanced] = shapes[bucket_size((16, 9), 96)]
        num_waiting = len(source.state_dict()["tasks"]["t2i"]["waiting"])
        assert num_waiting <= SMALL.batch_size * len(RATIOS)  # What is passed over does not pile up.
    assert counts[False] <= 8
    assert 18 <= counts[True] <= 22


def test_sets_are_mixed_by_weight(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "image": png()}])
    weighed = [
        RecordSet((str(tmp_path / f"{name}.jsonl"),), weight=weight) for name, weight in (("a", 3.0), ("b", 1.0))
    ]
    source = StreamBatches({"t2i": weighed}, replace(SMALL, batch_size=400))
    share = Counter(source.next_batch("t2i").texts)["a"] / 400
    assert abs(share - 0.75) < 3 * (0.75 * 0.25 / 400) ** 0.5


def test_bad_rows_are_counted_kept_and_written(folder: Path, tmp_path: Path) -> None:
    source = StreamBatches({"t2i": [RecordSet((f"{folder}/t2i.*",))]}, replace(SMALL, window=0))
    while epoch_at(source) == 0:
        source.next_batch("t2i")
    problems = source.problems()["t2i"]
    assert problems.num_bad >= 4
    assert problems.reasons["a whole PNG, JPEG, WEBP picture"] == problems.num_bad
    source.write_problems(tmp_path)
    counts, *lines = map(json.loads, (tmp_path / "t2i_problems.jsonl").read_text().splitlines())
    assert counts == {"rows": problems.num_rows, "bad": problems.num_bad, "reasons": dict(problems.reasons)}
    assert {line["row"] for line in lines if line["file"].endswith("t2i.jsonl")} == {5}
    assert len(lines) == problems.num_bad


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_file_of_bad_rows_alone_ends_the_run_with_the_commonest_reason(
    tmp_path: Path, threads: int, world_size: int
) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"r {n}", "image": png(n)} for n in range(20)])
    rows = [*({"prompt": "p", "image": "gone.png"} for _ in range(5)), {"prompt": " ", "image": png()}]
    write_rows(tmp_path / "b.jsonl", rows)
    config = replace(SMALL, window=8, num_workers=threads, prefetch=threads)
    source = StreamBatches({"t2i": [RecordSet((f"{tmp_path}/*.jsonl",))]}, config, 0, world_size)
    expected = r"b\.jsonl: expected rows .* got 6 bad ones, .*existing file \(5 rows\); .*row 0"
    with pytest.raises(ValueError, match=expected):
        all(source.next_batch("t2i").texts for _ in range(60))
    source.close()


def test_a_process_that_sees_bad_rows_alone_looks_through_the_file(tmp_path: Path) -> None:
    good = {"prompt": "p", "image": png()}
    write_rows(tmp_path / "a.jsonl", [good, {"prompt": "p", "image": "gone.png"}] * 5)
    write_rows(tmp_path / "b.jsonl", [good] * 8)
    write_rows(tmp_path / "c.jsonl", [good] * 8)
    for rank in range(2):
        source = StreamBatches({"t2i": [RecordSet((f"{tmp_path}/*.jsonl",))]}, SMALL, rank, 2)
        for _ in range(40):
            source.next_batch("t2i")
        assert epoch_at(source) > 2


def test_a_process_without_a_row_says_so(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "image": png()}] * 2)
    source = StreamBatches({"t2i": [RecordSet((f"{tmp_path}/a.jsonl",))]}, SMALL, 2, 3)
    with pytest.raises(ValueError, match="a row for each of 3 processes, got none for number 2"):
        source.next_batch("t2i")


def test_edits_of_other_shapes_or_of_several_sources_are_bad(tmp_path: Path) -> None:
    rows = [
        {"instruction": "i", "input_image": png(1, 16, 9), "output_image": png(2, 12, 12)},
        {"instruction": "i", "input_image": png(1, 24, 25), "output_image": png(2, 12, 12)},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    row = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[1])
    several = json.dumps({**row, "input_image": [row["input_image"]] * 2})
    with (tmp_path / "a.jsonl").open("a") as handle:
        handle.write(several + "\n")
    source = StreamBatches({"edit": [RecordSet((f"{tmp_path}/a.jsonl",))]}, SMALL)
    for _ in range(3):
        assert source.next_batch("edit").targets.shape == (2, 96, 96, 3)
    assert set(source.problems()["edit"].reasons) == {"a source of the target's shape", "one source picture"}


def test_a_state_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    source = StreamBatches(sets(folder), SMALL)
    state = source.state_dict()
    for change, name in [({"seed": 1}, "seed"), ({"window": 5}, "window"), ({"share": "rows"}, "share")]:
        with pytest.raises(ValueError, match=f"position with the same {name}"):
            StreamBatches(sets(folder), replace(SMALL, **change)).load_state_dict(state)
    with pytest.raises(ValueError, match="position with the same rank"):
        StreamBatches(sets(folder), SMALL, 1, 2).load_state_dict(state)
    other = {"t2i": [RecordSet((f"{folder}/t2i.csv",))], "edit": sets(folder)["edit"]}
    with pytest.raises(ValueError, match="position with the same files"):
        StreamBatches(other, SMALL).load_state_dict(state)
    with pytest.raises(ValueError, match="expected version 2, got None"):
        source.load_state_dict({})


def test_what_is_asked_for_wrongly_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="got a task 'video'"):
        StreamBatches({"video": sets(folder)["t2i"]}, SMALL)
    with pytest.raises(ValueError, match="got a task without one"):
        StreamBatches({"t2i": []}, SMALL)
    source = StreamBatches({"t2i": sets(folder)["t2i"]}, SMALL)
    with pytest.raises(ValueError, match="expected one of t2i, got 'edit'"):
        source.next_batch("edit")
    with pytest.raises(ValueError, match=r"a tuple of paths or globs, got 'data\.tar'"):
        RecordSet("data.tar")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight: expected a number above 0"):
        RecordSet(("a",), weight=0.0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Order(rank=2, world_size=2)


def test_source_and_target_are_cropped_alike(tmp_path: Path) -> None:
    """An edit that changes nothing still changes nothing, at whatever sizes the two are stored."""
    ramp = Image.fromarray(np.add.outer(np.arange(90), np.arange(240)).astype(np.uint8)).convert("RGB")
    ramp.save(tmp_path / "a.png")
    ramp.resize((480, 180), Image.Resampling.BICUBIC).save(tmp_path / "b.png")
    rows = [{"instruction": "i", "input_image": source, "output_image": "a.png"} for source in ("a.png", "b.png")]
    write_rows(tmp_path / "set.jsonl", rows)
    source = StreamBatches({"edit": [RecordSet((f"{tmp_path}/set.jsonl",))]}, replace(SMALL, window=0))
    batch = source.next_batch("edit")
    assert batch.sources is not None
    np.testing.assert_array_equal(batch.sources[0], batch.targets[0])
    assert abs(batch.sources[1].astype(int)[:, 2:-2] - batch.targets[1][:, 2:-2])[:, :60].max() <= 3
