"""SD3.5-Medium at its real size with random weights: images and samples a second, share of the device, memory.

Type ``python -m experiments.benchmarks.sd3_speed`` on a machine with a GPU; ``--count-only`` counts operations on any.
A matrix product in the same run says what the device gives at best, and what is achieved is a share of that. The
figures go to ``sd3_speed.csv``, the longest kernels to ``sd3_speed_profile.csv``.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.sd3_cases import GUIDANCE, KL_COEF, Case, make_learner, make_rollout, transformer_sizes
from experiments.benchmarks.tables import RESULTS, text_table, write_csv
from experiments.benchmarks.timing import Measurement, figures_table, median_interval, shown
from experiments.flags import Usage, parse

if TYPE_CHECKING:
    from experiments.benchmarks.sd3_flops import Passes

TABLE, PROFILE = "sd3_speed.csv", "sd3_speed_profile.csv"
USAGE = "python -m experiments.benchmarks.sd3_speed"
_NUM_KERNELS = 20
_PIXELS_A_TOKEN = 16
_LEAST = {"image_size": _PIXELS_A_TOKEN, "batch_size": 1, "num_inference_steps": 2, "num_references": 0, "repeats": 1}
_LEAST |= {"num_layers": 1, "num_heads": 1, "guidance_scale": 0}


@dataclass(frozen=True)
class Options:
    """Time rollouts and updates of SD3.5-Medium with random weights.

    Attributes:
        device: torch's name of it.
        image_size: side of the image in pixels.
        batch_size: images drawn and learnt at once.
        num_inference_steps: of a rollout; all but the last are learnt, as Flow-GRPO does.
        guidance_scale: 1 is none, and adapters are then timed with that of the published GenEval run, 4.5, too.
        num_references: source images of an edit; 0 is text-to-image.
        repeats: of each; one more round, which warms up, is not counted.
        num_layers: fewer than SD3.5-Medium's 24, for a trial run.
        num_heads: fewer than its 24, of 64 channels each, for one on a machine without a GPU.
        compile: compile the joint blocks.
        count_only: count operations, time nothing.
        results: folder of the CSV files.
    """

    device: str = "cuda"
    image_size: int = 512
    batch_size: int = 16
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    num_references: int = 0
    repeats: int = 5
    num_layers: int = 24
    num_heads: int = 24
    compile: bool = False
    count_only: bool = False
    results: Path = RESULTS

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if self.image_size % _PIXELS_A_TOKEN:
            raise ValueError(f"image_size: expected a multiple of {_PIXELS_A_TOKEN}, got {self.image_size}")


@dataclass(frozen=True)
class Kernel:
    """Time of one kernel in a rollout and an update; a row of the CSV.

    Attributes:
        part: "rollout" or "update", and what is trained, such as "update, lora".
        name: the kernel's.
        share: of the part's device time.
        calls: how often it ran.
        machine: on which.
    """

    part: str
    name: str
    share: float
    calls: int
    machine: str


@dataclass(frozen=True)
class Bench:
    """What all cases of one run share.

    Attributes:
        passes: operations of an image at one sigma.
        best: TFLOP/s of the matrix product.
        machine: the machine.
        kernels: the cases add their longest ones.
    """

    passes: Passes
    best: float
    machine: str
    kernels: list[Kernel]


def benchmark(arguments: Sequence[str]) -> int:
    """Measure, write the CSV files, print the table."""
    options = parse(Options(), Usage(USAGE), arguments)
    import torch

    from experiments.benchmarks.sd3_flops import count_passes

    passes = count_passes(transformer_sizes(options), options.image_size, options.num_references)
    print(_counts(passes, options))
    if options.count_only:
        return 0
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU that torch sees, got none; --count-only needs none")
    machine = _machine(options.device)
    found, kernels = list[Measurement](), list[Kernel]()
    for row in measure(options, passes, machine, kernels):
        found.append(row)
        print(f"{row.quantity}: {row.case}: {shown(row)} {row.unit}", file=sys.stderr, flush=True)
    write_csv(options.results / TABLE, found)
    if kernels:
        write_csv(options.results / PROFILE, kernels)
    print(f"Machine: {machine}\n\n{figures_table(found)}")
    return 0


def measure(options: Options, passes: Passes, machine: str, kernels: list[Kernel]) -> Iterator[Measurement]:
    """The matrix product; rollouts of the base and with adapters; updates, of which some have a KL or guidance."""
    best = matrix_product(options.device, options.repeats)
    yield _row("matrix product", "bfloat16", best, "TFLOP/s", machine)
    bench = Bench(passes, float(np.median(best)), machine, kernels)
    plain, guided = options.guidance_scale, [GUIDANCE] if options.guidance_scale == 1.0 else []
    for case in (Case("none", plain), Case("lora", plain), *(Case("lora", scale) for scale in guided)):
        yield from _rollouts(options, case, bench)
    updates = [Case("lora", plain), Case("full", plain), Case("lora", plain, KL_COEF)]
    for case in (*updates, *(Case("lora", scale) for scale in guided)):
        yield from _updates(options, case, bench)


def matrix_product(device: str, repeats: int, side: int = 8192) -> NDArray[np.float64]:
    """TFLOP/s of a product of two square bfloat16 matrices, [repeats]."""
    import torch

    side = side if device.startswith("cuda") else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds = _seconds(lambda: a @ a, device, repeats, calls=10)
    return 2 * side**3 * 10 / seconds / 1e12


def _rollouts(options: Options, case: Case, bench: Bench) -> Iterator[Measurement]:
    draw = make_rollout(options, case)
    _reset_memory(options.device)
    seconds = _seconds(draw, options.device, options.repeats)
    name = f"{_case(options, case)}, {options.num_inference_steps} steps"
    name = name if case.training == "none" else f"{case.training}, {name}"
    yield _row("rollouts", name, options.batch_size / seconds, "images/s", bench.machine)
    cost = bench.passes.forward * case.num_branches * options.batch_size * options.num_inference_steps
    achieved = cost / seconds / 1e12
    yield _row("rollouts", name, achieved, "TFLOP/s", bench.machine)
    yield _row("rollouts / matrix product", name, achieved / bench.best, "ratio", bench.machine)
    yield _memory("rollouts", name, options.device, bench.machine)
    bench.kernels.extend(_profile(f"rollout, {case}", draw, options.device, bench.machine))


def _updates(options: Options, case: Case, bench: Bench) -> Iterator[Measurement]:
    learner, rollout = make_learner(options, case)
    _reset_memory(options.device)
    seconds = _seconds(lambda: learner.update([rollout]), options.device, options.repeats)
    num_steps = options.num_inference_steps - 1
    name = f"{case.training}, {_case(options, case)}, {num_steps} steps, checkpointed"
    yield _row("updates", name, options.batch_size / seconds, "samples/s", bench.machine)
    passes = bench.passes
    cost = passes.update_full if case.training == "full" else passes.update_lora
    # The reference's pass; what checkpointing computes again is not counted: the share is that of useful operations.
    cost += passes.forward if case.kl_coef else 0
    achieved = cost * case.num_branches * options.batch_size * num_steps / seconds / 1e12
    yield _row("updates", name, achieved, "TFLOP/s", bench.machine)
    yield _row("updates / matrix product", name, achieved / bench.best, "ratio", bench.machine)
    yield _memory("updates", name, options.device, bench.machine)
    bench.kernels.extend(_profile(f"update, {case}", lambda: learner.update([rollout]), options.device, bench.machine))


def _case(options: Options, case: Case) -> str:
    """The sizes; what is SD3.5-Medium's, and no guidance, KL or reference, goes without saying."""
    parts = [f"{options.image_size} px", f"batch {options.batch_size}", *case.extras]
    if options.num_references:
        parts.append(f"{options.num_references} references")
    if (options.num_layers, options.num_heads) != (Options.num_layers, Options.num_heads):
        parts.append(_model(options))
    return ", ".join(parts)


