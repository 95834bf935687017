"""The library against the straightforward loop: both do the same work, and the table says what it should."""

from __future__ import annotations

import contextlib
import io
import math
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.algorithms.flow_grpo import FlowGRPO
from agents.learner import Learner, LearnerSettings
from agents.policies.tiny.sd3 import make_tiny_sd3
from agents.policies.weights import LoraSettings, LoraWeights
from agents.rollout import Ask, denoise
from agents.types import Trajectory
from experiments.benchmarks import backbone_savings
from experiments.benchmarks.backbone_savings import TEXTS, Bench, Options, benchmark, memory_command
from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import maxrss_mib
from experiments.benchmarks.plain_loop import draw
from experiments.benchmarks.tables import read_csv
from experiments.benchmarks.timing import Measurement
from experiments.flags import Usage, parse

TINY = Options(repeats=2, group_size=1, image_size=16, num_inference_steps=3, num_threads=1)
FLAGS = ["--repeats", "2", "--group-size", "1", "--image-size", "16", "--num-inference-steps", "3"]
FLAGS += ["--num-threads", "1"]
SAVINGS = (
    "a prompt's embedding shared by its group",
    "two of the steps stochastic (window), updates",
    "all steps replayed in one forward pass, updates",
    "old log-probabilities kept from the rollout, updates",
    "reference by a disabled adapter, weights held",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(params=[4.5, 1.0])
def bench(folder: Path, request: pytest.FixtureRequest) -> Bench:
    return Bench(replace(TINY, guidance_scale=request.param), folder)


def test_both_draw_the_same_images_from_the_same_noise(bench: Bench) -> None:
    policy, pipeline, size = bench.policy(), bench.pipeline(), (bench.options.image_size,) * 2
    steps = bench.sampler.stochastic_steps(torch.Generator())
    for seed, text in enumerate(TEXTS[:2]):
        # One generator draws all noise of one sample, in the same order in both.
        plain = draw(pipeline, [text], bench.sampler, size, seed)
        with torch.no_grad():
            ours = denoise(policy, policy.encode([Ask(text)]), bench.sampler, steps, [seed])
        assert plain.latents.shape == (2, 1, 16, 2, 2)
        torch.testing.assert_close(plain.latents.transpose(0, 1), ours.latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain.next_latents.transpose(0, 1), ours.next_latents, rtol=1e-4, atol=1e-4)
        image = policy.decode(ours.x_0)
        assert image.float().std() > 5
        assert (image.int() - torch.from_numpy(plain.images).int()).abs().max() <= 1


def test_both_learn_the_same_from_the_same_samples(bench: Bench) -> None:
    """With adapters that are not zero, so that the reference is another distribution than the policy."""
    policy, pipeline = bench.policy(), bench.pipeline()
    samples = bench.plain_samples(pipeline)
    plain, weights = bench.plain_update(pipeline), LoraWeights(policy, LoraSettings(), ("reference",))
    ours = weights.parameters()
    theirs = [p for name, p in pipeline.transformer.named_parameters() if "lora_" in name]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for our, their in zip(ours, theirs, strict=True):
            their.copy_(our.normal_(std=0.1, generator=generator))
    before = [our.detach().clone() for our in ours]
    rollout = bench.rollout(policy)
    (drawn,) = rollout.trajectories
    assert isinstance(drawn, Trajectory)
    samples = replace(samples, latents=drawn.latents.transpose(0, 1), next_latents=drawn.next_latents.transpose(0, 1))
    settings = LearnerSettings(num_minibatches=1, ema_decay=0)
    algorithm = FlowGRPO(bench.sampler, kl_coef=plain.kl_coef)
    metrics = Learner(policy, weights, algorithm, torch.optim.SGD(ours, lr=1.0), settings).update([rollout])
    plain.optimizer = torch.optim.SGD(theirs, lr=1.0)
    plain(samples, bench.advantages)
    assert metrics["kl_loss"] > 0
    # The last block's text is not used any more, so that some adapters learn nothing.
    assert sum(not our.equal(old) for our, old in zip(ours, before, strict=True)) > len(ours) / 2
    for our, their, old in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(their - old, our - old, rtol=1e-2, atol=1e-5)


def test_without_guidance_there_is_one_branch(folder: Path) -> None:
    for scale, branches in ((1.0, 1), (4.5, 2)):
        bench = Bench(replace(TINY, guidance_scale=scale), folder)
        states, pooled = bench.plain_samples(bench.pipeline()).embeds
        assert len(states) == len(pooled) == branches * len(TEXTS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Measurement]:
    """What is written; memory is measured by the same command, but here: its imports take longer than it does."""

    def measured_here(options: Options, loop: str) -> float:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert benchmark(memory_command(options, loop)[3:]) == 0
        return float(said.getvalue())

    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backbone_savings, "_asked_memory", measured_here)
        assert run_benchmark(benchmark, [*FLAGS, "--results", str(results)]) == 0
    return read_csv(results / backbone_savings.TABLE, Measurement)


