"""The comparison of runs by hand, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.benchmarks import world_size
from experiments.benchmarks.tables import RESULTS, read_csv
from experiments.benchmarks.world_size_runs import ITERATIONS, Difference, Job, begun, difference
from pdtr.checkpoint import checkpoint_name, checkpoints, save_state


def save(folder: Path, current: list[float], moments: list[float], step: int = ITERATIONS) -> Path:
    tensors = {"weights.current.a": current[:2], "weights.current.b.current.c": current[2:]}
    tensors |= {"weights.reference.a": [3.0, 0.0], "weights.reference.b.current.c": [0.0]}
    tensors |= {"optimizer.state.0.exp_avg": moments, "optimizer.state.0.step": [float(step)]}
    state = {name: torch.tensor(values) for name, values in tensors.items()}
    save_state(folder / "checkpoints" / checkpoint_name(step), state, {})
    return folder


def test_differences_by_hand(tmp_path: Path) -> None:
    one = save(tmp_path / "one", [3.0, 0.0, 4.0], [2.0, -4.0])
    other = save(tmp_path / "other", [3.0, 0.5, 3.0], [2.0, -3.0])
    found = difference(one, other)
    # |a - b| is the length of (0, 1/2, 1), |a| is 5, and a has moved by 4.
    assert found == Difference(1.0, pytest.approx(1.25**0.5 / 5), pytest.approx(0.8), 0.25)
    assert difference(one, one) == Difference(0.0, 0.0, pytest.approx(0.8), 0.0)


def test_runs_of_other_tensors_are_not_compared(tmp_path: Path) -> None:
    one = save(tmp_path / "one", [3.0, 0.0, 4.0], [2.0])
    other = tmp_path / "other"
    save_state(other / "checkpoints" / checkpoint_name(ITERATIONS), {"weights.current.a": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="expected the tensors of"):
        difference(one, other)


def test_a_run_is_put_back_to_where_it_was(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for step in (1, 2, 3):
        save(whole, [float(step)] * 3, [1.0], step)
    (whole / "policy").mkdir()
    job = begun(Job(tmp_path / "again"), whole, 2)
    assert job.resume
    assert [path.name for path in checkpoints(job.folder / "checkpoints")] == ["step-000001", "step-000002"]
    assert len(checkpoints(whole / "checkpoints")) == 3
    assert not (job.folder / "policy").exists()


def test_the_table_is_written_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [("2 processes", Job(tmp_path, "flow_grpo", "lora"), Difference(1e-7, 2e-8, 0.25, 3e-6))]
    monkeypatch.setattr(world_size, "compare", lambda folder: found)
    assert world_size.benchmark(["--results", str(tmp_path)]) == 0
    (row,) = read_csv(tmp_path / world_size.TABLE, world_size.Row)
    assert (row.case, row.algorithm, row.weights, row.iterations) == ("2 processes", "flow_grpo", "lora", ITERATIONS)
    assert (row.max_abs, row.relative, row.moved, row.moments) == (1e-7, 2e-8, 0.25, 3e-6)
    assert (
        "2 processes  flow_grpo     lora      1.0e-07        2.0e-08          2.5e-01  3.0e-06"
        in capsys.readouterr().out
    )


def test_the_committed_figures_are_within_the_documented_bound() -> None:
    rows = read_csv(RESULTS / world_size.TABLE, world_size.Row)
    assert len(rows) == 24
    for row in rows:
        assert row.moved > 5e-4
        assert row.relative <= (0 if row.case == "2, killed and resumed" else 1e-5)
