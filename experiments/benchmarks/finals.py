"""The final evaluations of many runs, and what they say over seeds and over prompts.

Two kinds of interval, for two questions. Over seeds (Student's t): what would another training run give? Over prompts
(paired bootstrap): what would these training runs give on other prompts?
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.seeds import RunSpec, read_cost
from experiments.benchmarks.tables import read_csv
from pdtr.report_data import RunRecord, by_id, is_run, read_run
from pdtr.statistics import Interval, bootstrap_interval, mean_interval

# What may differ between the seeds of one recipe.
_RUN_OWN = ("seed", "output_dir", "num_threads")


@dataclass(frozen=True)
class Final:
    """One final evaluation; a row of the CSV.

    Attributes:
        recipe: of the run.
        seed: of the run.
        label: "base" or "after STAGE".
        task: "t2i" or "edit".
        strict: share of strict successes.
        count: prompts.
        missing: of these, prompts without a score.
        iteration: after which.
        seconds: of training until then, evaluations apart.
        run_seconds: wall time of the whole run's process.
        run_peak_mib: its peak memory.
    """

    recipe: str
    seed: int
    label: str
    task: str
    strict: float
    count: int
    missing: int
    iteration: int
    seconds: float
    run_seconds: float
    run_peak_mib: float


@dataclass(frozen=True)
class Study:
    """The final evaluations of several recipes, each with several seeds.

    Attributes:
        finals: all of them.
        records: the runs themselves by (recipe, seed), where their folders are there; for scores prompt by prompt.
    """

    finals: tuple[Final, ...]
    records: Mapping[tuple[str, int], RunRecord]

    @property
    def recipes(self) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(row.recipe for row in self.finals))

    def labels(self, recipe: str) -> list[str]:
        """The moments of a recipe's runs in order: the base, then after each stage."""
        own = sorted((row for row in self.finals if row.recipe == recipe), key=lambda row: row.iteration)
        return list(dict.fromkeys(row.label for row in own))

    def scores(self, recipe: str, label: str, task: str) -> dict[int, float]:
        """Strict success by seed; seeds without this evaluation are left out."""
        wanted = (recipe, label, task)
        return {row.seed: row.strict for row in self.finals if (row.recipe, row.label, row.task) == wanted}

    def over_seeds(self, recipe: str, task: str, after: str, before: str) -> dict[int, float]:
        """Difference of a task's score between two moments, by seed."""
        later, earlier = self.scores(recipe, after, task), self.scores(recipe, before, task)
        return {seed: later[seed] - earlier[seed] for seed in later if seed in earlier}

    def over_prompts(self, recipe: str, task: str, after: str, before: str) -> Interval | None:
        """The same difference with a bootstrap interval over prompts, all seeds pooled.

        The seeds share their prompts, so that a prompt's differences are averaged over the seeds first and prompts are
        what is resampled. None where no run's scores prompt by prompt can be read.
        """
        differences: dict[str, list[float]] = {}
        for (name, _), record in self.records.items():
            later, earlier = _by_prompt(record, after, task), _by_prompt(record, before, task)
            if name == recipe:
                for key in later.keys() & earlier.keys():
                    differences.setdefault(key, []).append(later[key] - earlier[key])
        known = [[value for value in values if not math.isnan(value)] for _, values in sorted(differences.items())]
        means = [float(np.mean(values)) for values in known if values]
        return bootstrap_interval(means) if means else None

    def costs(self, recipe: str) -> tuple[Interval, Interval, int]:
        """(wall seconds, peak MiB, runs) of a recipe, over seeds; runs that were not measured are left out."""
        own = {row.seed: (row.run_seconds, row.run_peak_mib) for row in self.finals if row.recipe == recipe}
        measured = [cost for cost in own.values() if not math.isnan(cost[0])]
        seconds, memory = ([cost[index] for cost in measured] for index in range(2))
        return mean_interval(seconds), mean_interval(memory), len(measured)


def read_study(specs: Sequence[RunSpec], csv_path: Path) -> Study:
    """Read the finished runs; where none of their folders is left, the CSV that an earlier study wrote.

    Raises:
        ValueError: there is neither; a folder holds another run than the one that belongs there; or runs of one recipe
            have different configurations.
    """
    finished = [spec for spec in specs if spec.is_finished and is_run(spec.folder)]
    if not finished:
        if csv_path.is_file():
            return Study(tuple(read_csv(csv_path, Final)), {})
        raise ValueError(f"expected finished runs such as {specs[0].folder}, or {csv_path}; found neither")
    records = {(spec.recipe, spec.seed): _checked(spec) for spec in finished}
    for spec in finished:
        _check_same(records, spec)
    return Study(tuple(row for spec in finished for row in finals_of(spec)), records)


def finals_of(spec: RunSpec) -> list[Final]:
    """The final evaluations of one run, in order."""
    record, cost = read_run(spec.folder), read_cost(spec.folder)
    found = [record.final(label, task) for label in record.labels for task in record.tasks]
    return [_final(spec, row, cost.seconds, cost.peak_mib) for row in found if row is not None]


def _final(spec: RunSpec, row: Mapping[str, Any], run_seconds: float, run_peak_mib: float) -> Final:
    return Final(
        recipe=spec.recipe,
        seed=spec.seed,
        label=str(row["label"]),
        task=str(row["task"]),
        strict=math.nan if row["strict"] is None else float(row["strict"]),
        count=int(row["count"]),
        missing=int(row.get("missing") or 0),
        iteration=int(row["iteration"]),
        seconds=float(row["seconds"]),
        run_seconds=run_seconds,
        run_peak_mib=run_peak_mib,
    )


def _checked(spec: RunSpec) -> RunRecord:
    record = read_run(spec.folder)
    got = (record.config.get("recipe"), record.config.get("seed"))
    if got != (spec.recipe, spec.seed):
        raise ValueError(
            f"{spec.folder}: expected a run of {spec.recipe!r} with seed {spec.seed}, got one of {got[0]!r} with seed "
            f"{got[1]}; move it away"
        )
    return record


def _check_same(records: Mapping[tuple[str, int], RunRecord], spec: RunSpec) -> None:
    """Compare a run with the first of its recipe."""
    first = next(record for (recipe, _), record in records.items() if recipe == spec.recipe)
    one, other = _settings(first), _settings(records[spec.recipe, spec.seed])
    different = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    if different:
        raise ValueError(
            f"{spec.folder}: expected the configuration of {first.folder}, got another {', '.join(different)}; seeds "
            "of one recipe compare only with one configuration: move one of the folders away"
        )


def _settings(record: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in record.config.get("config", {}).items() if key not in _RUN_OWN}


def _by_prompt(record: RunRecord, label: str, task: str) -> dict[str, float]:
    row = record.final(label, task)
    scores = None if row is None else record.scores(row)
    return {} if scores is None else by_id(scores)