def test_every_figure_has_its_row(rows: list[Measurement]) -> None:
    expected = [
        (what, case, unit)
        for what, rate in (("rollouts", "images/s"), ("updates", "samples/s"))
        for case, unit in (("library", rate), ("plain", rate), ("library / plain", "ratio"))
    ]
    expected += [("peak memory of the process", loop, "MiB") for loop in ("library", "plain")]
    expected += [("saving alone", saving, "ratio") for saving in SAVINGS]
    assert [(row.quantity, row.case, row.unit) for row in rows] == expected
    assert len({row.machine for row in rows}) == 1
    assert rows[0].machine.endswith(", 1 torch threads")
    for row in rows:
        assert row.value > 0
        if row.unit == "MiB":
            assert math.isnan(row.low)
        else:
            assert row.low <= row.value <= row.high
        # The weights are counted once, the memory measured once.
        assert row.n == (1 if row.unit == "MiB" or row.case == SAVINGS[-1] else TINY.repeats)


def test_ratios_are_of_the_library_over_the_loop_at_each_repeat(rows: list[Measurement]) -> None:
    found = {(row.quantity, row.case): row for row in rows}
    for what in ("rollouts", "updates"):
        # With two repeats an interval is from the one to the other.
        ours, theirs, ratio = (found[what, case] for case in ("library", "plain", "library / plain"))
        together = sorted((ours.low / theirs.low, ours.high / theirs.high))
        crossed = sorted((ours.low / theirs.high, ours.high / theirs.low))
        assert [ratio.low, ratio.high] in (pytest.approx(together, rel=1e-4), pytest.approx(crossed, rel=1e-4))


def test_the_reference_is_worth_a_transformer_less_an_adapter(rows: list[Measurement], folder: Path) -> None:
    bench = Bench(TINY, folder)
    pipeline = bench.pipeline()
    base = sum(p.numel() for p in pipeline.transformer.parameters())
    learnt = bench.plain_update(pipeline).optimizer.param_groups[0]["params"]
    adapter = sum(p.numel() for p in learnt)
    assert 0 < adapter < base
    assert rows[-1].value == pytest.approx((2 * base + adapter) / (base + 2 * adapter), rel=1e-5)


def test_a_process_of_its_own_is_asked_for_the_same_sizes() -> None:
    options = Options(3, 2, 32, 5, 2.5, 1, results=Path("elsewhere"))
    command = memory_command(options, "plain")
    assert command[:3] == [sys.executable, "-m", backbone_savings.MODULE]
    asked = parse(Options(), Usage("x"), command[3:])
    assert asked.memory_of == "plain"
    assert replace(asked, repeats=3, memory_of="", results=options.results) == options


def test_a_process_s_peak_is_its_own_and_not_its_parent_s() -> None:
    held = bytearray(b"\1") * (300 << 20)
    assert maxrss_mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) > 300
    program = "from experiments.benchmarks.machine import own_peak_mib; print(own_peak_mib())"
    peak = float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    assert 5 < peak < 100
    grown = f"block = bytearray(b'1') * (150 << 20); {program}"
    more = float(subprocess.run([sys.executable, "-c", grown], check=True, capture_output=True, text=True).stdout)
    assert more == pytest.approx(peak + 150, abs=20)
    del held


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--repeats", "0"], "repeats, group_size and num_threads: expected 1 or more, got 0, 1 and 1"),
        (["--num-inference-steps", "2"], "expected 3 or more and 1 or more, got 2 and 4.5"),
        (["--guidance-scale", "0"], "expected 3 or more and 1 or more, got 3 and 0.0"),
        (["--image-size", "20"], "got 20"),
        (["--memory-of", "both"], "both"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark(benchmark, [*FLAGS, *flags, "--results", str(tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert len(lines) == 1
    assert list(tmp_path.iterdir()) == []
