"""A prompt as a graph of yes-or-no questions, as DPG-Bench asks them: a detail counts only if what it is of is there.

Hu et al., ELLA, arXiv:2403.05135; Cho et al., Davidsonian Scene Graph, arXiv:2310.18235. The rule is a pure function of
the answers; :class:`QuestionGraph` asks a judge for them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.base import Images, Prompt, RewardTraits, Scores

if TYPE_CHECKING:
    from rewards.judges.judge import VLMJudge
    from rewards.judges.readouts import Reading

NAN = math.nan
NO_PARENT = 0
QUESTIONS = "questions"
PREFIX = "question/"
"""Of a component's name; the question's id follows."""
QUESTION_TEMPLATE = """readout: yes_no
labels: yes no
---
You are given a question about a picture, and then the picture. Answer from what can be seen in the picture alone.
Answer with one word, yes or no, and nothing else.

Question: {prompt}

Picture: {image}"""


@dataclass(frozen=True)
class Question:
    """One question of a prompt's graph.

    Attributes:
        id: a number of 1 or more, its own within the prompt.
        text: the question.
        parents: ids of the questions that have to be answered yes for this one to count; 0 is none.
        category: what it is about, such as "entity"; for reports.
    """

    id: int
    text: str
    parents: tuple[int, ...] = ()
    category: str = ""


def check_graph(questions: Sequence[Question]) -> None:
    """Check that parents exist and lead back to none of their children.

    Raises:
        ValueError: no question, two of one id, an unknown parent, or a circle.
    """
    ids = [question.id for question in questions]
    if not ids or len(set(ids)) < len(ids) or min(ids) < 1:
        raise ValueError(f"questions: expected one or more of different ids from 1 on, got {ids}")
    parents = {question.id: _parents(question) for question in questions}
    unknown = sorted({parent for named in parents.values() for parent in named} - set(ids))
    if unknown:
        raise ValueError(f"questions: expected parents among {ids}, got {unknown[0]}")
    free: set[int] = set()
    while len(free) < len(ids):
        more = {name for name, named in parents.items() if name not in free and free.issuperset(named)}
        if not more:
            raise ValueError(f"questions: expected no circle of parents, got one among {sorted(set(ids) - free)}")
        free |= more


def counted(answers: Mapping[int, float], questions: Sequence[Question]) -> dict[int, float]:
    """What each question counts: 1 if it and all that it hangs on are answered yes, 0 if one of them is answered no.

    Where no answer is no but one is not available (absent, or NaN) it is NaN.

    Differs: the published code zeroes children in the order of the file, so that a grandchild is zeroed only where its
    parent stands before it; here it always is.

    Args:
        answers: 1 (yes), 0 (no) or NaN, by question.
        questions: a graph that :func:`check_graph` passes.
    """
    by_id = {question.id: question for question in questions}
    found: dict[int, float] = {}

    def count(name: int) -> float:
        if name not in found:
            needed = [answers.get(name, NAN), *(count(parent) for parent in _parents(by_id[name]))]
            missing = any(math.isnan(value) for value in needed)
            found[name] = 0.0 if 0.0 in needed else NAN if missing else 1.0
        return found[name]

    return {question.id: count(question.id) for question in questions}


def graph_score(answers: Mapping[int, float], questions: Sequence[Question]) -> float:
    """The share of questions that count; NaN unless what each counts is known, whatever is not answered.

    A question below one that is answered no counts 0 without an answer of its own. A share of what is known would be
    made up: one yes of three questions would be 1.

    DPG-Bench's published code, whose judge always answers, has the same share. Where an answer is missing it has no
    rule: an image of ``pdtr.benchmarks.dpg`` has no score then, and is counted as missing.
    """
    counts = counted(answers, questions).values()
    return math.fsum(counts) / len(counts)


def questions_of(metadata: Mapping[str, Any]) -> tuple[Question, ...]:
    """The graph in a prompt's metadata: a list of objects with ``id``, ``text``, ``parents`` and ``category``.

    Raises:
        ValueError: there is none, or it is not such.
    """
    entries = metadata.get(QUESTIONS)
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(
            f"questions: expected a list under {QUESTIONS!r}, got the keys {', '.join(list(metadata)[:8])}"
        )
    try:
        found = tuple(Question(**{**entry, "parents": tuple(entry.get("parents", ()))}) for entry in entries)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"questions: expected objects with id, text, parents and category ({error})") from error
    check_graph(found)
    return found


class QuestionGraph:
    """The share of a prompt's questions that count, in [0, 1], by a judge that answers yes or no.

    Components: ``question/ID``, each question's own answer, 1 or 0, whether it counts or not. An answer is yes where
    P(yes) is above P(no). Where a question lacks the answer that its count depends on the share is NaN; every missing
    answer is in the image's reason, also where the share is known without it.

    Args:
        judge: of single images, with a yes_no template whose ``{prompt}`` is the question.

    Raises:
        ValueError: the judge's template has another readout.
    """

    def __init__(self, judge: VLMJudge) -> None:
        if judge.template.readout.kind != "yes_no":
            raise ValueError(
                f"judge: expected a yes_no template, got {judge.template.name} with {judge.template.readout.kind}"
            )
        self.judge = judge
        self.traits = RewardTraits(fingerprint=judge.traits.fingerprint)

    async def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Judge images uint8 [B, H, W, 3] by the questions in their prompts' metadata; raises as the judge does."""
        graphs, errors = _graphs(prompts)
        rows = [row for row in range(len(images)) if row in graphs]
        found = await asyncio.gather(*(self._answers(images[row], graphs[row]) for row in rows))
        total, reasons = np.full(len(images), np.nan, np.float32), dict(errors)
        names = dict.fromkeys(question.id for graph in graphs.values() for question in graph)
        components = {name: np.full(len(images), np.nan, np.float32) for name in names}
        for row, (answers, why) in zip(rows, found, strict=True):
            total[row] = graph_score(answers, graphs[row])
            for name, answer in answers.items():
                components[name][row] = answer
            missing = sum(math.isnan(answer) for answer in answers.values())
            reasons |= {row: f"{missing} of {len(answers)} questions have no answer: {why}"} if missing else {}
        return Scores(total, {f"{PREFIX}{name}": values for name, values in components.items()}, reasons)

    async def warm_up(self) -> dict[str, Reading]:
        """Send the judge's servers a real request each; see :meth:`VLMJudge.warm_up`."""
        return await self.judge.warm_up()

    def statistics(self) -> dict[str, float]:
        """What the judge has counted."""
        return self.judge.statistics()

    async def _answers(self, image: Images, questions: Sequence[Question]) -> tuple[dict[int, float], str]:
        # A view: the image is not copied for every question.
        repeated = np.broadcast_to(image, (len(questions), *image.shape))
        scores = await self.judge(repeated, [Prompt(question.text) for question in questions])
        answers = [NAN if math.isnan(p) else float(p > 0.5) for p in scores.total.tolist()]
        return dict(zip((question.id for question in questions), answers, strict=True)), next(
            iter(scores.reasons.values()), ""
        )


def _graphs(prompts: Sequence[Prompt]) -> tuple[dict[int, tuple[Question, ...]], dict[int, str]]:
    graphs, errors = {}, {}
    for row, prompt in enumerate(prompts):
        try:
            graphs[row] = questions_of(prompt.metadata)
        except ValueError as error:
            errors[row] = str(error)
    return graphs, errors


def _parents(question: Question) -> tuple[int, ...]:
    return tuple(parent for parent in question.parents if parent != NO_PARENT)
