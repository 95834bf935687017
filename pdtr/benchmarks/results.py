"""``results.json`` and its table: no number without what it was drawn and scored with, and whether it compares."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtr.benchmarks.aggregate import (
    ERROR_RULE,
    OVERALL,
    Number,
    numbers,
    prompt_values,
    reasons,
)
from pdtr.benchmarks.settings import describe, squashed

if TYPE_CHECKING:
    from pdtr.benchmarks.base import Benchmark, Scorer
    from pdtr.benchmarks.scoring import Row

RESULTS = "results.json"
NOT_COMPARABLE = "not comparable"


@dataclass(frozen=True)
class Results:
    """What one evaluation found, as ``results.json`` has it.

    Attributes:
        benchmark: its name.
        title: name and source of the protocol.
        average: "tasks" or "prompts": what the overall number is a mean of.
        scales: of each metric, from a prompt's values to the numbers.
        deviations: why the numbers do not compare with published ones; empty: they do.
        prompts_digest: hash of the items of the whole file.
        drawing: the settings that the images were drawn with; None where nobody has said.
        scorer: fingerprint,
        scoring: and facts of what scored them.
        numbers: every mean.
        prompts: of each item, by id: its task, and the mean of each metric (absent: not available).
        failures: the commonest reasons for what is missing, with how many images have each.
    """

    benchmark: str
    title: str
    average: str
    scales: Mapping[str, float]
    deviations: tuple[str, ...]
    prompts_digest: str
    drawing: Mapping[str, Any] | None
    scorer: str
    scoring: Mapping[str, Any]
    numbers: tuple[Number, ...]
    prompts: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, int]

    @property
    def is_comparable(self) -> bool:
        """Whether the numbers compare with published ones."""
        return not self.deviations

    def headline(self) -> Number:
        """The benchmark's number: the first metric's overall one."""
        return next(number for number in self.numbers if number.task == OVERALL)


def results_of(benchmark: Benchmark, scorer: Scorer, rows: Sequence[Row], drawing: Mapping[str, Any] | None) -> Results:
    """The results of scored images."""
    by_metric = {
        metric.name: prompt_values(benchmark.items, rows, benchmark.derive, metric.value)
        for metric in benchmark.metrics
    }
    means = {item.id: {name: values[item.id].mean for name, values in by_metric.items()} for item in benchmark.items}
    return Results(
        benchmark=benchmark.name,
        title=benchmark.title,
        average=benchmark.average,
        scales={metric.name: metric.scale for metric in benchmark.metrics},
        deviations=(*benchmark.deviations, *squashed(benchmark.items, drawing), *scorer.deviations),
        prompts_digest=benchmark.digest,
        drawing=drawing,
        scorer=scorer.fingerprint,
        scoring=dict(scorer.facts),
        numbers=tuple(numbers(benchmark, rows)),
        prompts={
            item.id: {"task": item.task, "values": {k: v for k, v in means[item.id].items() if not math.isnan(v)}}
            for item in benchmark.items
        },
        failures=reasons(rows),
    )


def save_results(path: Path, results: Results) -> None:
    """Write them as JSON, in which what is not available is null."""
    content = {
        "comparable": results.is_comparable,
        "standard_error": ERROR_RULE,
        **asdict(results),
        "numbers": [{name: _plain(value) for name, value in asdict(number).items()} for number in results.numbers],
    }
    write_json(path, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of JSON, with its folder.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        # A write that fails, unlike an opening that does, does not say where.
        error.filename = error.filename or str(path)
        raise


def load_results(path: Path) -> Results:
    """Read a ``results.json``, or that of a folder.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    path = path / RESULTS if path.is_dir() else path
    try:
        content = json.loads(path.read_text("utf-8"))
        for name in ("comparable", "standard_error"):
            del content[name]
        found = [Number(**_restored(row)) for row in content["numbers"]]
        return Results(**{**content, "numbers": tuple(found), "deviations": tuple(content["deviations"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the results of pdtr eval, got another or a damaged file ({error!r})"
        ) from error


def format_results(results: Results) -> str:
    """Everything about an evaluation as plain text: settings, numbers, failures."""
    images = max(number.images for number in results.numbers)
    lines = [
        f"{results.title}: {len(results.prompts)} prompts, {images} images",
        f"  drawn:  {describe(results.drawing)}",
        f"  scored: {_facts(results.scoring)} ({results.scorer})",
    ]
    lines += [f"  {NOT_COMPARABLE} with published numbers: {'; '.join(results.deviations)}"] * bool(results.deviations)
    lines += _table(results)
    lines.append(f"  +- is the standard error, {ERROR_RULE}; failed images are left out")
    lines += [f"  failed: {count} x {reason}" for reason, count in results.failures.items()]
    return "\n".join(lines)


def _table(results: Results) -> list[str]:
    label = "" if results.is_comparable else f"  {NOT_COMPARABLE}"
    width = max(len(number.task) for number in results.numbers)
    metric_width = max(len(number.metric) for number in results.numbers)
    return [
        f"  {number.metric:<{metric_width}}  {number.task:<{width}}  {_shown(number.value):>8}"
        f" +- {_shown(number.error):<7}  n={number.prompts}  failed {number.failed}/{number.images}{label}"
        for number in results.numbers
    ]


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _facts(facts: Mapping[str, Any]) -> str:
    told = [f"{name} {_fact(value)}" for name, value in facts.items()]
    return ", ".join(told)


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}:{_fact(entry)}" for name, entry in value.items())
    return str(value)


def _restored(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in row.items()}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
