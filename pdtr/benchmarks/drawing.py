"""Draw a benchmark's images once and keep them: what is there with the same settings is not drawn again.

Sample s of the item with the index i has the noise of (seed, i, s), whatever it is drawn with and however often the
drawing was stopped. ``settings.json`` (:mod:`pdtr.benchmarks.settings`) lies beside the images' folder and has to
agree.

Several processes share the batches of one: each batch is drawn whole by one of them, so that the images are the same to
the bit for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from agents.processes import ALONE, Processes
from pdtr.benchmarks.settings import IMAGES, DrawingSettings, claim, folder_sha256, shown_settings

if TYPE_CHECKING:
    from agents.policies.backbone import BackboneSettings
    from agents.policies.base import FlowPolicy
    from agents.samplers import Sampler
    from pdtr.benchmarks.base import Benchmark, Item
    from rewards.base import Images, Prompt

# Prompts prepared at a time, so that large text encoders visit the device once for all of them.
_WINDOW = 64

Missing = tuple["Item", list[int]]
Batch = list[Missing]
Size = tuple[int, int]


def benchmark_noise(seed: int, index: int, sample: int) -> int:
    """The seed of a sample's noise, from that of the drawing, the index of its item and its own number."""
    from agents.samplers import derive_seed

    return derive_seed(seed, "benchmark", index, sample)


@dataclass(frozen=True)
class Plan:
    """How drawing goes on.

    Attributes:
        seed: of the noise.
        chunk_size: most images drawn at once; it changes no image but in the last bits.
        on_images: told (drawn, to be drawn) after every item, of those that this process draws.
        keep_shape: edit at each source's proportions, for published models.
        noise: each sample's seed.
    """

    seed: int = 0
    chunk_size: int = 16
    on_images: Callable[[int, int], None] = lambda done, total: None
    keep_shape: bool = False
    noise: Callable[[int, int, int], int] = benchmark_noise


@dataclass(frozen=True)
class Artist:
    """A policy and how it draws.

    Attributes:
        folder: that the policy was loaded from.
        policy: with the weights to draw with in use.
        sampler: how.
        model: settings of a published model; None for others.
        device: torch's name of where it draws.
        processes: those that share the drawing, each with an artist of its own.
    """

    folder: Path
    policy: FlowPolicy
    sampler: Sampler
    model: BackboneSettings | None = None
    device: str = "cpu"
    processes: Processes = ALONE

    def settings(self, benchmark: Benchmark, plan: Plan) -> DrawingSettings:
        """What its images of a benchmark will follow from."""
        return DrawingSettings(
            benchmark=benchmark.name,
            prompts=benchmark.digest,
            samples=benchmark.samples,
            policy=str(self.folder),
            policy_sha256=folder_sha256(self.folder),
            sampler=type(self.sampler).__name__,
            num_inference_steps=self.sampler.num_inference_steps,
            guidance_scale=self.sampler.guidance_scale,
            shift=self.sampler.shift,
            image_size=self.policy.image_size,
            seed=plan.seed,
            model=shown_settings(self.model),
            keep_shape=plan.keep_shape,
        )

    def draw(self, benchmark: Benchmark, output: Path, plan: Plan) -> None:
        """Draw what is missing below ``output``, beside the settings; all processes do, and return when all have.

        Raises:
            ValueError: images of other settings lie there, or the policy cannot draw as planned.
        """
        _check_shapes(self.policy, plan)
        self.processes.agree(lambda: claim(output, self.settings(benchmark, plan)))
        self.policy.to(self.device)
        draw(self.policy, benchmark, output / IMAGES, self.sampler, plan, self.processes)
        self.processes.wait()


def draw(
    policy: FlowPolicy,
    benchmark: Benchmark,
    root: Path,
    sampler: Sampler,
    plan: Plan,
    processes: Processes = ALONE,
) -> int:
    """Draw what is missing, or this process's share of it; -> how many images that was.

    Args:
        policy: with the weights to draw with in use.
        benchmark: whose items.
        root: folder of the images.
        sampler: how.
        plan: seed, chunks, shapes, and who is told.
        processes: those that draw, each its share. All call this; the first one looks what is missing.

    Raises:
        ValueError: shapes are to be kept, and the policy has one size only.
    """
    import torch

    _check_shapes(policy, plan)
    # Told to all: while one looks, another may have begun to draw.
    lacks = processes.agree(
        lambda: [benchmark.layout.missing(root, item, benchmark.samples) for item in benchmark.items]
    )
    missing = [(item, samples) for item, samples in zip(benchmark.items, lacks, strict=True) if samples]
    own_size, done = policy.image_size, 0
    share = list(_batches_by_size(missing, own_size, plan))[processes.rank :: processes.count]
    total = sum(len(samples) for _, batch in share for _, samples in batch)
    try:
        for size, window in _windows(share):
            _resize(policy, size)
            with torch.no_grad():
                for item, images in _draw_window(policy, window, sampler, plan):
                    benchmark.layout.write(root, item, images)
                    done += len(images)
                    plan.on_images(done, total)
    finally:
        _resize(policy, own_size)
    return total


