"""What a judge's server can do: its models, one judgement, the readouts that work on it, and how fast it answers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rewards.base import Images, Prompt, Reward, Values
from rewards.cache import Cached
from rewards.compose import WeightedSum
from rewards.judges.client import JudgeClient
from rewards.judges.counters import Statistics
from rewards.judges.faults import REFUSED_ALONE, Fault, JudgeConfigurationError
from rewards.judges.judge import VLMJudge
from rewards.judges.readouts import LabelReadout
from rewards.judges.settings import ClientSettings, JudgeSettings
from rewards.judges.templates import load_template
from rewards.judges.viescore import VIEScore
from rewards.names import nearest
from rewards.questions import QuestionGraph
from rewards.scoring import score

TEMPLATES = {
    "digits": "edit_following.v1",
    "yes_no": "yes_no.v1",
    "rubric": "viescore_sc.v1",
    "pairwise": "pairwise_edit.v1",
}
"""One for each readout; the pairwise one shows three images, the most that a template of ours does."""
BY_ID, BY_TEXT = "by id", "by text"
_GROUP = 8
"""Samples of a prompt, which share its source image."""
_BLOCK = 8
"""Side of the squares that test pictures are made of: noise of single pixels compresses like no picture does."""


@dataclass(frozen=True)
class ReadoutReport:
    """How one readout does on a server.

    Attributes:
        readout: "digits", "yes_no", "rubric" or "pairwise".
        available: share of the images that got a reward.
        label_mass: mean over the images; NaN for a rubric and where there are no log-probabilities.
        reason: why an image got none; empty where all did.
        labels: "by id": the server's tokenizer has a single token for each; "by text": it cannot be asked; else why
            they are no labels for this model.
    """

    readout: str
    available: float
    label_mass: float
    reason: str
    labels: str = ""

    @property
    def works(self) -> bool:
        """Whether every image got a reward."""
        return self.available == 1


@dataclass(frozen=True)
class Load:
    """Digit judgements with so many calls in flight.

    Attributes:
        concurrency: calls in flight.
        seconds: that all of them took.
        statistics: of the client.
    """

    concurrency: int
    seconds: float
    statistics: Statistics

    @property
    def calls_per_second(self) -> float:
        """Calls that were answered, by the time that all took."""
        answered = self.statistics.calls - sum(self.statistics.failures.values())
        return answered / self.seconds


def served_model(client: JudgeClient, model: str = "") -> str:
    """The name of the model to ask: the given one, or the first that the client's first server has.

    Raises:
        ValueError: the server does not answer, or does not have the model.
    """
    url = client.base_urls[0]
    found = asyncio.run(client.served_models())[url]
    if isinstance(found, str):
        raise ValueError(
            f"{url}: expected a judge that answers, got none: {found}; start one with: pdtr judge serve MODEL"
        )
    if not found:
        raise ValueError(f"{url}: expected a server that lists its models, got one without any; check the base URL")
    if model and model not in found:
        raise ValueError(
            f"{url}: expected one of its models, {', '.join(found)}, got {model!r}; "
            f"the nearest is {nearest(model, found)!r}"
        )
    return model or found[0]


def judges_of(reward: Reward) -> list[VLMJudge]:
    """The judges that a reward asks: itself, or those of its parts."""
    if isinstance(reward, VLMJudge):
        return [reward]
    parts: Sequence[Reward] = ()
    if isinstance(reward, Cached):
        parts = [reward.reward]
    elif isinstance(reward, WeightedSum):
        parts = [*reward.rewards.values(), *reward.held_out.values()]
    elif isinstance(reward, VIEScore):
        parts = reward.judges
    elif isinstance(reward, QuestionGraph):
        parts = [reward.judge]
    return [judge for part in parts for judge in judges_of(part)]


def try_out(judge: VLMJudge, num_sources: int = 1) -> None:
    """Ask every server for one real judgement.

    Args:
        judge: who is asked.
        num_sources: source images of the prompt, where the judge's template shows any.

    Raises:
        ValueError: a server gives none.
    """
    shown = f" with {num_sources} source images" if num_sources > 1 else ""
    try:
        found = asyncio.run(judge.warm_up(num_sources=num_sources))
    except JudgeConfigurationError as refusal:
        if num_sources == 1 or refusal.status not in REFUSED_ALONE:
            raise
        count = judge.template.num_pictures(num_sources)
        fix = f"its requests have {count} pictures{shown}: pdtr judge serve MODEL --max-images {count}"
        raise JudgeConfigurationError(f"{refusal}; {fix}", refusal.status) from refusal
    for url, reading in found.items():
        if reading.reason:
            raise ValueError(
                f"{url}: expected {judge.model} to judge by {judge.template.name}{shown}, got none: {reading.reason}"
            )


def check_readout(
    client: JudgeClient, model: str, readout: str, settings: JudgeSettings, images: Images
) -> ReadoutReport:
    """Judge images uint8 [B, H, W, 3] of one group by a readout; a server that refuses it is a report, no error."""
    template = load_template(TEMPLATES[readout])
    prompts = [Prompt("a red circle left of a blue square", (images[0],))] * len(images)
    labels = _labels(VLMJudge(client, model, template, settings))
    judge = VLMJudge(client, model, template, replace(settings, token_ids=labels == BY_ID))
    try:
        scores = score(judge, images, prompts)
    except JudgeConfigurationError as refusal:
        return ReadoutReport(readout, 0.0, math.nan, str(refusal), labels)
    mass = scores.components.get("label_mass", np.full(len(images), np.nan))
    reason = next(iter(scores.reasons.values()), "")
    return ReadoutReport(readout, float(np.mean(~np.isnan(scores.total))), _mean(mass), reason, labels)


def measure(url: str, model: str, client_settings: ClientSettings, settings: JudgeSettings, images: Images) -> Load:
    """Judge images uint8 [B, H, W, 3] by digits, as many at a time as the client's settings say.

    Raises:
        JudgeConfigurationError: the server refuses such requests.
    """
    sources = [images[start] for start in range(0, len(images), _GROUP)]
    # A source of its own for each group, different from every sample.
    prompts = [Prompt("make the red circle blue", (255 - source,)) for source in sources]
    with JudgeClient(url, client_settings) as client:
        judge = VLMJudge(client, model, TEMPLATES["digits"], settings)
        started = time.perf_counter()
        score(judge, images, [prompts[index // _GROUP] for index in range(len(images))])
        return Load(client_settings.max_in_flight, time.perf_counter() - started, client.statistics())


def pictures(count: int, side: int, seed: int) -> Images:
    """Different pictures of coloured squares, uint8 [count, side, side, 3]."""
    cells = math.ceil(side / _BLOCK)
    coarse = np.random.default_rng(seed).integers(0, 256, (count, cells, cells, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(_BLOCK, axis=1).repeat(_BLOCK, axis=2)[:, :side, :side])


def summed(statistics: Sequence[Statistics]) -> dict[str, float]:
    """The counters of several clients together, by the names of :meth:`Statistics.metrics`; times are left out."""
    total: dict[str, float] = {}
    for entry in statistics:
        for name, value in entry.metrics().items():
            if not name.endswith("_seconds"):
                total[name] = total.get(name, 0.0) + value
    return total


def _labels(judge: VLMJudge) -> str:
    """Under which names the labels can be read; empty for a rubric, which has none."""
    if not isinstance(judge.template.readout, LabelReadout) or judge.settings.read == "answer":
        return ""
    try:
        asyncio.run(judge.check_labels())
    except Fault as fault:
        return f"{BY_TEXT}: {fault}"
    except JudgeConfigurationError as refusal:
        # 404 and 405: there is no /tokenize, which only vLLM has. Else the labels were found to be none.
        return BY_TEXT if refusal.status in (404, 405) else str(refusal)
    return BY_ID


def _mean(values: Values) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan
