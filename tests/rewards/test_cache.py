"""The cache: equal answers, what makes a key, what is never stored, threads, processes, and files of something else."""

import asyncio
import logging
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.base import Images, Prompt, RewardTraits, Scores, reward_name, reward_statistics, reward_traits
from rewards.cache import Cached
from rewards.checker import check_reward
from rewards.compose import WeightedSum
from rewards.pixel import redness
from rewards.scoring import score

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
SOURCE = IMAGES[0, :4]
PROMPTS = [
    Prompt("a"),
    Prompt("bb", metadata={"tag": "x", "n": [1, 2]}),
    Prompt("ccc", (SOURCE,)),
    Prompt("d\udce9", id="lone surrogate"),
]
NAN = float("nan")


class Counting:
    """Mean grey plus the text's length, with a part; counts what it is asked for, and lacks what it is told to."""

    def __init__(self, fingerprint: str = "v1", **traits: Any) -> None:
        self.traits = RewardTraits(fingerprint=fingerprint, **traits)
        self.sizes: list[int] = []
        self.lacks: set[str] = set()
        self.lacks_part: set[str] = set()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        self.sizes.append(len(images))
        total = np.array([len(prompt.text) for prompt in prompts], np.float32) / 3 + images.mean((1, 2, 3))
        part = images.std((1, 2, 3)).astype(np.float32)
        total[[prompt.text in self.lacks for prompt in prompts]] = NAN
        part[[prompt.text in self.lacks_part for prompt in prompts]] = NAN
        return Scores(total, {"part": part})


def same(first: Scores, second: Scores) -> None:
    np.testing.assert_array_equal(first.total, second.total)
    assert first.total.dtype == second.total.dtype == np.float32
    assert set(first.components) == set(second.components)
    for name, values in first.components.items():
        np.testing.assert_array_equal(values, second.components[name])
        assert values.dtype == np.float32
    assert first.reasons == second.reasons


def test_cached_equals_uncached_and_the_second_run_only_hits(tmp_path: Path) -> None:
    reward = Counting()
    expected = score(Counting(), IMAGES, PROMPTS)
    first = Cached(reward, tmp_path / "new" / "cache.sqlite")
    same(score(first, IMAGES, PROMPTS), expected)
    assert (first.hits, first.misses, first.uncached) == (0, 4, 0)
    second = Cached(reward, tmp_path / "new" / "cache.sqlite")
    same(score(second, IMAGES, PROMPTS), expected)
    assert (second.hits, second.misses, second.uncached) == (4, 0, 0)
    assert reward.sizes == [4]


def test_only_what_is_missing_is_asked_for_in_the_reward_s_own_batches(tmp_path: Path) -> None:
    reward = Counting(batch_size=2)
    cached = Cached(reward, tmp_path / "c")
    score(cached, IMAGES[1:2], PROMPTS[1:2])
    same(score(cached, IMAGES, PROMPTS), score(Counting(), IMAGES, PROMPTS))
    assert reward.sizes == [1, 2, 1]
    assert (cached.hits, cached.misses) == (1, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda image, prompt: (image ^ 1, prompt),
        lambda image, prompt: (image.reshape(4, 16, 3), prompt),
        lambda image, prompt: (image, replace(prompt, text="A")),
        lambda image, prompt: (image, replace(prompt, metadata={"tag": "y"})),
        lambda image, prompt: (image, replace(prompt, source_images=(SOURCE,))),
        lambda image, prompt: (image, replace(prompt, source_images=(SOURCE, SOURCE))),
    ],
)
def test_what_an_answer_may_depend_on_is_in_the_key(tmp_path: Path, change: Any) -> None:
    reward = Counting()
    cached = Cached(reward, tmp_path / "c")
    score(cached, IMAGES[:1], PROMPTS[:1])
    image, prompt = change(IMAGES[0], PROMPTS[0])
    score(cached, image[None], [prompt])
    assert (cached.hits, cached.misses) == (0, 2)


def test_source_images_do_not_run_into_each_other(tmp_path: Path) -> None:
    """The same bytes, cut differently."""
    cached = Cached(Counting(), tmp_path / "c")
    low, high = SOURCE[:1], SOURCE[1:]
    for sources in [(low, high), (SOURCE,), (SOURCE[:2], SOURCE[2:])]:
        score(cached, IMAGES[:1], [Prompt("a", sources)])
    assert cached.misses == 3


def test_labels_and_the_order_of_keys_are_not_in_the_key(tmp_path: Path) -> None:
    cached = Cached(Counting(), tmp_path / "c")
    score(cached, IMAGES[:1], [Prompt("a", metadata={"x": 1, "y": {"p": 1, "q": 2}}, id="1", group="g")])
    same_metadata = MappingProxyType({"y": MappingProxyType({"q": 2, "p": 1}), "x": 1})
    score(cached, IMAGES[:1], [Prompt("a", metadata=same_metadata, id="2")])
    score(cached, np.asfortranarray(IMAGES[:1]), [Prompt("a", metadata=same_metadata)])
    assert (cached.hits, cached.misses) == (2, 1)


