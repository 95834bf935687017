"""The library against the straightforward loop on the same tiny SD3 weights, and what each saving is worth alone.

Type ``python -m experiments.benchmarks.backbone_savings``. Both loops draw and learn the same number of samples in the
same process, in turn; figures are ratios within a repeat. They go to ``backbone_savings.csv``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import describe_machine, own_peak_mib
from experiments.benchmarks.tables import RESULTS, write_csv
from experiments.benchmarks.timing import Measurement, figures_table, interleaved, median_interval
from experiments.flags import Usage, parse

if TYPE_CHECKING:
    from agents.policies.sd3 import SD3Policy
    from agents.samplers import FlowSDE
    from agents.types import Rollout
    from experiments.benchmarks.plain_loop import PlainSamples, PlainUpdate

TABLE = "backbone_savings.csv"
MODULE = "experiments.benchmarks.backbone_savings"
TEXTS = ("a red circle", "two blue squares", "a green star", "a cat on a mat")
Loop = Literal["", "library", "plain"]


@dataclass(frozen=True)
class Options:
    """Time the library and the straightforward loop on tiny SD3 weights.

    Attributes:
        repeats: of each; one more round, which warms up, is not counted.
        group_size: samples a prompt, of four prompts.
        image_size: side in pixels.
        num_inference_steps: of a rollout, 3 or more: two are stochastic in a window, and the last never is.
        guidance_scale: in rollouts and updates; 1 is none.
        num_threads: torch threads.
        memory_of: run one loop once and print this process's peak memory; asked of processes of their own.
        results: folder of the CSV file.
    """

    repeats: int = 15
    group_size: int = 8
    image_size: int = 64
    num_inference_steps: int = 10
    guidance_scale: float = 4.5
    num_threads: int = 2
    memory_of: Loop = ""
    results: Path = RESULTS

    def __post_init__(self) -> None:
        if min(self.repeats, self.group_size, self.num_threads) < 1:
            raise ValueError(
                "repeats, group_size and num_threads: expected 1 or more, got "
                f"{self.repeats}, {self.group_size} and {self.num_threads}"
            )
        if self.num_inference_steps < 3 or not self.guidance_scale >= 1:
            raise ValueError(
                "num_inference_steps and guidance_scale: expected 3 or more and 1 or more, got "
                f"{self.num_inference_steps} and {self.guidance_scale}"
            )


class Bench:
    """Both loops on weights of one folder."""

    def __init__(self, options: Options, folder: Path) -> None:
        import torch

        from agents.policies.backbone import BackboneSettings
        from agents.samplers import FlowSDE

        self.options, self.folder = options, folder
        size = options.image_size
        self.settings = BackboneSettings(size, size, "float32", offload_encoders=False, slice_vae=False)
        self.sampler = FlowSDE(options.num_inference_steps, options.guidance_scale, shift=None)
        self.texts = [text for text in TEXTS for _ in range(options.group_size)]
        self.advantages = torch.linspace(-1, 1, len(self.texts))

    def policy(self) -> SD3Policy:
        """A fresh policy of the library; nothing is kept between calls of a rollout but what a run keeps."""
        from agents.policies.sd3 import SD3Policy

        return SD3Policy.load(self.folder, self.settings)

    def pipeline(self) -> Any:
        """A fresh pipeline of diffusers."""
        from diffusers import StableDiffusion3Pipeline

        library: Any = StableDiffusion3Pipeline
        pipeline = library.from_pretrained(str(self.folder))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def plain_samples(self, pipeline: Any, seed: int = 0) -> PlainSamples:
        """A rollout of the straightforward loop."""
        from experiments.benchmarks.plain_loop import draw

        return draw(pipeline, self.texts, self.sampler, (self.options.image_size,) * 2, seed)

    def plain_update(self, pipeline: Any) -> PlainUpdate:
        """Its update, of a LoRA adapter of the library's shape."""
        import torch
        from peft import LoraConfig

        from agents.policies.sd3 import SD3Policy
        from agents.policies.weights import LoraSettings
        from experiments.benchmarks.plain_loop import PlainUpdate

        pipeline.transformer.requires_grad_(False)
        lora = LoraSettings()
        targets = list(lora.target_modules or SD3Policy.lora_targets)
        pipeline.transformer.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
        learnt = [p for p in pipeline.transformer.parameters() if p.requires_grad]
        return PlainUpdate(pipeline, self.sampler, torch.optim.AdamW(learnt, lr=1e-4), kl_coef=0.04)

    def rollout(self, policy: SD3Policy, sampler: FlowSDE | None = None) -> Rollout:
        """A rollout of the library, through the environment, with a reward that costs nothing."""
        import gymnasium

        import envs  # noqa: F401  (registers the environments)
        from agents.rollout import Draw, collect
        from envs.prompts import FixedPool
        from experiments.benchmarks.collect_timing import zero_reward
        from rewards.base import Prompt

        prompts = [Prompt(text) for text in TEXTS]
        kwargs: dict[str, Any] = {
            "reward": zero_reward,
            "prompts": FixedPool(prompts),
            "image_size": policy.image_size,
        }
        mode, count = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT, len(self.texts)
        env = gymnasium.make_vec("pdtr/TextToImage-v0", num_envs=count, vectorization_mode=mode, **kwargs)
        found = collect(policy, [env], prompts, Draw(self.options.group_size, 0), sampler or self.sampler)
        return found.with_advantages(self.advantages)

    def update(self, policy: SD3Policy, rollout: Rollout, **changes: Any) -> Callable[[], object]:
        """The library's update of the rollout; ``changes`` are of ``FlowGRPO``."""
        import torch

        from agents.algorithms.flow_grpo import FlowGRPO
        from agents.learner import Learner, LearnerSettings
        from agents.policies.weights import LoraSettings, LoraWeights

        weights = LoraWeights(policy, LoraSettings(), ("reference",))
        algorithm = FlowGRPO(**{"rollout_sampler": self.sampler, "kl_coef": 0.04, **changes})
        optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-4)
        settings = LearnerSettings(num_minibatches=1, ema_decay=0)
        learner = Learner(policy, weights, algorithm, optimizer, settings)
        return lambda: learner.update([rollout])


