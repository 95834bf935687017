"""The report's numbers against ones worked out by hand, and runs that are cut short, damaged or not runs at all."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdtr import report_figures
from pdtr.logbook import Logbook
from pdtr.measures import Measure
from pdtr.report import format_table, interference_table, write_report
from pdtr.report_data import nearest_runs, read_run
from pdtr.report_images import cut_strip, data_uri
from pdtr.statistics import paired_bootstrap, wilson_interval

NUM_PROMPTS = 40
SKILLS = ("recolour", "move")
# Successes out of 40 at each moment; nested, so that differences pair by hand.
SUCCESSES = {
    "edit": {"base": 10, "after edit": 30, "after t2i": 28},
    "t2i": {"base": 8, "after edit": 8, "after t2i": 20},
}
EVIL = 'make <script>alert("x")</script> & "it" red'


def scores(count: int) -> np.ndarray:
    return (np.arange(NUM_PROMPTS) < count).astype(np.float64)


def images(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, 8, 8, 3), dtype=np.uint8)


def evaluate(logbook: Logbook, task: str, iteration: int, label: str, strict: np.ndarray) -> None:
    kind = "final" if label else "tune"
    row = {"iteration": iteration, "seconds": 2.0 * iteration, "label": label, "set": kind, "task": task}
    row |= {"strict": float(np.nanmean(strict)), "reward": 0.5, "count": NUM_PROMPTS, "missing": 0}
    ids = [f"{task}/held_out/2/{index:05d}" for index in range(NUM_PROMPTS)]
    skills = [SKILLS[index % 2] for index in range(NUM_PROMPTS)]
    logbook.evaluation(row, ids, skills, {"strict": strict, "reward": 0.5 * strict}, images(iteration))


def iterate(logbook: Logbook, iteration: int, stage: str, task: str = "edit") -> None:
    row = {"iteration": iteration, "seconds": 2.0 * iteration, "stage": 0, "stage_name": stage, "tasks": [task]}
    row |= {f"reward/{task}": 0.3 + 0.01 * iteration, f"zero_std_ratio/{task}": 0.25, "grad_norm": 0.5}
    logbook.metrics(row | {"kl_loss": 1e-3, f"reward/{task}/strict": 0.2, "seconds_rollout": 1.0})


def build(folder: Path, stages: tuple[str, ...] = ("edit", "t2i"), tasks: tuple[str, ...] = ("edit", "t2i")) -> Path:
    """A run of ten iterations a stage, with final evaluations around each and tuning ones within."""
    logbook = Logbook(folder, tensorboard=False)
    config = {
        "output_dir": "runs/x",
        "algorithm": {"class": "DiffusionNFT", "beta": 1.0},
        "evaluation": {"num_grid": 4},
    }
    versions = {"torch": "2.13.0", "numpy": "2.4"}
    described = {"recipe": "pdtr_scenes", "command": "pdtr train pdtr_scenes --seed 7", "config": config, "seed": 7}
    described |= {"versions": versions, "started": "2025-09-04T12:00:00+00:00"}
    (folder / "config.json").write_text(json.dumps(described))
    for task in tasks:
        logbook.prompts(task, [EVIL, "two cats", "三只猫", "a dog"], images(99) if task == "edit" else None)
        evaluate(logbook, task, 0, "base", scores(SUCCESSES[task]["base"]))
    for index, stage in enumerate(stages):
        for iteration in range(10 * index + 1, 10 * index + 11):
            iterate(logbook, iteration, stage, stage)
        for task in tasks:
            evaluate(logbook, task, 10 * index + 5, "", scores(20))
            evaluate(logbook, task, 10 * index + 10, f"after {stage}", scores(SUCCESSES[task][f"after {stage}"]))
    return folder


class Page(HTMLParser):
    """Checks that tags nest, and gathers text and images."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "src":
                self.images.append(str(value))
            if name in ("href", "xlink:href"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text("utf-8"))


def test_interference_table_by_hand(tmp_path: Path) -> None:
    base, edited, both = interference_table(build(tmp_path))
    assert [row["label"] for row in (base, edited, both)] == ["base", "after edit", "after t2i"]
    assert [row["iteration"] for row in (base, edited, both)] == [0, 10, 20]
    assert base["cells"]["edit"]["score"] == wilson_interval(10, 40)
    assert base["cells"]["edit"]["over_base"] is base["cells"]["edit"]["over_previous"] is None
    assert edited["cells"]["edit"]["over_base"].value == 20 / 40
    assert edited["cells"]["edit"]["over_base"].sign == 1
    assert edited["cells"]["t2i"]["over_previous"] == (0.0, 0.0, 0.0)
    assert both["cells"]["edit"]["over_previous"] == paired_bootstrap(scores(28), scores(30))
    assert both["cells"]["edit"]["over_previous"].value == pytest.approx(-2 / 40)
    assert both["cells"]["edit"]["over_previous"].sign == 0
    assert both["cells"]["edit"]["over_base"].value == pytest.approx(18 / 40)
    assert both["cells"]["t2i"]["over_previous"].value == pytest.approx(12 / 40)


def test_numbers_in_the_page(tmp_path: Path) -> None:
    text = page_of(build(tmp_path)).text
    # Wilson by hand for 10 of 40: (.25 + z^2/80 +- z sqrt(.25 .75/40 + z^2/6400)) / (1 + z^2/40) = .1419, .4019.
    assert "25.0 [14.2, 40.2] of 40 prompts" in text
    assert "75.0 [59.8, 85.8] of 40 prompts" in text
    assert re.search(r"\+50\.0 \[\+3\d\.\d, \+6\d\.\d\] over base", text)
    assert re.search(r"−5\.0 \[−1\d\.\d, \+0\.0\] over the row before", text)
    assert "25.0 → 70.0 %" in text
    assert "20.0 → 50.0 %" in text
    # Even prompts are "recolour": 5 of 20 at the base, 14 of 20 at the end.
    assert re.search(r"recolour 25\.0 75\.0 70\.0 \+45\.0", text)
    assert "partial" not in text
    for fact in ("pdtr train pdtr_scenes --seed 7", "seed 7", "20 iterations", "40 s", "torch 2.13.0"):
        assert fact in text
    assert "algorithm DiffusionNFT algorithm.beta 1.0" in text


def test_coloured_where_the_interval_clears_zero(tmp_path: Path) -> None:
    markup = write_report(build(tmp_path)).read_text("utf-8")
    assert re.search(r'class="change up">\+50\.0 ', markup)
    assert re.search(r'class="change">−5\.0 ', markup)
    assert not re.search(r'class="change down">', markup)


def test_the_page_needs_nothing_else_and_escapes_what_the_run_wrote(tmp_path: Path) -> None:
    path = write_report(build(tmp_path))
    markup = path.read_text("utf-8")
    page = Page(markup)
    assert "<script" not in markup
    assert EVIL in page.text
    assert "三只猫" in page.text
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    assert all(link.startswith("#") for link in page.links)
    assert "url(http" not in markup
    # 4 prompts: source, base and two stages for editing; base and two stages for text-to-image.
    assert len(page.images) == 4 * 4 + 4 * 3
    assert data_uri(images(10)[2]) in page.images
    assert not list(tmp_path.glob("*.tmp"))


def test_the_same_run_gives_the_same_report(tmp_path: Path) -> None:
    build(tmp_path)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_one_task_and_one_stage(tmp_path: Path) -> None:
    folder = build(tmp_path, stages=("edit",), tasks=("edit",))
    assert [list(row["cells"]) for row in interference_table(folder)] == [["edit"], ["edit"]]
    assert "Text-to-image" not in page_of(folder).text


def test_a_run_without_final_evaluations_says_so(tmp_path: Path) -> None:
    logbook = Logbook(build(tmp_path), tensorboard=False)
    for iteration in range(21, 24):
        iterate(logbook, iteration, "polish")
    text = page_of(tmp_path).text
    assert "This report is partial" in text
    assert "No final evaluation “after polish” of Editing and Text-to-image yet." in text
    last = interference_table(tmp_path)[-1]
    assert last == {"label": "after polish", "iteration": None, "cells": {"edit": None, "t2i": None}}


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    text = page_of(tmp_path).text
    assert "metrics.jsonl has no rows." in text
    assert "Nothing was logged yet." in text
    assert format_table(interference_table(tmp_path)).splitlines()[-1] == "base"


def test_iterations_only(tmp_path: Path) -> None:
    logbook = Logbook(tmp_path, tensorboard=False)
    iterate(logbook, 1, "edit")
    text = page_of(tmp_path).text
    assert "config.json cannot be read (FileNotFoundError)" in text
    assert "Editing not measured yet" in text
    assert "training reward" in text


def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "evaluations/000010-edit-final.json").unlink()
    (tmp_path / "evaluations/000020-t2i-final.png").write_bytes(b"no image")
    (tmp_path / "evaluations/prompts-edit.json").unlink()
    (tmp_path / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes()[:-4])
    page = page_of(tmp_path)
    for problem in (
        "000010-edit-final.json: expected the scores",
        "000020-t2i-final.png: expected a strip of 4 images",
    ):
        assert problem in page.text
    assert "the last line is torn" in page.text
    assert "edit/held_out/2/00002" in page.text
    # The mean is still known; what needs the prompts is not.
    assert "75.0 [–, –] of 40 prompts" in page.text
    assert len(page.images) == 4 * 4 + 4 * 2


def test_a_damaged_evaluation_is_nothing_to_compare_with(tmp_path: Path) -> None:
    """What follows it is not compared with another row under its name."""
    build(tmp_path)
    (tmp_path / "evaluations/000000-edit-final.json").unlink()
    (tmp_path / "evaluations/000010-t2i-final.json").unlink()
    _, edited, both = (row["cells"] for row in interference_table(tmp_path))
    assert edited["edit"]["over_base"] is edited["edit"]["over_previous"] is both["edit"]["over_base"] is None
    assert both["edit"]["over_previous"].value == pytest.approx(-2 / 40)
    assert edited["t2i"]["over_base"] is edited["t2i"]["over_previous"] is both["t2i"]["over_previous"] is None
    assert both["t2i"]["over_base"].value == pytest.approx(12 / 40)


