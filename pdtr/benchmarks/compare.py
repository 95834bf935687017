"""Two evaluations of one benchmark, prompt by prompt: which is better, and could it be chance?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdtr.benchmarks.aggregate import OVERALL
from pdtr.benchmarks.results import NOT_COMPARABLE, Results, write_json
from pdtr.benchmarks.settings import describe
from pdtr.paired import PairedTest, paired_test


@dataclass(frozen=True)
class Difference:
    """How much the second evaluation is above the first.

    Attributes:
        metric: of what.
        task: of which prompts; "overall" is the benchmark's own average.
        test: difference, interval and p-value, on the numbers' scale.
    """

    metric: str
    task: str
    test: PairedTest


def compare(first: Results, second: Results) -> list[Difference]:
    """Second minus first, for every metric and task and overall, over the prompts that both have scored.

    Raises:
        ValueError: they are of different benchmarks, prompts, or judges: such numbers say nothing of each other.
    """
    _check_alike(first, second)
    tasks = list(dict.fromkeys(entry["task"] for entry in first.prompts.values()))
    found = []
    for metric, scale in first.scales.items():
        by_task = [_differences(first, second, metric, scale, task) for task in tasks]
        if len(tasks) > 1:
            found += [Difference(metric, task, paired_test([d])) for task, d in zip(tasks, by_task, strict=True)]
        strata = by_task if first.average == "tasks" else [[value for values in by_task for value in values]]
        found.append(Difference(metric, OVERALL, paired_test(strata)))
    return found


def _differences(first: Results, second: Results, metric: str, scale: float, task: str) -> list[float]:
    ids = [name for name, entry in first.prompts.items() if entry["task"] == task]
    sides = [[run.prompts[name]["values"].get(metric, math.nan) for name in ids] for run in (first, second)]
    return [scale * (after - before) for before, after in zip(*sides, strict=True)]


def _check_alike(first: Results, second: Results) -> None:
    for name in ("benchmark", "prompts_digest", "scorer"):
        before, after = getattr(first, name), getattr(second, name)
        if before != after:
            told = {"prompts_digest": "prompts files", "scorer": f"judges ({first.scoring} and {second.scoring})"}
            raise ValueError(
                f"compare: expected two evaluations of one benchmark on the same prompts by the same scorer, got "
                f"different {told.get(name, 'benchmarks')}: {before} and {after}; evaluate both alike"
            )
    if first.prompts.keys() != second.prompts.keys():
        raise ValueError(
            f"compare: expected evaluations of the same prompts, got {len(first.prompts)} and {len(second.prompts)} "
            f"with {len(first.prompts.keys() & second.prompts.keys())} in common; use the same --limit"
        )


def format_differences(first: Results, second: Results, found: Sequence[Difference]) -> str:
    """The differences as a table in plain text."""
    deviations = dict.fromkeys((*first.deviations, *second.deviations))
    lines = [f"{first.title}: second minus first, {len(first.prompts)} prompts, paired"]
    lines += [f"  {side}: {describe(run.drawing)}" for side, run in (("first", first), ("second", second))]
    lines += [f"  {NOT_COMPARABLE} with published numbers: {'; '.join(deviations)}"] * bool(deviations)
    label = f"  {NOT_COMPARABLE}" if deviations else ""
    width = max(len(entry.task) for entry in found)
    metric_width = max(len(entry.metric) for entry in found)
    for entry in found:
        value, low, high = entry.test.interval
        lines.append(
            f"  {entry.metric:<{metric_width}}  {entry.task:<{width}}  {value:+8.4f}  [{low:+.4f}, {high:+.4f}]"
            f"  p={entry.test.p_value:.4f}  n={entry.test.pairs}{label}"
        )
    lines.append("  95 % percentile bootstrap over prompts within their tasks; p of the sign-flip test, two-sided")
    return "\n".join(lines)


def save_differences(path: Path, first: Results, second: Results, found: Sequence[Difference]) -> None:
    """Write the differences as JSON, in which what cannot be said is null."""
    rows = []
    for entry in found:
        (value, low, high), p_value, count = entry.test
        numbers = {"difference": value, "low": low, "high": high, "p_value": p_value}
        plain = {name: None if math.isnan(number) else number for name, number in numbers.items()}
        rows.append({"metric": entry.metric, "task": entry.task, **plain, "prompts": count})
    deviations = list(dict.fromkeys((*first.deviations, *second.deviations)))
    content = {
        "benchmark": first.benchmark,
        "comparable": not deviations,
        "deviations": deviations,
        "drawing": [first.drawing, second.drawing],
        "scoring": dict(first.scoring),
        "rule": "percentile bootstrap over prompts within tasks, 95 %; sign-flip test, two-sided",
        "differences": rows,
    }
    write_json(path, content)
