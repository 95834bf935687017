"""GenEval (arXiv:2310.11513): 553 prompts of six tasks, four images each, the mean of the six tasks' shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtr.benchmarks.base import Benchmark, Item, Metric, Scorer, count_deviations
from pdtr.benchmarks.layouts import SampleFolders
from pdtr.benchmarks.scoring import Row
from pdtr.benchmarks.tables import Record, parsed, text_of
from rewards.base import Unavailable

if TYPE_CHECKING:
    from rewards.base import Images, Prompt, Scores
    from rewards.detected import DetectedGenEval

PUBLISHED = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
"""Prompts a task."""
SAMPLES = 4


def load_geneval(path: Path) -> Benchmark:
    """GenEval over its ``evaluation_metadata.jsonl``, or another file of that form.

    ``correct`` is the official rule: at least so many objects, of the asked colours, in the asked relation. The
    benchmark's number is the unweighted mean of the six tasks; ``all prompts``, which papers do not report, weighs
    them by their prompts.

    Raises:
        ValueError: there is no such file, or no row of it is GenEval's.
    """
    items, problems = parsed(path, _item)
    return Benchmark(
        name="geneval",
        title="GenEval (arXiv:2310.11513)",
        items=items,
        samples=SAMPLES,
        layout=SampleFolders(),
        metrics=(Metric("correct", "official"),),
        average="tasks",
        problems=problems,
        deviations=count_deviations(items, PUBLISHED),
    )


def _item(index: int, record: Record) -> Item:
    from rewards.geneval import validate_metadata

    _, row = record
    text = text_of(row, "prompt")
    metadata = {key: value for key, value in row.items() if key != "prompt"}
    validate_metadata(metadata)
    return Item(index, f"{index:05d}", text, str(metadata["tag"]), metadata)


def detector_scorer(reward: DetectedGenEval, name: str) -> Scorer:
    """GenEval's rule over a detector of transformers, whose numbers do not compare unless it is the original.

    Args:
        reward: detector, colours and rule.
        name: of the detector, for the reader.
    """
    deviations = () if reward.finder.is_original else (f"detector {name} in place of mmdet's Mask2Former",)
    return Scorer(_Plain(reward), {"detector": name, "colors": _colors(reward)}, deviations, 16)


def scenes_scorer() -> Scorer:
    """GenEval's rule over the embedded world's detector, for prompts over shapes."""
    from envs.scenes.rewards import RULE, t2i_reward

    facts = {"detector": "scenes", "threshold": RULE.threshold}
    return Scorer(t2i_reward, facts, ("the embedded world's detector and prompts in place of GenEval's",), 64)


def official_rows(path: Path, benchmark: Benchmark) -> tuple[list[Row], Scorer]:
    """What GenEval's own ``evaluate_images.py`` wrote of these images, read back.

    Its file has a line an image, with ``filename`` (``.../00012/samples/0003.png``), ``prompt`` and ``correct``. The
    images are drawn here and judged in the environment that the official scorer needs; so these are its numbers, and
    compare.

    Raises:
        ValueError: no line is one of its, or one is of another prompt.
    """
    lines, problems = parsed(path, _official_line)
    correct = {place: value for place, _, value in lines}
    prompts = {place[0]: prompt for place, prompt, _ in lines}
    facts = {"detector": "GenEval's own", "file": path.name, "bad lines": len(problems)}
    scorer = Scorer(_read_back, facts)
    rows = []
    for item in benchmark.items:
        if prompts.get(item.index, item.text) != item.text:
            raise ValueError(
                f"{path}: expected results for {item.text!r} in folder {item.index:05d}, got some for "
                f"{prompts[item.index]!r}; they are of another prompts file"
            )
        for sample in range(benchmark.samples):
            value = correct.get((item.index, sample))
            values = {} if value is None else {"official": value}
            reason = "" if values else f"{path.name} has no line for this image"
            rows.append(Row(item.id, sample, "", scorer.fingerprint, values, reason))
    return rows, scorer


def _official_line(_: int, record: Record) -> tuple[tuple[int, int], str, float]:
    row = record[1]
    parts = Path(text_of(row, "filename")).parts
    stem = Path(parts[-1]).stem
    if len(parts) < 3 or not parts[-3].isdigit() or not stem.isdigit() or not isinstance(row.get("correct"), bool):
        raise ValueError(f"expected filename .../00012/samples/0003.png and correct, got {str(dict(row))[:80]}")
    return (int(parts[-3]), int(stem)), text_of(row, "prompt"), float(row["correct"])


def _read_back(images: Images, prompts: Sequence[Prompt]) -> Scores:
    raise Unavailable("the official scorer's results are read back, and no image is scored here")


class _Plain:
    """A :class:`DetectedGenEval` whose components have the rule's names, whatever the detector."""

    def __init__(self, reward: DetectedGenEval) -> None:
        self.reward = reward
        self.traits = reward.traits
        self.__name__ = reward.__name__

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        from rewards.base import Scores

        found = self.reward(images, prompts)
        components = {name.removesuffix(self.reward.suffix): value for name, value in found.components.items()}
        return Scores(found.total, components, found.reasons)


def _colors(reward: DetectedGenEval) -> str:
    return "none" if reward.colors is None else str(reward.colors.settings.source.model)


def save_metadata(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts with GenEval metadata as GenEval's file has them, for instance those of the embedded world.

    Raises:
        ValueError: a prompt's metadata is not GenEval's.
    """
    from envs.geneval_prompts import save_rows
    from rewards.geneval import validate_metadata

    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        validate_metadata(prompt.metadata)
        kept = {key: prompt.metadata[key] for key in ("tag", "include", "exclude") if key in prompt.metadata}
        rows.append({**kept, "prompt": prompt.text})
    save_rows(path, rows)