def test_missing_scores_do_not_count(tmp_path: Path) -> None:
    build(tmp_path, stages=("edit",))
    strict = scores(30)
    strict[:5] = math.nan
    evaluate(Logbook(tmp_path, tensorboard=False), "edit", 10, "after edit", strict)
    cell = interference_table(tmp_path)[1]["cells"]["edit"]
    assert cell["score"] == wilson_interval(25, 35)
    assert cell["missing"] == 5
    # Of the 35 pairs that are left, 20 went from 0 to 1.
    assert cell["over_base"].value == pytest.approx(20 / 35)
    assert "of 40 prompts, 5 missing" in page_of(tmp_path).text


def test_prompts_are_paired_by_id(tmp_path: Path) -> None:
    build(tmp_path, stages=("edit",))
    path = tmp_path / "evaluations/000010-edit-final.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({key: values[::-1] for key, values in found.items()}))
    assert interference_table(tmp_path)[1]["cells"]["edit"]["over_base"].value == 0.5
    assert interference_table(tmp_path)[1]["cells"]["edit"]["over_base"].low >= 0.3


def test_table_for_the_terminal(tmp_path: Path) -> None:
    lines = format_table(interference_table(build(tmp_path))).splitlines()
    assert lines[1].split() == ["Editing", "Text-to-image"]
    assert lines[2].split("  ")[0] == "base"
    assert "25.0 [14.2, 40.2]" in lines[2]
    assert re.match(r"  over base +\+50\.0 \[\+\d+\.\d, \+\d+\.\d\] \* +\+0\.0 \[\+0\.0, \+0\.0\]$", lines[4])
    assert [line.strip().split("  ")[0] for line in lines[5:]] == ["after t2i", "over the row before", "over base"]


def test_what_is_not_a_run_is_named_with_the_nearest_runs(tmp_path: Path) -> None:
    build(tmp_path / "runs" / "pdtr_scenes", stages=("edit",), tasks=("edit",))
    build(tmp_path / "runs" / "other", stages=("edit",), tasks=("edit",))
    with pytest.raises(ValueError, match=r"expected a run's folder with config\.json or metrics\.jsonl.*pdtr_scenes"):
        write_report(tmp_path / "runs" / "pdtr_scnes")
    below = tmp_path / "runs" / "other" / "checkpoints" / "step-000010"
    assert tmp_path / "runs" / "other" in nearest_runs(below)
    assert tmp_path / "runs" / "other" in nearest_runs(tmp_path)


def test_several_sources_are_shown_side_by_side_each_as_large_as_a_drawn_one(tmp_path: Path) -> None:
    build(tmp_path / "one")
    build(tmp_path / "two")
    pairs = np.concatenate([images(98), images(99)], axis=2)
    Logbook(tmp_path / "two", tensorboard=False).prompts("edit", ["a", "b", "c", "d"], pairs)
    pages = {name: write_report(tmp_path / name).read_text() for name in ("one", "two")}
    assert pages["one"].count('style="--pictures') == 0
    assert pages["two"].count('<figure style="--pictures: 2">') == 4
    assert data_uri(pairs[0]) in pages["two"]


def test_strips(tmp_path: Path) -> None:
    Logbook(tmp_path, tensorboard=False).prompts("edit", [], images(1))
    path = tmp_path / "evaluations" / "sources-edit.png"
    for found, expected in zip(cut_strip(path, 4), images(1), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="expected 3 images side by side, got a width of 32 pixels"):
        cut_strip(path, 3)


def test_an_evaluation_without_any_answer_does_not_say_what_counts(tmp_path: Path) -> None:
    run = read_run(build(tmp_path))
    unanswered = {"task": "edit", "strict": math.nan, "success": "reward"}
    assert replace(run, evaluations=[*run.evaluations, unanswered]).measure("edit") == Measure("strict")
    assert replace(run, evaluations=[unanswered]).measure("edit") == Measure("reward")


@pytest.mark.parametrize("letters", [6, 18, 60])
def test_legends_stay_within_their_figure(letters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logbook = Logbook(tmp_path, tensorboard=False)
    names = {f"component/{i}": f"{i}" + "n" * (letters - 1) for i in range(9)}
    logbook.metrics({"iteration": 1, "seconds": 1.0, **dict.fromkeys(names, 0.5)})
    drawn: list[Any] = []
    monkeypatch.setattr(report_figures, "_svg", lambda figure: drawn.append(figure) or "")
    report_figures.metric_curve(read_run(tmp_path), names)
    (figure,) = drawn
    figure.draw_without_rendering()
    legend, page = figure.axes[0].get_legend().get_window_extent(), figure.bbox
    assert page.x0 <= legend.x0 < legend.x1 <= page.x1
    assert page.y0 <= legend.y0 < legend.y1 <= page.y1
