"""The timing of SD3 at a size that a CPU has time for: rows, what they must add up to, and mistakes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from agents.policies.sd3 import sd35_medium_config
from experiments.benchmarks import sd3_speed
from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.sd3_cases import Case, make_learner
from experiments.benchmarks.sd3_flops import count_passes
from experiments.benchmarks.sd3_speed import Kernel
from experiments.benchmarks.tables import read_csv
from experiments.benchmarks.timing import Measurement

TINY = ["--device", "cpu", "--num-layers", "1", "--num-heads", "1", "--image-size", "16"]
BATCH, STEPS, REPEATS = 2, 3, 2
SIZES, MODEL = "16 px, batch 2, guidance 4.5", "1 references, 1 layers of 1 heads"
CASES = {
    "rollout, none": f"{SIZES}, {MODEL}, 3 steps",
    "rollout, lora": f"lora, {SIZES}, {MODEL}, 3 steps",
    "update, lora": f"lora, {SIZES}, {MODEL}, 2 steps, checkpointed",
    "update, full": f"full, {SIZES}, {MODEL}, 2 steps, checkpointed",
    "update, lora, KL": f"lora, {SIZES}, KL 0.04, {MODEL}, 2 steps, checkpointed",
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both CSV files, of a run with guidance and a reference."""
    folder = tmp_path_factory.mktemp("speed")
    sizes = ["--batch-size", str(BATCH), "--num-inference-steps", str(STEPS), "--repeats", str(REPEATS)]
    asked = ["--guidance-scale", "4.5", "--num-references", "1", "--results", str(folder)]
    assert run_benchmark(sd3_speed.benchmark, [*TINY, *sizes, *asked]) == 0
    return folder


def test_rollouts_and_updates_have_a_speed_a_share_and_a_memory(measured: Path) -> None:
    rows = read_csv(measured / sd3_speed.TABLE, Measurement)
    expected = [("matrix product", "bfloat16", "TFLOP/s")]
    for name, case in CASES.items():
        what, rate = ("rollouts", "images/s") if name.startswith("rollout") else ("updates", "samples/s")
        expected += [(what, case, rate), (what, case, "TFLOP/s"), (f"{what} / matrix product", case, "ratio")]
        expected += [(f"{what}, peak memory", case, "GiB")]
    assert [(row.quantity, row.case, row.unit) for row in rows] == expected
    assert len({row.machine for row in rows}) == 1
    for row in rows:
        if row.unit == "GiB":
            # Only a GPU's allocator is asked.
            assert math.isnan(row.value)
        else:
            assert 0 < row.low <= row.value <= row.high
            assert row.n == REPEATS


def test_operations_a_second_are_those_counted_by_images_a_second(measured: Path) -> None:
    """Two branches of guidance at each step; of an update only the stochastic steps, all but the last."""
    rows = read_csv(measured / sd3_speed.TABLE, Measurement)
    best = rows[0].value
    found = {(row.case, row.unit): row.value for row in rows[1:]}
    one = {"num_layers": 1, "dual_attention_layers": (0,), "num_attention_heads": 1, "caption_projection_dim": 64}
    passes = count_passes({**sd35_medium_config(), **one}, 16, 1)
    costs = {"rollout, none": passes.forward * STEPS, "rollout, lora": passes.forward * STEPS}
    costs |= {"update, lora": passes.update_lora * 2, "update, full": passes.update_full * 2}
    # The reference is one more forward pass.
    costs["update, lora, KL"] = (passes.update_lora + passes.forward) * 2
    assert costs.keys() == CASES.keys()
    for name, cost in costs.items():
        rate = found[CASES[name], "images/s" if name.startswith("rollout") else "samples/s"]
        # Medians of two repeats are means, so that the factor between the two units is exact.
        assert found[CASES[name], "TFLOP/s"] == pytest.approx(rate * 2 * cost / 1e12, rel=1e-4)
        assert found[CASES[name], "ratio"] == pytest.approx(found[CASES[name], "TFLOP/s"] / best, rel=1e-4)


def test_the_longest_kernels_of_each_part_are_kept(measured: Path) -> None:
    kernels = read_csv(measured / sd3_speed.PROFILE, Kernel)
    updates = ("update, lora, guidance 4.5", "update, full, guidance 4.5", "update, lora, guidance 4.5, KL 0.04")
    names = ("rollout, none, guidance 4.5", "rollout, lora, guidance 4.5", *updates)
    parts = {part: [k for k in kernels if k.part == part] for part in names}
    assert sum(map(len, parts.values())) == len(kernels)
    for found in parts.values():
        shares = [kernel.share for kernel in found]
        assert 0 < len(found) <= 20
        assert shares == sorted(shares, reverse=True)
        # Not the whole time: the shortest are left out.
        assert 0.5 < sum(shares) <= 1
        assert all(kernel.calls >= 1 for kernel in found)


def test_guidance_is_timed_beside_a_run_without_it(tmp_path: Path) -> None:
    sizes = ["--batch-size", "1", "--num-inference-steps", "2", "--repeats", "1"]
    assert run_benchmark(sd3_speed.benchmark, [*TINY, *sizes, "--results", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / sd3_speed.TABLE, Measurement)
    guided = [row.case for row in rows if row.unit == "ratio" and "guidance 4.5" in row.case]
    name = "16 px, batch 1, guidance 4.5, 1 layers of 1 heads"
    assert guided == [f"lora, {name}, 2 steps", f"lora, {name}, 1 steps, checkpointed"]


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
def test_what_learns_is_what_the_trainer_has(kl_coef: float) -> None:
    """The reference only where it is used; the optimiser's settings, which on a GPU are others than on a CPU."""
    options = sd3_speed.Options(device="cpu", image_size=16, batch_size=2, num_layers=1, num_heads=1)
    learner, rollout = make_learner(options, Case("lora", 1.0, kl_coef))
    expected = {"current", "reference"} if kl_coef else {"current"}
    assert {name.split(".")[0] for name in learner.weights.state()} == expected
    assert not learner.optimizer.param_groups[0]["fused"]
    assert ("kl_loss" in learner.update([rollout])) == (kl_coef > 0)


def test_counting_alone_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark(sd3_speed.benchmark, [*TINY, "--count-only", "--results", str(tmp_path)]) == 0
    assert "1 layers of 1 heads, 16 px, text-to-image" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--repeats", "0"], "repeats: expected 1 or more, got 0"),
        (["--num-inference-steps", "1"], "num_inference_steps: expected 2 or more, got 1"),
        (["--image-size", "40"], "image_size: expected a multiple of 16, got 40"),
        (["--num-layer", "1"], "num-layers"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark(sd3_speed.benchmark, [*TINY, *flags, "--results", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_way_out_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark(sd3_speed.benchmark, [*TINY, "--device", "cuda"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "device: expected a GPU that torch sees, got none; --count-only needs none"
