"""VIEScore as a reward: two judges, one for what the edit did and one for how well the image is made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import numpy as np

from rewards.base import Images, Prompt, RewardTraits, Scores
from rewards.judges.judge import VLMJudge
from rewards.judges.readouts import Reading
from rewards.judges.rubrics import viescore


class VIEScore:
    """sqrt(SC * PQ) in [0, 1], for every sample; NaN where either judge has none. VIEScore (arXiv:2312.14867).

    Components: ``consistency`` (SC), ``quality`` (PQ) and the dimensions of both as ``consistency/NAME`` and
    ``quality/NAME``.

    Args:
        consistency: usually with the template ``viescore_sc.v1``.
        quality: usually with ``viescore_pq.v1``.

    Raises:
        ValueError: a judge that compares pairs.
    """

    def __init__(self, consistency: VLMJudge, quality: VLMJudge) -> None:
        self._judges = {"consistency": consistency, "quality": quality}
        for name, judge in self._judges.items():
            if judge.template.is_pairwise:
                raise ValueError(f"{name}: expected a judge of single images, got the template {judge.template.name}")
        fingerprints = {name: judge.traits.fingerprint for name, judge in self._judges.items()}
        self.traits = RewardTraits(fingerprint=json.dumps(fingerprints, sort_keys=True))

    async def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Judge images uint8 [B, H, W, 3], one prompt each; raises as :class:`VLMJudge` does."""
        found = await asyncio.gather(*(judge(images, prompts) for judge in self._judges.values()))
        scores = dict(zip(self._judges, found, strict=True))
        consistency, quality = (scores[name].total.tolist() for name in ("consistency", "quality"))
        total = [viescore(sc, pq) for sc, pq in zip(consistency, quality, strict=True)]
        components = {name: part.total for name, part in scores.items()}
        for name, part in scores.items():
            components |= {f"{name}/{dimension}": values for dimension, values in part.components.items()}
        reasons: dict[int, str] = {}
        for index in range(len(total)):
            told = [f"{name}: {part.reasons[index]}" for name, part in scores.items() if index in part.reasons]
            reasons |= {index: "; ".join(told)} if told else {}
        return Scores(np.array(total, np.float32), components, reasons)

    @property
    def judges(self) -> tuple[VLMJudge, ...]:
        """The judge of consistency, then that of quality."""
        return tuple(self._judges.values())

    async def warm_up(self) -> dict[str, Reading]:
        """Send both judges' servers a real request each; by judge and base URL, what :meth:`VLMJudge.warm_up` reads."""
        found = await asyncio.gather(*(judge.warm_up() for judge in self._judges.values()))
        return {
            f"{name}/{url}": reading
            for name, readings in zip(self._judges, found, strict=True)
            for url, reading in readings.items()
        }

    def statistics(self) -> dict[str, float]:
        """What both judges have counted, each behind its name and a slash; judges of one client share its counts."""
        return {
            f"{name}/{part}": value
            for name, judge in self._judges.items()
            for part, value in judge.statistics().items()
        }