def test_other_rewards_and_fingerprints_share_a_file_and_no_answer(tmp_path: Path) -> None:
    class Other(Counting):
        pass

    rewards = [Counting(), Other(), Counting("v2"), Counting(scope="group")]
    caches = [Cached(reward, tmp_path / "c") for reward in rewards] + [Cached(Counting(), tmp_path / "c", "more")]
    for cached in caches:
        score(cached, IMAGES[:1], PROMPTS[:1])
        assert (cached.hits, cached.misses) == (0, 1)
    assert reward_traits(caches[-1]).fingerprint == "v1 more"


def test_a_missing_answer_is_tried_again_and_keeps_its_reason(tmp_path: Path) -> None:
    reward = Counting()
    cached = Cached(reward, tmp_path / "c")
    reward.lacks, reward.lacks_part = {"bb"}, {"ccc"}
    found = score(cached, IMAGES, PROMPTS)
    assert np.isnan(found.total).tolist() == [False, True, False, False]
    assert np.isnan(found.components["part"]).tolist() == [False, False, True, False]
    assert found.reasons == {1: "Counting gave NaN without a reason"}
    again = score(cached, IMAGES, PROMPTS)
    same(again, found)
    assert reward.sizes == [4, 2]
    reward.lacks, reward.lacks_part = set(), set()
    same(score(cached, IMAGES, PROMPTS), score(Counting(), IMAGES, PROMPTS))
    score(cached, IMAGES, PROMPTS)
    assert reward.sizes == [4, 2, 2]


def test_a_group_is_one_answer(tmp_path: Path) -> None:
    reward = Counting(scope="group")
    cached = Cached(reward, tmp_path / "c")
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    expected = score(Counting(scope="group"), IMAGES, prompts)
    same(score(cached, IMAGES, prompts), expected)
    same(score(cached, IMAGES, prompts), expected)
    assert (cached.hits, cached.misses) == (4, 4)
    score(cached, IMAGES[:1], prompts[:1])  # A part of a group is another group.
    score(cached, IMAGES[[1, 0, 2, 3]], prompts)  # And so is another order; the second group is known.
    assert reward.sizes == [2, 2, 1, 2]


def test_two_groups_of_one_prompt_stay_two_where_what_was_between_is_known(tmp_path: Path) -> None:
    reward = Counting(scope="group")
    cached = Cached(reward, tmp_path / "c")
    asyncio.run(cached(IMAGES[2:3], PROMPTS[1:2]))
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    same(asyncio.run(cached(IMAGES, prompts)), score(Counting(scope="group"), IMAGES, prompts))
    assert reward.sizes == [1, 2, 1]


def test_a_group_with_a_gap_is_not_stored(tmp_path: Path) -> None:
    reward = Counting(scope="group")
    reward.lacks = {"a"}
    cached = Cached(reward, tmp_path / "c")
    for _ in range(2):
        score(cached, IMAGES[:2], [PROMPTS[0]] * 2)
    assert cached.misses == 4


def test_an_answer_with_a_reason_is_tried_again(tmp_path: Path) -> None:
    """A reward may have a number and say what is missing of it: the reason would be lost with the next run."""
    asked: list[int] = []

    def partly(images: Images, prompts: Sequence[Prompt]) -> Scores:
        asked.append(len(images))
        reasons = {row: "no second answer" for row, prompt in enumerate(prompts) if prompt.text == "bb"}
        return Scores(images.mean((1, 2, 3)).astype(np.float32), {}, reasons)

    cached = Cached(partly, tmp_path / "c", "1")
    found = [score(cached, IMAGES[:2], PROMPTS[:2]) for _ in range(2)]
    assert [scores.reasons for scores in found] == [{1: "no second answer"}] * 2
    assert (asked, cached.hits) == ([2, 1], 1)


def test_metadata_that_is_not_json_is_scored_every_time_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached = Cached(Counting(), tmp_path / "c")
    odd = [Prompt("a", metadata={"x": object()}, id="odd"), PROMPTS[1], Prompt("c", metadata={"x": {1, 2}})]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            same(score(cached, IMAGES[:3], odd), score(Counting(), IMAGES[:3], odd))
    assert (cached.hits, cached.misses, cached.uncached) == (1, 1, 4)
    assert [record.getMessage().split(";")[0][:45] for record in caplog.records] == [
        "Counting: metadata of prompt 'odd' is not JSO"
    ]


def test_the_contract_holds(tmp_path: Path) -> None:
    check_reward(Cached(Counting(), tmp_path / "c"), IMAGES, PROMPTS)
    check_reward(Cached(Counting(scope="group"), tmp_path / "c"), IMAGES, [*PROMPTS[:1] * 2, *PROMPTS[1:2] * 2])
    check_reward(Cached(redness, tmp_path / "c", "1"), IMAGES, PROMPTS)


def test_a_cache_has_its_reward_s_name_and_scope(tmp_path: Path) -> None:
    cached = Cached(Counting(scope="group", concurrency=3), tmp_path / "c")
    assert reward_name(cached) == "Counting"
    assert reward_traits(cached) == RewardTraits("group", None, 3, "v1")


