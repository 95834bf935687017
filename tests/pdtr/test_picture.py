"""The picture of before and after is cut from what the run's evaluations left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdtr.logbook import Logbook
from pdtr.picture import write_picture


def _sources() -> np.ndarray:
    """Of two prompts, three pictures each, side by side."""
    row = np.concatenate([np.broadcast_to(np.eye(3, dtype=np.uint8)[i] * 255, (8, 8, 3)) for i in range(3)], axis=1)
    return np.stack([row] * 2)


def _run(folder: Path, labels: dict[str, int], task: str = "t2i", sources: np.ndarray | None = None) -> Path:
    (folder).mkdir()
    (folder / "config.json").write_text(json.dumps({"recipe": "r", "config": {}, "versions": {}, "seed": 0}))
    logbook = Logbook(folder, tensorboard=False)
    logbook.prompts(task, ["a red circle", "<two> squares"], sources)
    for iteration, (label, value) in enumerate(labels.items()):
        row = {"iteration": iteration, "task": task, "set": "final", "label": label, "strict": 0.5, "reward": 0.5}
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


def test_several_sources_are_shown_whole_and_at_the_scale_of_the_others(tmp_path: Path) -> None:
    """A run whose edits have a red, a green and a blue picture each; before is 60 and after 200."""
    folder = _run(tmp_path / "run", {"base": 60, "after edit": 200}, "edit", _sources())
    pixels = np.asarray(Image.open(write_picture(folder)).convert("RGB")).astype(int)
    shades = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "before": (60,) * 3, "after": (200,) * 3}
    areas = {name: int((pixels == shade).all(axis=2).sum()) for name, shade in shades.items()}
    assert min(areas.values()) > 5000
    # Fitted into a third of a column they would have a ninth of the others' area.
    assert max(areas.values()) < 1.5 * min(areas.values()), areas


def test_a_run_without_an_end_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected images of the base and of a stage's end, found none"):
        write_picture(_run(tmp_path / "run", {"base": 60}))
