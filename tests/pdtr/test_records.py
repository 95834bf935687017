"""What a run writes down of its prompts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from envs.prompts import FixedPool
from pdtr.config import EvaluationConfig, TrainConfig
from pdtr.progress import Progress
from pdtr.records import Records
from pdtr.tasks import Task
from rewards.base import Prompt
from rewards.pixel import redness


def sources_strip(folder: Path, counts: list[int]) -> np.ndarray | None:
    """The strip of a run whose prompts have so many sources, the k-th of the n-th prompt of the grey 10 n + k."""
    prompts = [
        Prompt(f"{n}", tuple(np.full((4, 6, 3), 10 * n + k, np.uint8) for k in range(count)))
        for n, count in enumerate(counts)
    ]
    task = Task("edit", FixedPool(prompts), redness, prompts, prompts, (4, 6))
    config = TrainConfig(output_dir=folder, evaluation=EvaluationConfig(num_grid=2))
    Records(config, Progress(config, Console(file=io.StringIO()))).prompts({"edit": task})
    path = folder / "evaluations" / "sources-edit.png"
    return np.asarray(Image.open(path)) if path.exists() else None


def test_all_sources_of_a_prompt_are_kept_side_by_side(tmp_path: Path) -> None:
    strip = sources_strip(tmp_path, [3, 3, 3])
    assert strip is not None
    assert strip.shape == (4, 2 * 3 * 6, 3)
    assert strip[0, ::6, 0].tolist() == [0, 1, 2, 10, 11, 12]


def test_one_source_and_none_are_as_ever(tmp_path: Path) -> None:
    strip = sources_strip(tmp_path / "one", [1, 1])
    assert strip is not None
    assert strip[0, ::6, 0].tolist() == [0, 10]
    assert sources_strip(tmp_path / "none", [0, 0]) is None


def test_what_a_prompt_has_fewer_is_white(tmp_path: Path) -> None:
    strip = sources_strip(tmp_path, [1, 2])
    assert strip is not None
    assert strip[0, ::6, 0].tolist() == [0, 255, 10, 11]