def benchmark(arguments: Sequence[str]) -> int:
    """Measure, write the CSV file, print the table."""
    options = parse(Options(), Usage(f"python -m {MODULE}"), arguments)
    import torch

    from agents.policies.tiny.sd3 import make_tiny_sd3

    torch.set_num_threads(options.num_threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, make_tiny_sd3(Path(folder)))
        if options.memory_of:
            print(_peak_memory(bench, options.memory_of))
            return 0
        machine = f"{describe_machine()}, {options.num_threads} torch threads"
        found = [replace(row, machine=machine) for row in measure(bench)]
    write_csv(options.results / TABLE, found)
    title = "Medians with 95 % bootstrap intervals over repeats; a ratio above 1 is what the library saves"
    print(f"Machine: {machine}\n\n{title}\n{figures_table(found)}")
    return 0


def measure(bench: Bench) -> Iterator[Measurement]:
    """Rollouts, updates and memory of both loops, then each saving alone."""
    from experiments.benchmarks.saving_cases import savings

    policy, pipeline = bench.policy(), bench.pipeline()
    repeats, count = bench.options.repeats, len(bench.texts)
    drawn = interleaved(
        {"library": lambda: bench.rollout(policy), "plain": lambda: bench.plain_samples(pipeline)}, repeats
    )
    yield from _compared("rollouts", "images/s", count, drawn)
    samples, update = bench.plain_samples(pipeline), bench.plain_update(pipeline)
    learn = bench.update(policy, bench.rollout(policy))
    learnt = interleaved({"library": learn, "plain": lambda: update(samples, bench.advantages)}, repeats)
    yield from _compared("updates", "samples/s", count, learnt)
    for loop in ("library", "plain"):
        peak = _asked_memory(bench.options, loop)
        yield Measurement("peak memory of the process", loop, peak, float("nan"), float("nan"), 1, "MiB", "")
    for what, ratios in savings(bench).items():
        yield row("saving alone", what, ratios, "ratio")


def row(what: str, case: str, values: NDArray[np.float64], unit: str) -> Measurement:
    """The median of the repeats with its interval; the machine is filled in later."""
    return Measurement(what, case, *median_interval(values), len(values), unit, "")


def _compared(what: str, unit: str, count: int, seconds: dict[str, NDArray[np.float64]]) -> Iterator[Measurement]:
    for loop, values in seconds.items():
        yield row(what, loop, count / values, unit)
    yield row(what, "library / plain", seconds["plain"] / seconds["library"], "ratio")


def _peak_memory(bench: Bench, loop: Loop) -> float:
    """One rollout and one update of one loop; this process's peak in MiB."""
    if loop == "library":
        policy = bench.policy()
        bench.update(policy, bench.rollout(policy))()
    else:
        pipeline = bench.pipeline()
        samples = bench.plain_samples(pipeline)
        bench.plain_update(pipeline)(samples, bench.advantages)
    return own_peak_mib()


def memory_command(options: Options, loop: str) -> list[str]:
    """What has a process of its own measure its memory with these sizes."""
    shared = ("group_size", "image_size", "num_inference_steps", "guidance_scale", "num_threads")
    flags = [part for name in shared for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    return [sys.executable, "-m", MODULE, "--memory-of", loop, *flags]


def _asked_memory(options: Options, loop: str) -> float:
    done = subprocess.run(memory_command(options, loop), check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
