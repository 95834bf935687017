"""A row an image: kept, resumed, tried again where it failed, and never mixed between judges or images."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdtr.benchmarks.base import Benchmark, Metric, Scorer
from pdtr.benchmarks.compare import compare, format_differences
from pdtr.benchmarks.drawbench import Panel, panel_scorer
from pdtr.benchmarks.gedit import load_gedit
from pdtr.benchmarks.geneval import load_geneval
from pdtr.benchmarks.results import format_results, load_results, results_of, save_results
from pdtr.benchmarks.scoring import Row, read_rows, score_images
from rewards.base import Images, Prompt, Scores, Values
from tests.pdtr.benchmarks.files import gedit_row, plain, write_geneval, write_parquet

NAN = float("nan")


class Redness:
    """The share of red, not available for the values that are named; it keeps what it is shown, and can be stopped."""

    def __init__(self, failing: Sequence[int] = (), most: int = 1000) -> None:
        self.failing, self.most = set(failing), most
        self.shown: list[Images] = []

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        if len(self.shown) >= self.most:
            raise KeyboardInterrupt
        self.shown += list(images)
        red = images[:, 0, 0, 0]
        total = np.array([NAN if value in self.failing else value / 255 for value in red.tolist()], np.float32)
        reasons = {row: "the judge is away" for row in range(len(images)) if np.isnan(total[row])}
        return Scores(total, {"official": total}, reasons)


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    made = load_geneval(write_geneval(tmp_path / "m.jsonl")).limited(None, 2)
    for item in made.items:
        made.layout.write(tmp_path / "images", item, {s: plain((20 * item.index + s, 0, 0)) for s in range(2)})
    return made


@pytest.fixture
def scored(benchmark: Benchmark, tmp_path: Path) -> Callable[[Any], list[Row]]:
    def run(reward: Any, **facts: Any) -> list[Row]:
        return score_images(
            benchmark, Scorer(reward, facts, batch_size=5), tmp_path / "images", tmp_path / "scores.jsonl"
        )

    return run


def test_every_image_has_a_row_in_order(scored: Callable[[Any], list[Row]], benchmark: Benchmark) -> None:
    rows = scored(Redness())
    assert [(row.item, row.sample) for row in rows] == [(item.id, s) for item in benchmark.items for s in range(2)]
    assert [row.values["official"] for row in rows] == pytest.approx(
        [(20 * i + s) / 255 for i in range(6) for s in range(2)]
    )


def test_scored_images_are_not_scored_again(scored: Callable[[Any], list[Row]], tmp_path: Path) -> None:
    first = scored(Redness())
    reward = Redness()
    assert scored(reward) == first
    assert reward.shown == []
    assert len(read_rows(tmp_path / "scores.jsonl")) == 12


def test_only_failures_are_tried_again(scored: Callable[[Any], list[Row]]) -> None:
    failed = scored(Redness(failing=[20, 41]))
    assert [row.reason for row in failed if row.reason] == ["the judge is away"] * 2
    assert [row.values for row in failed if row.reason] == [{}, {}]
    reward = Redness(failing=[41])
    rows = scored(reward)
    assert sorted(int(image[0, 0, 0]) for image in reward.shown) == [20, 41]
    assert [row.reason for row in rows].count("the judge is away") == 1


def test_a_stopped_scoring_is_resumed(scored: Callable[[Any], list[Row]], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        scored(Redness(most=5))
    path = tmp_path / "scores.jsonl"
    assert len(read_rows(path)) == 5
    # It may have been killed in the middle of a line, too.
    path.write_text(path.read_text()[:-20])
    assert len(read_rows(path)) == 4
    reward = Redness()
    assert len(scored(reward)) == 12
    assert len(reward.shown) == 8
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_another_judge_and_another_image_have_rows_of_their_own(
    scored: Callable[..., list[Row]], benchmark: Benchmark, tmp_path: Path
) -> None:
    first = scored(Redness(), judge="a")
    other = Redness()
    second = scored(other, judge="b")
    assert len(other.shown) == 12
    assert {row.scorer for row in first}.isdisjoint(row.scorer for row in second)
    benchmark.layout.write(tmp_path / "images", benchmark.items[2], {1: plain((255, 0, 0))})
    reward = Redness()
    rows = scored(reward, judge="a")
    assert [int(image[0, 0, 0]) for image in reward.shown] == [255]
    assert rows[5].values["official"] == 1.0


def test_a_damaged_file_of_rows_is_named(scored: Callable[[Any], list[Row]], tmp_path: Path) -> None:
    scored(Redness())
    path = tmp_path / "scores.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 2"):
        scored(Redness())


def test_an_edit_is_shown_at_the_size_of_its_source(tmp_path: Path) -> None:
    rows = [gedit_row("a", "color_alter"), gedit_row("b", "subject-add")]
    rows[1]["input_image"] = rows[0]["input_image_raw"]
    benchmark = load_gedit(write_parquet(tmp_path / "d.parquet", rows))
    for item in benchmark.items:
        benchmark.layout.write(tmp_path / "images", item, {0: plain((7, 7, 7), (16, 16))})
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def reward(images: Images, prompts: Sequence[Prompt]) -> Values:
        shapes.extend(
            (image.shape, prompt.source_images[0].shape) for image, prompt in zip(images, prompts, strict=True)
        )
        return np.ones(len(images), np.float32)

    score_images(benchmark, Scorer(reward, {}), tmp_path / "images", tmp_path / "scores.jsonl")
    assert sorted(shapes) == [((12, 20, 3), (12, 20, 3)), ((24, 40, 3), (24, 40, 3))]


# Several rewards side by side


def test_one_preference_model_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def bright(images: Images, prompts: Sequence[Prompt]) -> Values:
        return images.mean((1, 2, 3)).astype(np.float32)

    scorer = panel_scorer({"red": Redness(failing=[0]), "bright": bright}, {"red": "none"}, ["red is no model"])
    images = np.stack([plain((0, 0, 9)), plain((51, 0, 0))])
    scores = asyncio.run(Panel.__call__(scorer.reward, images, [Prompt("a")] * 2))  # type: ignore[arg-type]
    assert scores.components["bright"].tolist() == pytest.approx([3.0, 17.0])
    assert scores.components["red"].tolist() == pytest.approx([NAN, 0.2], nan_ok=True)
    assert scores.reasons == {0: "red: the judge is away"}
    assert scorer.deviations == ("red is no model",)


# Results


def test_results_are_saved_read_back_and_labelled(
    scored: Callable[[Any], list[Row]], benchmark: Benchmark, tmp_path: Path
) -> None:
    scorer = Scorer(Redness(failing=[20, 21]), {"judge": "a judge", "template": {"t.v1": "abc123"}}, ("another judge",))
    rows = score_images(benchmark, scorer, tmp_path / "images", tmp_path / "s.jsonl")
    drawing = {"sampler": "ODE", "num_inference_steps": 8, "guidance_scale": 2.5, "shift": 4.0, "image_size": [48, 48],
               "seed": 0, "policy": "p", "policy_sha256": "ab" * 32}  # fmt: skip
    results = results_of(benchmark, scorer, rows, drawing)
    save_results(tmp_path / "results.json", results)
    content = json.loads((tmp_path / "results.json").read_text())
    assert (content["comparable"], "analytic" in content["standard_error"]) == (False, True)
    assert content["drawing"] == drawing
    assert content["scoring"] == {"judge": "a judge", "template": {"t.v1": "abc123"}}
    assert load_results(tmp_path).prompts == results.prompts
    text = format_results(results)
    table = [line for line in text.splitlines() if " +- " in line and "n=" in line]
    assert len(table) == 8
    assert all(line.endswith("not comparable") for line in table)
    for told in (
        "8 steps",
        "guidance 2.5",
        "48x48",
        "seed 0",
        "a judge",
        "t.v1:abc123",
        "another judge",
        "standard error",
    ):
        assert told in text
    # The second prompt has no value: its task, and so the mean of the tasks, is not available, and both are counted.
    overall = results.headline()
    assert np.isnan(overall.value)
    assert overall.failed == 2
    assert "2 x the judge is away" in text
    assert content["numbers"][6]["value"] is None


def test_comparable_results_carry_no_label(benchmark: Benchmark, scored: Callable[[Any], list[Row]]) -> None:
    from dataclasses import replace

    whole = replace(benchmark, deviations=())
    results = results_of(whole, Scorer(Redness(), {}), scored(Redness()), None)
    assert results.is_comparable
    assert "not comparable" not in format_results(results)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"comparable": true, "standard_error": "", "numbers": [{}]}'])
def test_a_file_that_holds_no_results_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="expected the results of pdtr eval"):
        load_results(tmp_path)


# Comparisons


def evaluated(benchmark: Benchmark, folder: Path, values: Sequence[float], judge: str = "j") -> Any:
    rows = [
        Row(item.id, s, "", "", {} if value != value else {"official": value}, "" if value == value else "away")
        for item, value in zip(benchmark.items, values, strict=True)
        for s in range(2)
    ]
    return results_of(benchmark, Scorer(Redness(), {"judge": judge}), rows, None)


def test_two_evaluations_are_compared_prompt_by_prompt(benchmark: Benchmark, tmp_path: Path) -> None:
    first = evaluated(benchmark, tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    second = evaluated(benchmark, tmp_path, [0.3, 0.2, 0.3, 0.4, 0.5, 1.0])
    found = {entry.task: entry.test for entry in compare(first, second)}
    assert found["single_object"].interval.value == pytest.approx(0.2)
    assert found["overall"].interval.value == pytest.approx(0.1)
    assert found["overall"].pairs == 6
    text = format_differences(first, second, compare(first, second))
    assert "not comparable" in text
    assert "+0.1000" in text


def test_a_prompt_without_a_value_is_left_out_of_both(benchmark: Benchmark, tmp_path: Path) -> None:
    whole = Benchmark("x", "", benchmark.items, 2, benchmark.layout, (Metric("m", "official"),), "prompts")
    first = evaluated(whole, tmp_path, [0.0, 0.0, 0.0, 0.0, NAN, 0.0])
    second = evaluated(whole, tmp_path, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    overall = next(entry.test for entry in compare(first, second) if entry.task == "overall")
    assert (overall.interval.value, overall.pairs) == (1.0, 5)


def test_what_cannot_be_compared_is_refused(benchmark: Benchmark, tmp_path: Path) -> None:
    values = [0.0] * 6
    first = evaluated(benchmark, tmp_path, values)
    with pytest.raises(ValueError, match="different judges"):
        compare(first, evaluated(benchmark, tmp_path, values, judge="k"))
    with pytest.raises(ValueError, match="6 and 3 with 3 in common"):
        compare(first, evaluated(benchmark.limited(3), tmp_path, values[:3]))
    other = Benchmark("x", "", benchmark.items, 2, benchmark.layout, benchmark.metrics, "tasks")
    with pytest.raises(ValueError, match="different benchmarks"):
        compare(first, evaluated(other, tmp_path, values))
