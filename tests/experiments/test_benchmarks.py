from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.benchmarks import order_study, pdtr_scenes, startup
from experiments.benchmarks.entry import run_benchmark, split_flags
from experiments.benchmarks.finals import Final, Study, read_study
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.seeds import Job, RunSpec, read_cost, run_jobs, run_specs
from experiments.benchmarks.tables import points, read_csv, text_table, write_csv
from experiments.benchmarks.timing import interleaved, median_interval
from pdtr.curriculum import SingleTask
from pdtr.statistics import Interval

# Student's t with 2 degrees of freedom at 95 %.
T_2 = 4.302653

Scores = dict[tuple[str, str], list[int | None]]


def make_run(folder: Path, recipe: str, seed: int, stages: list[str], scores: Scores) -> RunSpec:
    """A run's folder as the trainer leaves it; every stage has 10 iterations of 2 seconds."""
    (folder / "evaluations").mkdir(parents=True)
    config = {"recipe": recipe, "seed": seed, "config": {"seed": seed, "output_dir": str(folder), "learning_rate": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "report.html").write_text("")
    names = [stage for stage in stages for _ in range(10)]
    metrics = [
        {"iteration": i + 1, "seconds": 2.0 * (i + 1), "stage_name": n, "tasks": []} for i, n in enumerate(names)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    order = ["base", *(f"after {stage}" for stage in stages)]
    with (folder / "evaluations.jsonl").open("w") as file:
        for (label, task), strict in scores.items():
            iteration = 10 * order.index(label)
            path = f"evaluations/{iteration:06d}-{task}-final.json"
            ids = [f"{task}/{index}" for index in range(len(strict))]
            body = {"ids": ids, "skills": ["count"] * len(strict), "strict": strict, "reward": strict}
            (folder / path).write_text(json.dumps(body))
            known = [value for value in strict if value is not None]
            row = {"iteration": iteration, "seconds": 2.0 * iteration, "label": label, "set": "final", "task": task}
            row |= {"strict": sum(known) / len(known), "count": len(strict), "missing": len(strict) - len(known)}
            file.write(json.dumps(row | {"file": path}) + "\n")
            # A small evaluation of the same moment, which must not be taken for the final one.
            file.write(json.dumps(row | {"set": "tune", "label": "", "strict": 0.123}) + "\n")
    return RunSpec(recipe, seed, folder)


def scores(edit: list[int], t2i: list[int]) -> Scores:
    """Successes out of 10 at the base, after editing and after text-to-image."""
    labels = ("base", "after edit", "after t2i")
    by_task = {"edit": edit, "t2i": t2i}
    return {
        (label, task): [1] * values[i] + [0] * (10 - values[i])
        for i, label in enumerate(labels)
        for task, values in by_task.items()
    }


@pytest.fixture
def specs(tmp_path: Path) -> list[RunSpec]:
    stages = ["edit", "t2i"]
    by_seed = [scores([4, 5, 5], [2, 2, 5]), scores([4, 6, 6], [2, 3, 6]), scores([4, 7, 6], [2, 2, 7])]
    return [
        make_run(tmp_path / f"seed-{seed}", "pdtr_scenes", seed, stages, found) for seed, found in enumerate(by_seed)
    ]


@pytest.fixture
def study(specs: list[RunSpec], tmp_path: Path) -> Study:
    return read_study(specs, tmp_path / "none.csv")


def test_only_final_evaluations_are_read(study: Study) -> None:
    assert len(study.finals) == 3 * 3 * 2
    assert study.labels("pdtr_scenes") == ["base", "after edit", "after t2i"]
    assert study.scores("pdtr_scenes", "after edit", "edit") == {0: 0.5, 1: 0.6, 2: 0.7}
    row = next(row for row in study.finals if (row.seed, row.label, row.task) == (1, "after t2i", "t2i"))
    assert (row.strict, row.count, row.missing, row.iteration, row.seconds) == (0.6, 10, 0, 20, 40.0)


def test_gains_are_those_worked_by_hand(study: Study) -> None:
    edit, t2i, kept = pdtr_scenes.gains(study)
    # Editing +.1, +.2, +.3: mean .2, standard deviation .1.
    assert (edit.after, edit.before, edit.num_seeds) == ("after edit", "base", 3)
    assert edit.gain == pytest.approx(0.2)
    assert edit.low == pytest.approx(0.2 - T_2 * 0.1 / math.sqrt(3), abs=1e-5)
    assert edit.high == pytest.approx(0.2 + T_2 * 0.1 / math.sqrt(3), abs=1e-5)
    # The interval over three seeds reaches below 0, so that +20 points alone do not meet the goal.
    assert edit.low < 0
    assert edit.is_met == "no"
    # Text-to-image +.3, +.4, +.5: the interval is .4 +- .248.
    assert t2i.gain == pytest.approx(0.4)
    assert t2i.low == pytest.approx(0.4 - 0.248414, abs=1e-5)
    assert (t2i.after, t2i.before, t2i.is_met) == ("after t2i", "base", "yes")
    # Editing 0, 0, -.1 through the second stage: -.033, below the goal of -.03.
    assert kept.gain == pytest.approx(-1 / 30)
    assert (kept.after, kept.before, kept.is_met) == ("after t2i", "after edit", "no")


def test_seeds_are_averaged_before_prompts_are_resampled(study: Study) -> None:
    found = study.over_prompts("pdtr_scenes", "edit", "after edit", "base")
    assert found is not None
    assert found.value == pytest.approx(0.2)
    # Prompt 4 is gained by all seeds, 5 by two, 6 by one, of ten: deviation of the mean sqrt((1 + 4/9 + 1/9) / 10 -
    # .2^2) / sqrt(10) = .1075, so that the interval is near .2 +- .21 and cannot reach below 0.
    deviation = math.sqrt((1 + 4 / 9 + 1 / 9) / 10 - 0.04) / math.sqrt(10)
    assert found.low >= 0
    assert found.high == pytest.approx(0.2 + 1.96 * deviation, abs=0.05)


def test_a_missing_score_leaves_its_pair_out(tmp_path: Path) -> None:
    one: Scores = {("base", "edit"): [0, 0, None, 1], ("after edit", "edit"): [1, 0, 1, 1]}
    spec = make_run(tmp_path / "run", "edit_only", 0, ["edit"], one)
    study = read_study([spec], tmp_path / "none.csv")
    found = study.over_prompts("edit_only", "edit", "after edit", "base")
    assert found is not None
    assert found.value == pytest.approx(1 / 3)
    assert [row.missing for row in study.finals] == [1, 0]


def test_the_tables_show_means_intervals_and_numbers(study: Study) -> None:
    text = pdtr_scenes.format_study(study, pdtr_scenes.gains(study))
    assert describe_machine().rpartition(", load")[0] in text
    assert "pdtr_scenes, after edit      3       10  60.0 [35.2, 84.8]" in text
    gain = next(line for line in text.splitlines() if "edit: after edit - base" in line)
    assert gain.split()[-8:] == ["3", "+20.0", "[-4.8,", "+44.8]", *gain.split()[-4:-2], "+10", "no"]


def test_unfinished_runs_are_left_out(specs: list[RunSpec], tmp_path: Path) -> None:
    (specs[1].folder / "report.html").unlink()
    study = read_study(specs, tmp_path / "none.csv")
    assert study.scores("pdtr_scenes", "base", "edit").keys() == {0, 2}


def test_another_run_in_the_folder_is_refused(specs: list[RunSpec], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a run of 'pdtr_scenes' with seed 9, got one of 'pdtr_scenes' with"):
        read_study([replace(specs[0], seed=9)], tmp_path / "none.csv")


def test_seeds_with_different_configurations_are_refused(specs: list[RunSpec], tmp_path: Path) -> None:
    path = specs[2].folder / "config.json"
    config = json.loads(path.read_text())
    config["config"]["learning_rate"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="got another learning_rate"):
        read_study(specs, tmp_path / "none.csv")


def test_the_table_comes_from_the_csv_where_the_runs_are_gone(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    write_csv(path, study.finals)
    again = read_study([RunSpec("pdtr_scenes", 0, tmp_path / "gone")], path)
    assert again.scores("pdtr_scenes", "after t2i", "t2i") == study.scores("pdtr_scenes", "after t2i", "t2i")
    gains, before = pdtr_scenes.gains(again), pdtr_scenes.gains(study)
    assert [gain.low for gain in gains] == pytest.approx([gain.low for gain in before])
    assert all(math.isnan(gain.prompts_low) for gain in gains)
    with pytest.raises(ValueError, match="found neither"):
        read_study([RunSpec("pdtr_scenes", 0, tmp_path / "gone")], tmp_path / "none.csv")


def test_only_table_writes_both_files_and_runs_nothing(
    specs: list[RunSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    for spec in specs:
        (runs / "pdtr_scenes").mkdir(parents=True, exist_ok=True)
        spec.folder.rename(runs / "pdtr_scenes" / f"seed-{spec.seed}")
    arguments = ["--only-table", "--runs", str(runs), "--results", str(results), "--recipes", "pdtr_scenes"]
    assert run_benchmark(pdtr_scenes.benchmark, arguments) == 0
    assert len((results / "pdtr_scenes.csv").read_text().splitlines()) == 1 + 18
    gains = read_csv(results / "pdtr_scenes_gains.csv", pdtr_scenes.Gain)
    assert [gain.gain for gain in gains] == pytest.approx([0.2, 0.4, -1 / 30], abs=1e-6)
    assert "over prompts" in capsys.readouterr().out


def final(arm: str, seed: int, label: str, iteration: int, score: tuple[str, float]) -> Final:
    return Final(arm, seed, label, score[0], score[1], 10, 0, iteration, 0.0, math.nan, math.nan)


def test_the_order_study_is_that_worked_by_hand() -> None:
    rows = []
    for seed, last in enumerate((0.5, 0.6)):
        for arm, stages in {"edit_then_t2i": ("edit", "t2i"), "joint": ("joint",)}.items():
            for place, label in enumerate(("base", *(f"after {stage}" for stage in stages))):
                edit = {0: 0.4, 1: 0.7, 2: last}[place]
                rows += [final(arm, seed, label, 10 * place, pair) for pair in (("edit", edit), ("t2i", 0.1 * place))]
    study = Study(tuple(rows), {})
    first, joint = (order_study.arm_result(study, arm) for arm in ("edit_then_t2i", "joint"))
    assert first.forgetting == {0: pytest.approx(-0.2), 1: pytest.approx(-0.1)}
    assert first.both == {0: pytest.approx(0.35), 1: pytest.approx(0.4)}
    assert joint.edit == {0: 0.7, 1: 0.7}
    assert joint.forgetting == {}
    lines = order_study.format_study(study).splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["base", "edit_then_t2i", "joint"]
    # Joint's mean is .4 with both seeds, against .35 and .4: +.05 and 0, t = 12.706, deviation .0354 / sqrt(2).
    assert "+2.5 [-29.3, +34.3]" in lines[-1]
    assert "-15.0 [-78.5, +48.5]" in lines[-2]


def python(tmp_path: Path, name: str, program: str) -> Job:
    return Job(name, (sys.executable, "-c", program), tmp_path / name)


def test_jobs_are_run_logged_and_measured(tmp_path: Path) -> None:
    program = "import os; block = bytearray(os.urandom(64 << 20)); print('threads', os.environ['OMP_NUM_THREADS'])"
    small, large = python(tmp_path, "small", "print('hello')"), python(tmp_path, "large", program)
    outcomes = {outcome.job.name: outcome for outcome in run_jobs([small, large], 2)}
    assert [outcome.exit_code for outcome in outcomes.values()] == [0, 0]
    assert (small.folder / "log.txt").read_text() == "hello\n"
    assert (large.folder / "log.txt").read_text() == "threads 1\n"
    assert outcomes["large"].peak_mib > 64
    assert 0 < outcomes["small"].seconds < 60
    cost = read_cost(large.folder)
    assert cost.seconds == pytest.approx(outcomes["large"].seconds, abs=0.01)
    assert cost.peak_mib == pytest.approx(outcomes["large"].peak_mib, abs=0.1)


def test_no_more_than_the_asked_number_run_at_a_time(tmp_path: Path) -> None:
    program = "import time; print(time.time()); time.sleep(0.3); print(time.time())"
    jobs = [python(tmp_path, str(index), program) for index in range(4)]
    run_jobs(jobs, 2)
    spans = [tuple(map(float, (job.folder / "log.txt").read_text().split())) for job in jobs]
    together = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(together) == 2


def test_a_failure_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    jobs = [python(tmp_path, "bad", "raise SystemExit(3)"), python(tmp_path, "good", "pass")]
    assert {outcome.job.name: outcome.exit_code for outcome in run_jobs(jobs, 1)} == {"bad": 3, "good": 0}


def test_sittings_add_up_and_a_lost_end_is_unknown(tmp_path: Path) -> None:
    job = python(tmp_path, "twice", "pass")
    first, second = run_jobs([job], 1)[0], run_jobs([job], 1)[0]
    assert read_cost(job.folder).seconds == pytest.approx(first.seconds + second.seconds, abs=0.02)
    with (job.folder / "sittings.jsonl").open("a") as file:
        file.write('{"event": "start"}\n')
    assert math.isnan(read_cost(job.folder).seconds)
    assert math.isnan(read_cost(tmp_path / "nothing").peak_mib)


def test_what_is_running_ends_with_the_runner(tmp_path: Path) -> None:
    def stop(outcome: Any) -> None:
        raise KeyboardInterrupt

    jobs = [python(tmp_path, "short", "pass"), python(tmp_path, "long", "import time; time.sleep(120)")]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, 2, stop)
    end = json.loads((jobs[1].folder / "sittings.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["exit_code"]) == ("end", -15)


def test_a_run_is_resumed_where_it_began(tmp_path: Path) -> None:
    (spec,) = run_specs(["pdtr-scenes"], [3], tmp_path, ["--num-prompts", "4"])
    assert spec == RunSpec("pdtr_scenes", 3, tmp_path / "pdtr_scenes" / "seed-3", ("--num-prompts", "4"))
    own = ("--seed", "3", "--output-dir", str(spec.folder), "--num-threads", "1")
    start = (sys.executable, "-m", "experiments.cli", "train", "pdtr_scenes", *own)
    assert spec.job().command == (*start, "--num-prompts", "4")
    spec.folder.mkdir(parents=True)
    (spec.folder / "config.json").write_text("{}")
    assert spec.job().command == (*start, "--resume", "--num-prompts", "4")
    assert not spec.is_finished
    (spec.folder / "report.html").write_text("")
    assert spec.is_finished


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_benchmark(pdtr_scenes.benchmark, ["--seeds", "1", "1"]) == 2
    assert "expected at least one, each once, got [1, 1]" in capsys.readouterr().err
    assert run_benchmark(order_study.benchmark, ["--only-table", "--runs", str(tmp_path), "--results", "/none"]) == 2
    assert "found neither" in capsys.readouterr().err


def test_flags_after_two_hyphens_are_the_runs() -> None:
    assert split_flags(["--jobs", "1", "--", "--num-prompts", "4"]) == (["--jobs", "1"], ("--num-prompts", "4"))
    assert split_flags(["--jobs", "1"]) == (["--jobs", "1"], ())


def test_every_call_is_made_once_a_repeat_in_turning_order() -> None:
    made: list[str] = []
    seconds = interleaved({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, 2)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert "".join(made) == "ba" + "ab" + "ba"


def test_the_median_and_its_interval() -> None:
    assert median_interval([3.0, 1.0, 2.0]).value == 2.0
    assert median_interval([5.0, 5.0]) == Interval(5.0, 5.0, 5.0)
    found = median_interval(np.arange(101.0))
    # The median's rank under resampling has deviation sqrt(101) / 2 = 5: 50 +- 10.
    assert found.low == pytest.approx(40, abs=2)
    assert found.high == pytest.approx(60, abs=2)


def test_tables_are_aligned() -> None:
    assert text_table(["", "n"], [["long name", "3"], ["x", "12"]]) == (
        "            n\n---------  --\nlong name   3\nx          12"
    )
    assert points(Interval(0.5, 0.25, 0.75)) == "50.0 [25.0, 75.0]"
    assert points(Interval(0.5, math.nan, math.nan), signed=True) == "+50.0"


def test_start_up_is_measured_per_command() -> None:
    found = startup.measure({"nothing": (sys.executable, "-c", "pass")}, 2)
    assert [(row.quantity, row.case, row.n, row.unit) for row in found] == [
        ("best", "nothing", 2, "s"),
        ("median", "nothing", 2, "s"),
    ]
    assert 0 < found[0].value <= found[1].value
    assert {dataclasses.astuple(row)[-1] for row in found} == {found[0].machine}


def test_the_stopwatch_accounts_for_a_rollout(tiny_policy: Any) -> None:
    from agents.samplers import FlowSDE
    from experiments.benchmarks.collect_timing import time_collect, time_update
    from experiments.recipes import find_recipe
    from pdtr.tasks import scenes_tasks

    config = find_recipe("flow_grpo_scenes")()
    algorithm = replace(config.algorithm, rollout_sampler=FlowSDE(num_inference_steps=3))
    learner = replace(config.learner, num_minibatches=2)
    sizes = {"num_prompts": 2, "group_size": 2, "chunk_size": 2}
    config = replace(config, algorithm=algorithm, learner=learner, curriculum=SingleTask("t2i", 1), **sizes)
    task = scenes_tasks(1, 1)["edit"]
    times = time_collect(tiny_policy, task, config, 2)
    parts = times.encode + times.forward + times.decode
    assert times.collect.shape == times.bare.shape == times.encode.shape == (2,)
    assert (parts < times.collect).all()
    assert min(times.encode.min(), times.forward.min(), times.decode.min()) > 0
    assert times.cost_within == pytest.approx((times.collect - times.decode) / times.forward)
    before = {name: tensor.clone() for name, tensor in tiny_policy.transformer.state_dict().items()}
    assert (time_update(tiny_policy, task, config, 1) > 0).all()
    assert any(not tensor.equal(before[name]) for name, tensor in tiny_policy.transformer.state_dict().items())
