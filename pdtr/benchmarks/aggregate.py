"""From images' values to a benchmark's numbers: pure functions.

A prompt's value is the mean over its available images, a task's the mean over its prompts, and the whole is either the
unweighted mean of the tasks or the mean over all prompts. Where nothing failed this is the published mean over images,
for every prompt has as many. What failed is left out and counted, and never scored.

Standard errors are analytic, over prompts, because the images of a prompt are not independent: ``s / sqrt(n)`` of a
task with n prompts, ``sqrt(sum_t e_t^2) / T`` of the unweighted mean of T tasks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdtr.benchmarks.base import Benchmark, Derive, Item, Metric
    from pdtr.benchmarks.scoring import Row

NAN = math.nan
OVERALL, ALL_PROMPTS = "overall", "all prompts"
ERROR_RULE = "analytic over prompts: s / sqrt(n) of a task, sqrt(sum e^2) / T of a mean of T tasks"


@dataclass(frozen=True)
class Number:
    """A mean with its standard error.

    Attributes:
        metric: what it is a mean of.
        task: which prompts; "overall" is the benchmark's own average, "all prompts" the mean over prompts.
        value: NaN where nothing is available.
        error: standard error; NaN where it cannot be said.
        prompts: how many had an available image.
        images: how many images there are, the failed ones included.
        failed: how many of them have no value.
    """

    metric: str
    task: str
    value: float
    error: float
    prompts: int
    images: int
    failed: int


@dataclass(frozen=True)
class PromptValues:
    """One prompt's values of one metric, an image each, NaN where not available."""

    task: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over what is available; NaN where nothing is."""
        return mean_of(self.values)


def mean_of(values: Iterable[float]) -> float:
    """Mean over what is not NaN; NaN where nothing is left."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else NAN


def standard_error(values: Iterable[float]) -> float:
    """``s / sqrt(n)`` over what is not NaN, s with n - 1; NaN for fewer than two."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return NAN
    mean = math.fsum(known) / len(known)
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return math.sqrt(variance / len(known))


def number_of(metric: str, task: str, prompts: Sequence[PromptValues], scale: float = 1.0) -> Number:
    """The mean over prompts with its standard error."""
    means = [prompt.mean for prompt in prompts]
    images = [value for prompt in prompts for value in prompt.values]
    return Number(
        metric,
        task,
        scale * mean_of(means),
        scale * standard_error(means),
        sum(not math.isnan(mean) for mean in means),
        len(images),
        sum(math.isnan(value) for value in images),
    )


def mean_of_tasks(metric: str, tasks: Sequence[Number]) -> Number:
    """The unweighted mean of tasks' means; NaN where a task has none: a benchmark without a task is another one."""
    count = len(tasks)
    return Number(
        metric,
        OVERALL,
        sum(task.value for task in tasks) / count,
        math.sqrt(sum(task.error**2 for task in tasks)) / count,
        sum(task.prompts for task in tasks),
        sum(task.images for task in tasks),
        sum(task.failed for task in tasks),
    )


def prompt_values(items: Sequence[Item], rows: Sequence[Row], derive: Derive, value: str) -> dict[str, PromptValues]:
    """One value of every image, by the id of its item."""
    by_item: dict[str, list[Row]] = {item.id: [] for item in items}
    for row in rows:
        by_item[row.item].append(row)
    return {
        item.id: PromptValues(item.task, tuple(derive(item, row.values).get(value, NAN) for row in by_item[item.id]))
        for item in items
    }


def numbers(benchmark: Benchmark, rows: Sequence[Row]) -> list[Number]:
    """Every number of a benchmark: each metric's tasks, its two averages, and what else was published."""
    found = [number for metric in benchmark.metrics for number in metric_numbers(benchmark, metric, rows)]
    return [*found, *benchmark.more(benchmark.items, rows)]


def metric_numbers(benchmark: Benchmark, metric: Metric, rows: Sequence[Row]) -> list[Number]:
    """One metric: each task in order of appearance, then the averages."""
    values = prompt_values(benchmark.items, rows, benchmark.derive, metric.value)
    return averages(metric, list(values.values()), benchmark.average == "tasks")


def averages(metric: Metric, prompts: Sequence[PromptValues], of_tasks: bool) -> list[Number]:
    """Each task's number, then the overall one, then, where that is a mean of tasks, the mean over all prompts."""
    names = list(dict.fromkeys(prompt.task for prompt in prompts))
    tasks = [
        number_of(metric.name, name, [prompt for prompt in prompts if prompt.task == name], metric.scale)
        for name in names
    ]
    everything = number_of(metric.name, ALL_PROMPTS if of_tasks else OVERALL, prompts, metric.scale)
    shown = tasks if len(names) > 1 else []
    return [*shown, mean_of_tasks(metric.name, tasks), everything] if of_tasks else [*shown, everything]


def reasons(rows: Sequence[Row], most: int = 5) -> dict[str, int]:
    """The commonest reasons for what is missing, with how many images have each."""
    return dict(Counter(row.reason for row in rows if row.reason).most_common(most))