def _draw_window(
    policy: FlowPolicy, window: Sequence[Batch], sampler: Sampler, plan: Plan
) -> Iterator[tuple[Item, dict[int, Images]]]:
    """Items with their missing images, by sample."""
    prompts = {item.index: item.asked(policy.image_size) for batch in window for item, _ in batch}
    policy.prepare(list(prompts.values()))
    for batch in window:
        asked = [(prompts[item.index], item.index, sample) for item, samples in batch for sample in samples]
        images = _draw_batch(policy, asked, sampler, plan)
        for item, samples in batch:
            yield item, dict(zip(samples, images[: len(samples)], strict=True))
            images = images[len(samples) :]


def _batches_by_size(missing: Sequence[Missing], own_size: Size, plan: Plan) -> Iterator[tuple[Size, Batch]]:
    """What is drawn at once, with the size that it is drawn at."""
    by_size: dict[Size, list[Missing]] = {}
    for item, samples in missing:
        size = _kept_size(item, own_size) if plan.keep_shape else own_size
        by_size.setdefault(size, []).append((item, samples))
    for size, alike in by_size.items():
        for batch in batches(alike, plan.chunk_size):
            yield size, batch


def _windows(share: Sequence[tuple[Size, Batch]]) -> Iterator[tuple[Size, list[Batch]]]:
    """Batches of one size that are prepared together, with that size."""
    for size, alike in groupby(share, key=lambda entry: entry[0]):
        window: list[Batch] = []
        for _, batch in alike:
            if window and sum(map(len, window)) + len(batch) > _WINDOW:
                yield size, window
                window = []
            window.append(batch)
        yield size, window


def _kept_size(item: Item, own_size: Size) -> Size:
    """The size to edit an item at: its source's proportions, the longer side as long as the policy's."""
    from agents.policies.unipic2 import edit_size

    return edit_size(item.sources[0].size(), max(own_size)) if item.sources else own_size


def _check_shapes(policy: FlowPolicy, plan: Plan) -> None:
    from agents.policies.backbone import BackbonePolicy

    if plan.keep_shape and not isinstance(policy, BackbonePolicy):
        height, width = policy.image_size
        raise ValueError(
            f"keep_shape: expected a published model, got {type(policy).__name__}, which draws at {width}x{height} "
            "only; leave the flag out"
        )


def _resize(policy: FlowPolicy, size: Size) -> None:
    from agents.policies.backbone import BackbonePolicy

    if size != policy.image_size:
        assert isinstance(policy, BackbonePolicy)
        policy.resize(*size)


def batches(missing: Sequence[Missing], chunk_size: int) -> Iterator[Batch]:
    """Items whole, as many as fit ``chunk_size`` samples; one of more samples than that is a batch of its own."""
    batch: Batch = []
    for item, samples in missing:
        if batch and sum(len(others) for _, others in batch) + len(samples) > chunk_size:
            yield batch
            batch = []
        batch.append((item, samples))
    if batch:
        yield batch


def _draw_batch(
    policy: FlowPolicy, asked: Sequence[tuple[Prompt, int, int]], sampler: Sampler, plan: Plan
) -> list[Images]:
    from agents.rollout import Ask, denoise, encode_asks

    steps = _stochastic_steps(sampler, plan.seed)
    images: list[Images] = []
    for start in range(0, len(asked), plan.chunk_size):
        chunk = asked[start : start + plan.chunk_size]
        condition = encode_asks(policy, [Ask(prompt.text, prompt.source_images) for prompt, _, _ in chunk])
        seeds = [plan.noise(plan.seed, index, sample) for _, index, sample in chunk]
        trajectory = denoise(policy, condition, sampler, steps, seeds)
        images += list(policy.decode(trajectory.x_0).cpu().numpy())
    return images


def _stochastic_steps(sampler: Sampler, seed: int) -> Sequence[int]:
    import torch

    from agents.samplers import derive_seed

    return sampler.stochastic_steps(torch.Generator().manual_seed(derive_seed(seed, "window")))
