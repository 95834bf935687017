"""Calibration of an edit reward: what its numbers mean, in the units of the scores that it was trained on.

A model that is trained on scores and on pairs at once is right about the order before it is about the size. A monotone
curve through the means of bins of held-out edits mends the size and leaves the order as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Curve:
    """A rising curve through knots, straight between them and beyond.

    Attributes:
        x: what the model says, rising; none is the identity.
        y: what that is worth, rising.
    """

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) == 1:
            raise ValueError(f"Curve: expected two knots or more, or none, got {len(self.x)} and {len(self.y)} numbers")
        if any(np.diff(self.x) <= 0) or any(np.diff(self.y) <= 0):
            raise ValueError(f"Curve: expected rising knots, got x {self.x} and y {self.y}")

    def __call__(self, values: ArrayLike) -> NDArray[np.float64]:
        """Calibrated values, of any shape; NaN stays NaN.

        Beyond the last knots the curve goes on with its mean slope: good edits are still told from better ones.
        """
        raw = np.asarray(values, np.float64)
        if not self.x:
            return raw
        slope = (self.y[-1] - self.y[0]) / (self.x[-1] - self.x[0])
        beyond = np.minimum(raw - self.x[0], 0) + np.maximum(raw - self.x[-1], 0)
        return np.asarray(np.interp(raw, self.x, self.y) + slope * beyond, np.float64)


def fit_curve(rewards: ArrayLike, truths: ArrayLike, num_bins: int = 12) -> Curve:
    """Isotonic regression of held-out truths on rewards, over the means of bins of equally many edits.

    Neighbouring bins that are out of order, or as good as equal, are joined: isotonic regression's own rule
    (pool adjacent violators), with bins in place of single edits so that no knot rests on a few of them.

    Args:
        rewards: what the model says, [N].
        truths: what it should say, [N].
        num_bins: at most so many knots.

    Returns:
        The curve; the identity where the rewards do not rise with the truths at all.
    """
    first, second = np.asarray(rewards, np.float64), np.asarray(truths, np.float64)
    rows = [part for part in np.array_split(np.argsort(first, kind="stable"), num_bins) if len(part)]
    blocks: list[tuple[float, float, int]] = []
    for part in rows:
        block = (float(first[part].mean()), float(second[part].mean()), len(part))
        while blocks and (block[1] <= blocks[-1][1] + 1e-3 or block[0] <= blocks[-1][0]):
            block = _joined(blocks.pop(), block)
        blocks.append(block)
    if len(blocks) < 2:
        return Curve()
    return Curve(tuple(round(x, 6) for x, _, _ in blocks), tuple(round(y, 6) for _, y, _ in blocks))


def save_curves(curves: Mapping[str, Curve], folder: Path, num_edits: int) -> None:
    """Write ``calibration.json`` beside a checkpoint's weights: a curve a dimension."""
    known = {name: {"x": curve.x, "y": curve.y} for name, curve in curves.items()}
    (folder / CALIBRATION).write_text(json.dumps({"num_edits": num_edits, "curves": known}, indent=1) + "\n")


def load_curves(folder: Path) -> dict[str, Curve]:
    """Read ``calibration.json``; empty where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())["curves"]
        return {name: Curve(tuple(curve["x"]), tuple(curve["y"])) for name, curve in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected calibration curves, got a damaged file ({error})") from error


def _joined(first: tuple[float, float, int], second: tuple[float, float, int]) -> tuple[float, float, int]:
    count = first[2] + second[2]
    x, y = ((first[i] * first[2] + second[i] * second[2]) / count for i in (0, 1))
    return x, y, count
