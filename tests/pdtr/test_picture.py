"""The picture of before and after is cut from what the run's evaluations left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdtr.logbook import Logbook
from pdtr.picture import write_picture


def _run(folder: Path, labels: dict[str, int]) -> Path:
    (folder).mkdir()
    (folder / "config.json").write_text(json.dumps({"recipe": "r", "config": {}, "versions": {}, "seed": 0}))
    logbook = Logbook(folder, tensorboard=False)
    logbook.prompts("t2i", ["a red circle", "<two> squares"])
    for iteration, (label, value) in enumerate(labels.items()):
        row = {"iteration": iteration, "task": "t2i", "set": "final", "label": label, "strict": 0.5, "reward": 0.5}
        images = np.full((2, 8, 8, 3), value, np.uint8)
        logbook.evaluation(row, ["0", "1"], ["a", "b"], {"strict": [0, 1], "reward": [0, 1]}, images)
    return folder


def test_shows_the_base_above_the_end(tmp_path: Path) -> None:
    path = write_picture(_run(tmp_path / "run", {"base": 60, "after t2i": 200}))
    pixels = np.asarray(Image.open(path).convert("L"))
    before, after = np.argwhere(pixels == 60), np.argwhere(pixels == 200)
    assert len(before) > 1000
    assert len(after) > 1000
    assert np.median(before[:, 0]) < np.median(after[:, 0])


def test_a_run_without_an_end_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected images of the base and of a stage's end, found none"):
        write_picture(_run(tmp_path / "run", {"base": 60}))