def test_sums_and_caches_nest(tmp_path: Path) -> None:
    reward = Counting()
    weighted = WeightedSum({"counting": Cached(reward, tmp_path / "c"), "red": redness}, {"counting": 1, "red": 2})
    expected = score(WeightedSum({"counting": Counting(), "red": redness}, {"counting": 1, "red": 2}), IMAGES, PROMPTS)
    for _ in range(2):
        same(score(weighted, IMAGES, PROMPTS), expected)
    whole = WeightedSum({"counting": reward}, {"counting": 2})
    for _ in range(2):
        same(score(Cached(whole, tmp_path / "c"), IMAGES, PROMPTS), score(whole, IMAGES, PROMPTS))
    assert reward.sizes == [4, 4, 4, 4]


def test_an_empty_batch(tmp_path: Path) -> None:
    for scope in ("sample", "group"):
        assert score(Cached(Counting(scope=scope), tmp_path / "c"), IMAGES[:0], []).total.tolist() == []


def test_values_come_back_to_the_last_bit(tmp_path: Path) -> None:
    odd = np.array([1 / 3, np.float32(1e-45), -0.0, 3e38], np.float32)

    def reward(images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        return odd

    for _ in range(2):
        found = score(Cached(reward, tmp_path / "c", "v1"), IMAGES, PROMPTS).total
        assert found.tobytes() == odd.tobytes()


def test_many_threads(tmp_path: Path) -> None:
    cached = Cached(Counting(), tmp_path / "c")
    expected = score(Counting(), IMAGES, PROMPTS)
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda _: score(cached, IMAGES, PROMPTS), range(24)):
            same(found, expected)
    assert cached.hits + cached.misses == 4 * 24
    assert cached.hits > 0


SCORE = """
images = np.random.default_rng(int(sys.argv[2])).integers(0, 256, (40, 8, 8, 3), np.uint8)
cached = Cached(redness, sys.argv[1], fingerprint="1")
for start in range(0, 40, 4):
    score(cached, images[start : start + 4], [Prompt("a")] * 4)
print(cached.hits, cached.misses)
"""
CREATE = """
for number in range(25):
    time.sleep(max(0, float(sys.argv[2]) + number / 20 - time.time()))  # All processes wake at the same moment.
    Cached(redness, f"{sys.argv[1]}/{number}", fingerprint="1")
"""
IMPORTS = """
import sys
import time

import numpy as np

from rewards.base import Prompt
from rewards.cache import Cached
from rewards.pixel import redness
from rewards.scoring import score
"""


def run_together(root: Path, script: str, *arguments: Sequence[object]) -> list[str]:
    """What a process for each list of arguments prints, all of them at a time."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IMPORTS + script, *map(str, given)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for given in arguments
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [out.strip() for out, _ in outputs]


def test_processes_share_a_file(tmp_path: Path, root: Path) -> None:
    """Three at a time that create it together, two of them with the same images; then two that only hit."""
    path = tmp_path / "c"
    counts = [list(map(int, line.split())) for line in run_together(root, SCORE, (path, 0), (path, 1), (path, 1))]
    assert [hits + misses for hits, misses in counts] == [40, 40, 40]
    assert counts[0] == [0, 40]
    assert run_together(root, SCORE, (path, 0), (path, 1)) == ["40 0", "40 0"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM answers").fetchone() == (80,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_processes_create_a_file_at_the_same_moment(tmp_path: Path, root: Path) -> None:
    run_together(root, CREATE, *[(tmp_path, time.time() + 1)] * 4)
    assert len(list(tmp_path.iterdir())) >= 25


def test_files_of_something_else_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to have a header of one" * 10)
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE answers (a, b)")
    for path in (text, other):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=rf"path: expected a cache of rewards, got .*{path.name}, which is none"):
            Cached(redness, path, "1")
        assert path.read_bytes() == before
    with pytest.raises(ValueError, match="expected a cache of rewards or a new file, got"):
        Cached(redness, tmp_path, "1")


def test_a_reward_that_does_not_say_what_it_depends_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fingerprint of redness: expected text .* got none; declare RewardTraits"):
        Cached(redness, tmp_path / "c")
    weighted = WeightedSum({"counting": Counting(), "red": redness}, {"counting": 1, "red": 1})
    with pytest.raises(ValueError, match="fingerprint of redness"):
        Cached(weighted, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    Cached(weighted, tmp_path / "c", fingerprint="1")


def test_what_is_counted_is_told_through_a_sum_and_through_a_cache(tmp_path: Path) -> None:
    cached = Cached(Counting(), tmp_path / "cache.sqlite")
    total = WeightedSum({"grey": cached, "red": redness}, {"grey": 1.0, "red": 1.0})
    score(total, IMAGES, PROMPTS)
    score(total, IMAGES, PROMPTS)
    assert reward_statistics(total) == {"grey/cache/hits": 4, "grey/cache/misses": 4, "grey/cache/uncached": 0}
    assert reward_statistics(redness) == {}
