"""Edits for tests of learnt edit rewards: their brightness is their total."""

from __future__ import annotations

import numpy as np

from rewards.edit_reward_data import ScoredEdit


def edit(prompt: int, sample: int, total: float) -> ScoredEdit:
    """An edit whose brightness is its total, so that there is something to learn."""
    noise = np.random.default_rng((prompt, sample)).integers(0, 40, (48, 48, 3))
    image = (noise + 200 * total).astype(np.uint8)
    scores = {"success": total, "preservation": 1.0, "total": total}
    source = np.full((48, 48, 3), 128, np.uint8)
    return ScoredEdit(
        f"{prompt}#{sample}", str(prompt), "make the circle red", source, image, scores, "recolor", {"n": 1}
    )


def edits(num_prompts: int, num_samples: int = 4) -> list[ScoredEdit]:
    """The edits of so many prompts, those of one side by side."""
    rng = np.random.default_rng(0)
    return [edit(p, s, float(rng.random())) for p in range(num_prompts) for s in range(num_samples)]
