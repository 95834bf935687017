"""DrawBench (Imagen, arXiv:2205.11487): 200 prompts, by preference models that were not trained on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pdtr.benchmarks.base import Benchmark, Item, Metric, Scorer
from pdtr.benchmarks.layouts import SampleFolders

if TYPE_CHECKING:
    from rewards.base import Images, Prompt, Reward, Scores

PUBLISHED = 200
PUBLISHED_NAMES = ("pickscore", "hps", "imagereward", "aesthetic", "clip")
"""Scorers in the order of the tables."""


def load_drawbench(path: Path, scorers: Sequence[str]) -> Benchmark:
    """DrawBench over a file with a prompt a line; one that comes again (files have each five times) counts once.

    Args:
        path: the file.
        scorers: names of the preference models, which are the metrics; the first gives the benchmark's number.

    Raises:
        ValueError: there is no such file or no prompt in it, or no scorer.
    """
    from envs.prompts import load_prompts

    if not scorers:
        raise ValueError(f"scorers: expected one or more of {', '.join(PUBLISHED_NAMES)}, got none")
    loaded = load_prompts(path)
    texts = list(dict.fromkeys(prompt.text for prompt in loaded.prompts))
    found = len(texts)
    return Benchmark(
        name="drawbench",
        title="DrawBench (arXiv:2205.11487)",
        items=tuple(Item(i, f"{i:05d}", text, metadata={"tag": "drawbench"}) for i, text in enumerate(texts)),
        samples=1,
        layout=SampleFolders(),
        metrics=tuple(Metric(name, name) for name in scorers),
        average="prompts",
        problems=tuple(map(str, loaded.problems)),
        deviations=() if found == PUBLISHED else (f"{found} prompts, published {PUBLISHED}",),
    )


class Panel:
    """Several rewards of the same images, side by side: a component each, and nothing is summed.

    The total is the first one's. A reward that fails leaves the others as they are.

    Args:
        rewards: by name.
    """

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        from rewards.base import RewardTraits, reward_name, reward_traits

        self.rewards = dict(rewards)
        facts = {name: [reward_name(r), reward_traits(r).fingerprint] for name, r in self.rewards.items()}
        self.traits = RewardTraits(fingerprint=json.dumps(facts, sort_keys=True))

    async def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] by each."""
        from rewards.base import Scores
        from rewards.scoring import score_async

        found = await asyncio.gather(*(score_async(reward, images, prompts) for reward in self.rewards.values()))
        scores = dict(zip(self.rewards, found, strict=True))
        reasons: dict[int, str] = {}
        for row in range(len(images)):
            told = [f"{name}: {part.reasons[row]}" for name, part in scores.items() if np.isnan(part.total[row])]
            reasons |= {row: "; ".join(told)} if told else {}
        return Scores(found[0].total, {name: part.total for name, part in scores.items()}, reasons)


def panel_scorer(rewards: Mapping[str, Reward], facts: Mapping[str, str], deviations: Sequence[str] = ()) -> Scorer:
    """Preference models side by side.

    Args:
        rewards: by name.
        facts: which weights each has.
        deviations: which of them are not the published ones.
    """
    return Scorer(Panel(rewards), dict(facts), tuple(deviations), 16)
