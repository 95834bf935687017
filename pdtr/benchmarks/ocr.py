"""Flow-GRPO's OCR benchmark (arXiv:2505.05470): is the text in quotation marks in the picture? 1,018 prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pdtr.benchmarks.base import Benchmark, Item, Metric, Scorer
from pdtr.benchmarks.layouts import SampleFolders

if TYPE_CHECKING:
    from rewards.ocr import OCR

PUBLISHED = 1018


def load_ocr(path: Path) -> Benchmark:
    """The OCR benchmark over Flow-GRPO's ``dataset/ocr/test.txt``, a prompt a line; the mean over prompts.

    ``accuracy`` is ``1 - min(d, n) / n`` with the edit distance d from the target of n characters, 0 where the target
    is part of what was read; ``exact`` is the share of pictures with the target and nothing else.

    Raises:
        ValueError: there is no such file, or no prompt has a text in straight quotation marks.
    """
    from envs.prompts import load_prompts
    from rewards.ocr import ocr_target

    loaded = load_prompts(path)
    problems = [str(problem) for problem in loaded.problems]
    items = []
    for index, prompt in enumerate(loaded.prompts):
        try:
            ocr_target(prompt.text)
        except ValueError as error:
            problems.append(f"{prompt.id}: {error}")
            continue
        items.append(Item(index, f"{index:05d}", prompt.text, metadata={"tag": "ocr"}))
    if not items:
        raise ValueError(f"{path}: expected prompts with a text in quotation marks, got none: {problems[0]}")
    found = len(items)
    return Benchmark(
        name="ocr",
        title="OCR (Flow-GRPO, arXiv:2505.05470)",
        items=tuple(items),
        samples=1,
        layout=SampleFolders(),
        metrics=(Metric("accuracy", "total"), Metric("exact", "exact")),
        average="prompts",
        problems=tuple(problems),
        deviations=() if found == PUBLISHED else (f"{found} prompts, published {PUBLISHED}",),
    )


def ocr_scorer(reward: OCR, reader: str = "RapidOCR") -> Scorer:
    """Flow-GRPO's rule; published numbers were read by PaddleOCR 2.9.1."""
    facts = {"reader": reader, "min_confidence": reward.settings.min_confidence}
    return Scorer(reward, facts, (f"reader {reader} in place of PaddleOCR 2.9.1",), 16)
