"""A vision-language model as a reward: a template, the readout that it names, and a client."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rewards.base import Images, Prompt, RewardTraits, Scores, Unavailable
from rewards.judges.calls import Outcome
from rewards.judges.client import JudgeClient
from rewards.judges.faults import Fault, JudgeConfigurationError
from rewards.judges.labels import check_label_settings, check_single_tokens, served_label_ids
from rewards.judges.messages import content_parts, data_url, missing_input, remembering, request_body
from rewards.judges.pairs import group_scores, ordered_pairs
from rewards.judges.readouts import (
    NAN,
    Answer,
    Keys,
    LabelReadout,
    Reading,
    Unreadable,
    first_token,
    id_keys,
    read_answered_label,
    read_label,
    text_keys,
)
from rewards.judges.rubrics import read_rubric
from rewards.judges.settings import JudgeSettings
from rewards.judges.templates import METADATA, Template, load_template

Encode = Callable[[Images], str]
_PROBE_SIDE = 64


class VLMJudge:
    """A reward in [0, 1] from a judge behind an OpenAI-compatible server.

    The template decides what is asked and how the answer is read. A pairwise template makes a reward of group scope,
    the win rates within a group: G (G - 1) calls. Where a call fails or its answer cannot be read the image's reward is
    NaN, with a reason, and of pairs where too many are lost; only a mistake in the configuration ends a run.

    Components: ``label_mass`` (labels), the dimensions unscaled (rubrics), ``order_agreement``, ``missing_pairs`` and
    ``label_mass`` (pairs).

    Args:
        client: the servers; judges may share it, and whoever made it closes it.
        model: the name under which the servers serve the judge.
        template: one of :func:`rewards.judges.templates.template_names`, a path, or a template.
        settings: how it is asked.

    Raises:
        ValueError: no such template, settings that do not go with its readout, or, not read by ids, labels of which one
            begins with another.
    """

    def __init__(
        self, client: JudgeClient, model: str, template: str | Path | Template, settings: JudgeSettings | None = None
    ) -> None:
        if not model.strip():
            raise ValueError(f"model: expected the name of a served model, got {model!r}")
        self.client = client
        self.model = model
        self.template = template if isinstance(template, Template) else load_template(template)
        self.settings = settings or JudgeSettings()
        check_label_settings(self.template, self.settings)
        self._keys = self._text_keys()
        self.traits = RewardTraits(
            scope="group" if self.template.is_pairwise else "sample",
            concurrency=self.settings.group_concurrency if self.template.is_pairwise else 1,
            fingerprint=self._fingerprint(),
        )

    async def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Judge images uint8 [B, H, W, 3], one prompt each; a pairwise judge wants one group, of one prompt.

        Raises:
            Unavailable: the labels' ids were asked for, and no server answered.
            JudgeConfigurationError: a server refuses such requests.
            ValueError: a pairwise judge got more than one prompt.
        """
        keys = await self._label_keys()
        if self.template.is_pairwise:
            return await self._compare(images, prompts, keys)
        sources = remembering(self._encoded)
        missing = [missing_input(self.template, prompt) for prompt in prompts]
        asked = [index for index, reason in enumerate(missing) if not reason]
        outcomes = await self.client.ask(
            [partial(self._sample_body, images[index], prompts[index], sources) for index in asked]
        )
        readings = {index: self._read(outcome, keys) for index, outcome in zip(asked, outcomes, strict=True)}
        return sample_scores([readings.get(index, Reading(NAN, {}, reason)) for index, reason in enumerate(missing)])

    async def check_labels(self) -> dict[str, tuple[int, ...]]:
        """The ids of the labels, from the served tokenizer; a rubric has none.

        Raises:
            JudgeConfigurationError: a label is no single token, or the server has no ``/tokenize``.
            Fault: the server did not answer.
        """
        readout = self.template.readout
        if not isinstance(readout, LabelReadout):
            return {}
        return dict(await served_label_ids(self.client, self.model, readout))

    async def warm_up(self, check_tokens: bool = True, num_sources: int = 1) -> dict[str, Reading]:
        """Send one real request, of grey images, to every server; call it before training.

        Args:
            check_tokens: also check that the labels are single tokens, where a server answered and has ``/tokenize``.
            num_sources: source images of the request, where the template shows any.

        Returns:
            By base URL, what was read, or NaN with the reason.

        Raises:
            JudgeConfigurationError: a server refuses the request, or gives no log-probabilities; or a label is no
                single token.
            Unavailable: the labels' ids were asked for, and no server answered.
        """
        keys = await self._label_keys()
        answers = await self.client.warm_up(self._probe(num_sources))
        readings = {}
        for url, answer in answers.items():
            outcome = Outcome(None, answer) if isinstance(answer, str) else Outcome(answer)
            if outcome.answer is not None:
                self._check_logprobs(outcome.answer, url)
            readings[url] = self._read(outcome, keys)
        if check_tokens and any(not isinstance(answer, str) for answer in answers.values()):
            await self._check_tokens()
        return readings

    def statistics(self) -> dict[str, float]:
        """The client's counts since it was made, those of other judges that share it included."""
        return self.client.statistics().metrics()

    async def _compare(self, images: Images, prompts: Sequence[Prompt], keys: Keys) -> Scores:
        if any(prompt is not prompts[0] for prompt in prompts):
            raise ValueError(
                "a pairwise judge: expected one group, all of one prompt; call it by rewards.scoring.score"
            )
        count = len(images)
        if count and (reason := missing_input(self.template, prompts[0])):
            return sample_scores([Reading(NAN, {}, reason)] * count)
        encoded = remembering(self._encoded)
        # A slice of an array is a new object each time; the encoder knows an image by its object.
        pictures = list(images)
        pairs = ordered_pairs(count)
        outcomes = await self.client.ask(
            [partial(self._pair_body, pictures[i], pictures[j], prompts[0], encoded) for i, j in pairs]
        )
        readings = [self._read(outcome, keys) for outcome in outcomes]
        return group_scores(dict(zip(pairs, readings, strict=True)), count, self.settings.max_missing_pairs)

    def _sample_body(self, image: Images, prompt: Prompt, sources: Encode) -> dict[str, Any]:
        return self._body(prompt, {"source": prompt.source_images, "image": (image,)}, sources)

    def _pair_body(self, first: Images, second: Images, prompt: Prompt, encoded: Encode) -> dict[str, Any]:
        return self._body(prompt, {"source": prompt.source_images, "first": (first,), "second": (second,)}, encoded)

    def _body(self, prompt: Prompt, images: dict[str, Sequence[Images]], shared: Encode) -> dict[str, Any]:
        # The judged image of a sample is in one request only: it is not worth remembering.
        encoders = {"image": self._encoded}
        urls = {
            name: [encoders.get(name, shared)(image) for image in images[name]]
            for name in self.template.placeholders
            if name in images
        }
        parts = content_parts(self.template, prompt, urls)
        return request_body(self.model, self.template.readout, self.settings, parts)

    def _probe(self, num_sources: int) -> dict[str, Any]:
        grey = np.full((_PROBE_SIDE, _PROBE_SIDE, 3), 128, np.uint8)
        names = (name.removeprefix(METADATA) for name in self.template.placeholders if name.startswith(METADATA))
        prompt = Prompt("a plain grey picture", (grey,) * num_sources, dict.fromkeys(names, "none"))
        if self.template.is_pairwise:
            return self._pair_body(grey, grey, prompt, self._encoded)
        return self._sample_body(grey, prompt, self._encoded)

    def _encoded(self, image: Images) -> str:
        return data_url(image, self.settings.long_side)

    def _read(self, outcome: Outcome, keys: Keys) -> Reading:
        readout, answer = self.template.readout, outcome.answer
        if answer is None:
            return Reading(NAN, {}, outcome.reason)
        if not isinstance(readout, LabelReadout):
            return read_rubric(answer, readout)
        if self.settings.read == "answer":
            return read_answered_label(answer, readout, keys)
        return read_label(answer, readout, keys, self.settings.min_label_mass)

    def _check_logprobs(self, answer: Answer, url: str) -> None:
        if not isinstance(self.template.readout, LabelReadout) or self.settings.read == "answer":
            return
        try:
            first_token(answer)
        except Unreadable as unreadable:
            raise JudgeConfigurationError(
                f"{url}: {unreadable}; set read='answer', or serve the judge with vLLM"
            ) from unreadable

    async def _check_tokens(self) -> None:
        readout, settings = self.template.readout, self.settings
        # Labels that are read by their ids have been checked with these.
        if isinstance(readout, LabelReadout) and settings.read == "probabilities" and not settings.token_ids:
            await check_single_tokens(self.client, self.model, readout)

    def _text_keys(self) -> Keys | None:
        readout = self.template.readout
        if not isinstance(readout, LabelReadout):
            return {}
        return None if self.settings.token_ids else text_keys(readout.labels)

    async def _label_keys(self) -> Keys:
        if self._keys is None:
            try:
                self._keys = id_keys(await self.check_labels())
            except Fault as fault:
                raise Unavailable(f"the labels' ids are not known: {fault}") from fault
        return self._keys

    def _fingerprint(self) -> str:
        template = {"name": self.template.name, "sha256": self.template.sha256}
        parts = {"model": self.model, "template": template, "readout": self.template.readout.kind}
        return json.dumps({**parts, **self.settings.fingerprint()}, sort_keys=True)


def sample_scores(readings: Sequence[Reading]) -> Scores:
    """Readings as scores: a component that a reading lacks is NaN there."""
    names = dict.fromkeys(name for reading in readings for name in reading.components)
    return Scores(
        np.array([reading.value for reading in readings], np.float32),
        {name: np.array([r.components.get(name, NAN) for r in readings], np.float32) for name in names},
        {index: reading.reason for index, reading in enumerate(readings) if reading.reason},
    )
