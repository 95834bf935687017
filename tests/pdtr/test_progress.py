"""What the display says, on a terminal and off one."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pdtr.adaptive import Adaptive
from pdtr.config import TrainConfig
from pdtr.curriculum import Joint, pdtr_curriculum
from pdtr.logbook import Logbook
from pdtr.progress import Progress, Reading, duration, stage_lengths


def row(iteration: int, stage: str = "edit", reward: float = 0.5, **more: object) -> dict[str, object]:
    found: dict[str, object] = {"iteration": iteration, "stage_name": stage, "tasks": [stage], "grad_norm": 0.25}
    return found | {f"reward/{stage}": reward, "seconds_rollout": 1.0, "seconds_update": 3.0, "kl_loss": 1e-3} | more


def evaluation(iteration: int, task: str, strict: float, kind: str = "tune") -> dict[str, object]:
    return {"iteration": iteration, "task": task, "set": kind, "label": "", "strict": strict, "count": 120}


def make(folder: Path, is_terminal: bool, every: int = 10) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=100, color_system=None)
    config = TrainConfig(output_dir=folder, curriculum=pdtr_curriculum(40, 60), num_prompts=8, group_size=12)
    return Progress(config, console, every), stream


def test_reading_by_hand() -> None:
    reading = Reading(total=100, images_per_iteration=96)
    reading.iterate(row(1, reward=1.0), now=14.0)
    reading.iterate(row(2, reward=0.0), now=20.0)
    assert reading.reward["edit"] == pytest.approx(0.9)
    assert reading.images_per_second == 24.0
    assert (reading.kl, reading.grad_norm) == (1e-3, 0.25)
    # The first iteration took 4 s and ended at 14, so two took 10 s; 98 are left.
    assert reading.seconds_left == pytest.approx(490.0)
    reading.iterate(row(3, stage="t2i"), now=25.0)
    assert (reading.stage_name, reading.stage_iteration) == ("t2i", 1)
    assert reading.seconds_left == pytest.approx(97 * 5.0)


def test_change_is_against_the_base_on_the_same_prompts() -> None:
    reading = Reading()
    for task, kind, strict in [("edit", "final", 0.5), ("edit", "tune", 0.4), ("edit", "tune", 0.45)]:
        reading.evaluate(evaluation(0, task, strict, kind))
    assert reading.scores() == ["edit 45.0 % (+5.0)"]
    reading.evaluate(evaluation(40, "edit", 0.48, "final"))
    assert reading.scores() == ["edit 48.0 % (-2.0)"]


def test_missing_numbers_are_left_out() -> None:
    reading = Reading()
    reading.iterate({"iteration": 1, "tasks": ["edit"], "reward/edit": float("nan"), "grad_norm": None}, now=0.0)
    reading.evaluate({"iteration": 1, "task": "edit", "set": "tune", "strict": None})
    assert reading.line() == "iteration 1"


def test_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    progress, stream = make(tmp_path, is_terminal=False, every=2)
    with progress:
        progress.evaluation(evaluation(0, "edit", 0.5))
        for iteration in range(1, 6):
            progress.iteration(row(iteration))
        progress.evaluation(evaluation(5, "edit", 0.625))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "measuring the base"
    assert lines[1] == "iteration 0: held-out edit 50.0 % of 120 (+0.0)"
    assert [line.split("  ")[0] for line in lines[2:5]] == ["iteration 1/100", "iteration 2/100", "iteration 4/100"]
    assert "reward edit 0.500  held-out edit 50.0 % (+0.0)  KL 1.00e-03  grad 0.25  24.0 images/s" in lines[2]
    assert lines[5] == "iteration 5: held-out edit 62.5 % of 120 (+12.5)"
    assert "\x1b" not in stream.getvalue()


def test_live_display(tmp_path: Path) -> None:
    progress, stream = make(tmp_path, is_terminal=True)
    with progress:
        progress.evaluation(evaluation(0, "edit", 0.5))
        progress.iteration(row(1))
        progress.evaluation(evaluation(1, "t2i", 0.25))
    shown = stream.getvalue()
    for text in ("iteration 1/100", "edit, iteration 1 of at most 40", "edit 50.0 % (+0.0)", "t2i 25.0 % (+0.0)"):
        assert text in shown
    for text in ("KL 1.00e-03", "gradient 0.25", "24.0 images/s", "left"):
        assert text in shown


def test_display_stops_when_the_run_fails(tmp_path: Path) -> None:
    progress, stream = make(tmp_path, is_terminal=True)
    with pytest.raises(RuntimeError, match="boom"), progress:
        raise RuntimeError("boom")
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_resumed_run_goes_on_from_its_base_and_its_stage(tmp_path: Path) -> None:
    logbook = Logbook(tmp_path, tensorboard=False)
    for kind, strict in [("final", 0.4), ("tune", 0.5)]:
        logbook.evaluation(evaluation(0, "edit", strict, kind), [], [], {}, [])
    for iteration in range(1, 21):
        logbook.metrics(row(iteration))
    progress, _ = make(tmp_path, is_terminal=False)
    with progress:
        progress.iteration(row(21))
        progress.evaluation(evaluation(21, "edit", 0.75))
    assert progress.reading.stage_iteration == 21
    assert progress.reading.scores() == ["edit 75.0 % (+25.0)"]


def test_stage_lengths() -> None:
    assert stage_lengths(pdtr_curriculum(40, 60)) == {"edit": 40, "t2i": 60}
    assert stage_lengths(Adaptive(Joint(30))) == {"joint": 30}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3599.6, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_lines_need_a_distance(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every: expected at least 1"):
        make(tmp_path, is_terminal=False, every=0)
