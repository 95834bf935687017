"""How far a served judge agrees with the ground truth on held-out edits of the embedded world, readout by readout.

Type ``python -m experiments.benchmarks.judge_agreement``, with a judge served there and
scored edits of ``pdtr edit-reward data``. Everything goes through ``VLMJudge``, twice: the second time, the retest, in
another order and without the server's memory of the first.
Templates that a judge was not trained on are reported as they are. The figures go to ``judge_agreement.csv``.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.machine import describe_machine
from experiments.benchmarks.tables import RESULTS, quantity, text_table, write_csv
from experiments.flags import Usage, parse
from experiments.scenes_judge_reward import JudgeRewards
from experiments.served_rewards import find_template
from pdtr.statistics import Interval, bootstrap_interval, wilson_interval
from rewards.base import Prompt, Scores
from rewards.scoring import score

if TYPE_CHECKING:
    from rewards.edit_reward_data import ScoredEdit
    from rewards.judges.client import JudgeClient

USAGE = "python -m experiments.benchmarks.judge_agreement"
TABLE = "judge_agreement.csv"
NAN = math.nan


@dataclass(frozen=True)
class Options:
    """Score held-out edits by each template and compare with the ground truth.

    Attributes:
        judge: the server, see ``pdtr train pdtr_scenes_judge --help``; its template is asked first.
        templates: others to ask by: the embedded world's, the library's, or paths.
        data: folder of scored edits.
        split: which of them.
        num_edits: at most so many, whole prompts.
        resamples: of the bootstrap over prompts.
        results: folder of the CSV file.
    """

    judge: JudgeRewards = field(default_factory=JudgeRewards)
    templates: tuple[str, ...] = ("scenes_yes_no.v1", "scenes_rubric.v1", "scenes_better.v1")
    data: Path = Path("runs/edit_reward/data")
    split: str = "test"
    num_edits: int = 2000
    resamples: int = 1000
    results: Path = RESULTS

    def __post_init__(self) -> None:
        if self.num_edits < 2 or self.resamples < 1:
            raise ValueError(f"num_edits, resamples: expected 2, 1 or more, got {self.num_edits}, {self.resamples}")


@dataclass(frozen=True)
class Figure:
    """One figure of one template, with its 95 % interval; a row of the CSV.

    Attributes:
        template: what was asked.
        readout: how it was read.
        quantity: "Spearman", "pairs in order", "calibration error", "test-retest Spearman", "largest difference of the
            retest", "label mass" or "available".
        value: the figure.
        low: of the interval; over prompts where it is an agreement, over edits else.
        high: see ``low``.
        n: edits, or pairs.
        model: the name of the judge.
        machine: on which.
    """

    template: str
    readout: str
    quantity: str
    value: float
    low: float
    high: float
    n: int
    model: str
    machine: str


def benchmark(arguments: Sequence[str]) -> int:
    """Measure, write the CSV file, print the table."""
    options = parse(Options(), Usage(USAGE), arguments)
    found: list[Figure] = []
    for figure in measure(options):
        found.append(figure)
        write_csv(options.results / TABLE, found)
    rows = [
        [row.template, row.readout, row.quantity, str(row.n), quantity(Interval(row.value, row.low, row.high), ".3f")]
        for row in found
    ]
    print(f"Judge: {found[0].model}. Machine: {found[0].machine}\n\n95 % intervals")
    print(text_table(["template", "readout", "", "n", "value"], rows))
    return 0


def measure(options: Options) -> Iterator[Figure]:
    """Every figure of every template.

    Raises:
        ValueError: no data, no such template, no server, or a judge that cannot be asked.
    """
    edits = held_out_edits(options)
    prompts = _prompts(edits)
    machine = describe_machine()
    with options.judge.make_client() as client:
        model = options.judge.make_judge(client).model
        for template in dict.fromkeys((options.judge.template, *options.templates)):
            name, readout, first, second = _asked_twice(options, client, model, template, edits, prompts)
            for what, (interval, n) in figures(edits, first, second, readout, options.resamples).items():
                yield Figure(name, readout, what, *interval, n, model, machine)


def held_out_edits(options: Options) -> list[ScoredEdit]:
    """The edits that are compared, those of a prompt side by side; the last prompt may be left out to keep it whole."""
    from rewards.edit_reward_data import read_edits

    by_prompt: dict[str, list[ScoredEdit]] = {}
    for edit in read_edits(options.data, options.split):
        by_prompt.setdefault(edit.prompt_id, []).append(edit)
    chosen: list[ScoredEdit] = []
    for group in by_prompt.values():
        if chosen and len(chosen) + len(group) > options.num_edits:
            break
        chosen += group
    return chosen


def figures(
    edits: Sequence[ScoredEdit], first: Scores, second: Scores, readout: str, resamples: int
) -> Mapping[str, tuple[Interval, int]]:
    """What two rounds of one readout say: figures with their intervals and counts; NaN where too few are available.

    Win rates within a group are on no common scale, so a pairwise readout has pairs in order and no Spearman.
    """
    from rewards.agreement import agreement

    truths = np.array([edit.scores["total"] for edit in edits])
    groups = [edit.prompt_id for edit in edits]
    available = ~np.isnan(first.total)
    found: dict[str, tuple[Interval, int]] = {
        "available": (wilson_interval(int(available.sum()), len(edits)), len(edits)),
        "label mass": (_mean(first.components.get("label_mass", np.full(len(edits), NAN))), len(edits)),
    }
    both = available & ~np.isnan(second.total)
    if both.sum() < 2:
        return found
    with warnings.catch_warnings():
        # A judge that says the same of everything has no rank correlation: NaN says so, numpy need not.
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        of_truth = agreement(first.total, truths, groups, resamples)
        again = agreement(first.total[both], second.total[both], list(np.array(groups)[both]), resamples)
    worst = float(np.abs(first.total[both] - second.total[both]).max())
    if readout != "pairwise":
        found["Spearman"] = (Interval(*of_truth.spearman), of_truth.count)
        found["calibration error"] = (Interval(*of_truth.calibration), of_truth.count)
    found["pairs in order"] = (Interval(*of_truth.pairwise), of_truth.num_pairs)
    found["test-retest Spearman"] = (Interval(*again.spearman), again.count)
    found["largest difference of the retest"] = (Interval(worst, NAN, NAN), int(both.sum()))
    return found


def _asked_twice(
    options: Options,
    client: JudgeClient,
    model: str,
    template: str,
    edits: Sequence[ScoredEdit],
    prompts: Sequence[Prompt],
) -> tuple[str, str, Scores, Scores]:
    from rewards.judges.judge import VLMJudge
    from rewards.judges.settings import JudgeSettings

    settings = JudgeSettings(min_label_mass=options.judge.min_label_mass)
    images = np.stack([edit.image for edit in edits])
    judge = VLMJudge(client, model, find_template(template), settings)
    first = score(judge, images, prompts)
    # vLLM keeps the attention of what it has read, and its answers vary with what is computed beside them: asked again
    # as before it would answer from memory. The salt is vLLM's, of its memory's keys.
    judge = VLMJudge(client, model, judge.template, replace(settings, extra={"cache_salt": "retest"}))
    order = _another_order(prompts)
    again = score(judge, images[order], [prompts[row] for row in order])
    return judge.template.name, judge.template.readout.kind, first, Scores(again.total[np.argsort(order)])


def _another_order(prompts: Sequence[Prompt]) -> list[int]:
    """Rows with the prompts shuffled and each prompt's images, which stay side by side, turned round."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt.id, []).insert(0, row)
    names = list(rows)
    return [row for index in np.random.default_rng(0).permutation(len(names)) for row in rows[names[index]]]


def _prompts(edits: Sequence[ScoredEdit]) -> list[Prompt]:
    """One prompt an edit; those of a group share the object, which is what makes them a group."""
    made: dict[str, Prompt] = {}
    for edit in edits:
        made.setdefault(edit.prompt_id, Prompt(edit.instruction, (edit.source,), {}, edit.prompt_id))
    return [made[edit.prompt_id] for edit in edits]


def _mean(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Interval:
    present = values[~np.isnan(values)]
    return bootstrap_interval(present) if len(present) else Interval(NAN, NAN, NAN)


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