def _model(options: Options) -> str:
    return f"{options.num_layers} layers of {options.num_heads} heads"


def _seconds(call: Callable[[], object], device: str, repeats: int, calls: int = 1) -> NDArray[np.float64]:
    """Seconds of ``calls`` calls at each repeat; one more round goes first."""
    seconds = []
    for _ in range(repeats + 1):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return np.array(seconds[1:])


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _reset_memory(device: str) -> None:
    import torch

    # The case before this one is gone, but for what only refers to itself.
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def _memory(what: str, case: str, device: str, machine: str) -> Measurement:
    import torch

    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else float("nan")
    return Measurement(f"{what}, peak memory", case, peak, float("nan"), float("nan"), 1, "GiB", machine)


def _profile(part: str, call: Callable[[], object], device: str, machine: str) -> list[Kernel]:
    """The kernels that take the most of a call's time on the device."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        call()
        _synchronize(device)
    times = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e) for e in found.key_averages()]
    total = sum(seconds for seconds, _ in times)
    longest = sorted(times, key=lambda pair: -pair[0])[:_NUM_KERNELS]
    return [Kernel(part, event.key[:100], seconds / total, event.count, machine) for seconds, event in longest]


def _machine(device: str) -> str:
    import torch

    return f"{torch.cuda.get_device_name()}, {describe_machine()}" if device.startswith("cuda") else describe_machine()


def _counts(passes: Passes, options: Options) -> str:
    kind = f"{options.num_references} references" if options.num_references else "text-to-image"
    rows = [
        ["forward pass", f"{passes.forward / 1e9:.0f}"],
        ["forward and backward pass, adapters", f"{passes.update_lora / 1e9:.0f}"],
        ["forward and backward pass, all parameters", f"{passes.update_full / 1e9:.0f}"],
        ["recomputed by checkpointing", f"{passes.recomputed / 1e9:.0f}"],
    ]
    title = f"GFLOP an image at one sigma, {_model(options)}, {options.image_size} px, {kind}"
    return f"{title}\n{text_table(['', 'GFLOP'], rows)}"


def _row(what: str, case: str, values: NDArray[np.float64], unit: str, machine: str) -> Measurement:
    return Measurement(what, case, *median_interval(values), len(values), unit, machine)


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
