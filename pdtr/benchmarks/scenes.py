"""The embedded world's held-out suites as benchmarks: a run's final evaluation of a task, image for image."""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING

from pdtr.benchmarks.base import Benchmark, Item, Metric, Scorer, digest_of
from pdtr.benchmarks.layouts import OneEach
from pdtr.benchmarks.pictures import Picture, pixels_digest

if TYPE_CHECKING:
    from pdtr.tasks import Task
    from rewards.base import Images

NUM_PROMPTS = 600
"""Prompts a task, where nothing else is asked for."""
SUCCESS = "strict"
_TITLES = {"t2i": "text-to-image", "edit": "editing"}


def scenes_benchmark(task: Task, is_suite: bool = True) -> Benchmark:
    """A task's held-out prompts: ``strict`` is the share of successes, ``reward`` the mean of the dense reward.

    Tasks are the skills; the number is the mean over prompts. Prompts need not have ids of their own.

    Args:
        task: of the embedded world; its ``final`` prompts are asked.
        is_suite: they are the suite's, and not another file's.
    """
    prompts = task.final
    named = Counter(prompt.id for prompt in prompts)
    items = [
        Item(
            index,
            prompt.id if prompt.id and named[prompt.id] == 1 else f"{index:05d}",
            prompt.text,
            str(prompt.metadata.get("tag", "")) or "-",
            prompt.metadata,
            tuple(_picture(f"{prompt.id}, source", image) for image in prompt.source_images),
        )
        for index, prompt in enumerate(prompts)
    ]
    whole = () if len(prompts) == NUM_PROMPTS else (f"{len(prompts)} prompts, the suite has {NUM_PROMPTS}",)
    return Benchmark(
        name=f"scenes-{task.name}",
        title=f"held-out {_TITLES[task.name]} of the embedded world",
        items=tuple(items),
        samples=1,
        layout=OneEach("{index:05d}.png"),
        metrics=(Metric(SUCCESS, task.success), Metric("reward", "total")),
        average="prompts",
        digest=digest_of([[prompt.text, *map(pixels_digest, prompt.source_images)] for prompt in prompts]),
        deviations=whole if is_suite else ("prompts of a file in place of the suite's",),
    )


def scenes_scorer(task: Task) -> Scorer:
    """The task's reward, which is the embedded world's ground truth."""
    from rewards.base import reward_name

    reward = task.held_out_reward or task.reward
    return Scorer(reward, {"ground truth": reward_name(reward)})


def final_noise(seed: int, index: int, sample: int) -> int:
    """The seed of the noise that a run's final evaluation gives the prompt of that index, for its evaluation seed."""
    from agents.samplers import derive_seed

    return derive_seed(derive_seed(seed, "final"), "sample", index, sample)


def _picture(name: str, image: Images) -> Picture:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return Picture(name, buffer.getvalue())
