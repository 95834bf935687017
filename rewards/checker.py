"""Does a callable keep the reward contract?"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from rewards.base import Images, Prompt, Reward, Scores, Values, reward_name, reward_traits
from rewards.scoring import call_spans, join_scores, score


def check_reward(reward: Reward, images: Images, prompts: Sequence[Prompt]) -> None:
    """Check that a callable keeps the reward contract on a batch of at least two samples that it can judge.

    Shape (by :func:`rewards.scoring.score`), an answer for at least one image, the inputs left as they were (images,
    source images, metadata), the same answer twice, and no dependence on the order of the batch or on its size, for
    the total and for every component; float32 for both, and a reason for every NaN of the total. A reward of group
    scope may depend on what is in its group (entries that share their :class:`Prompt` object), not on the other groups.

    ``score`` would convert other numbers to float32 and make up a reason: a run goes on with them, but differences that
    float32 does not hold are lost, and nobody learns why a reward was missing.

    Raises:
        ValueError: a property does not hold; the message says which and what to mend.
    """
    if len(images) < 2:
        raise ValueError(f"check_reward: expected at least two images, got {len(images)}")
    watched, name = _Watched(reward), reward_name(reward)
    first = watched.scores(images, prompts)
    if np.isnan(first.total).all():
        raise ValueError(
            f"{name}: has no reward for any of the images ({first.reasons[0]}); check it on some that it can judge"
        )
    unit = "image" if watched.traits.scope == "sample" else "group"
    again = watched.scores(images, prompts)
    _check_same(first, again, f"{name}: gave another answer for the same batch; seed it or lower its temperature")
    turned = watched.scores(images[::-1].copy(), list(prompts)[::-1])
    turned = Scores(turned.total[::-1], {part: values[::-1] for part, values in turned.components.items()})
    _check_same(first, turned, f"{name}: depends on the order of the batch; score every {unit} by itself")
    spans = call_spans(replace(watched.traits, batch_size=1), prompts)
    parts = join_scores([watched.scores(images[start:stop], prompts[start:stop]) for start, stop in spans])
    _check_same(first, parts, f"{name}: depends on the size of the batch; score every {unit} by itself")
    for asked, answer in watched.answers:
        _check_form(name, asked, answer)


class _Watched:
    """A reward whose inputs are compared before and after, and whose answers are kept as it gave them."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.__name__ = reward_name(reward)
        self.traits = reward_traits(reward)
        self.answers: list[tuple[Sequence[Prompt], Values | Scores]] = []

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Values | Scores | Awaitable[Values | Scores]:
        answer = self._reward(images, prompts)
        return self._awaited(prompts, answer) if inspect.isawaitable(answer) else self._kept(prompts, answer)

    def scores(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """The reward's answers by ``score``, once it is sure that the inputs are as they were."""
        before = _inputs(images, prompts)
        scores = score(self, images, prompts)
        for (what, value), (_, now) in zip(before, _inputs(images, prompts), strict=True):
            if now != value:
                raise ValueError(f"{self.__name__}: changed {what} it was given; work on a copy")
        return scores

    async def _awaited(self, prompts: Sequence[Prompt], answer: Awaitable[Values | Scores]) -> Values | Scores:
        return self._kept(prompts, await answer)

    def _kept(self, prompts: Sequence[Prompt], answer: Values | Scores) -> Values | Scores:
        self.answers.append((prompts, answer))
        return answer


def _inputs(images: Images, prompts: Sequence[Prompt]) -> list[tuple[str, object]]:
    """What a reward is given, each by its name for messages."""
    inputs = [("the images", _plain(images))]
    for prompt in prompts:
        inputs.append((f"the source images of {_named(prompt)}", _plain(prompt.source_images)))
        inputs.append((f"the metadata of {_named(prompt)}", _plain(prompt.metadata)))
    return inputs


def _plain(value: object) -> object:
    """A value as what can be compared with itself later: containers by their content, all else by how it is shown."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return repr(value)


def _check_same(first: Scores, second: Scores, message: str) -> None:
    absent = np.full(len(first.total), np.nan, np.float32)
    pairs = {"": (first.total, second.total)}
    for name in {**first.components, **second.components}:
        pair = first.components.get(name, absent), second.components.get(name, absent)
        pairs[f"component {name!r}, "] = pair
    for part, (one, other) in pairs.items():
        agree = np.isclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
        if not agree.all():
            # A difference that is NaN is of a reward that is there once only.
            differences = np.nan_to_num(np.abs(one - other), nan=np.inf)
            worst = int(np.where(agree, -1, differences).argmax())
            raise ValueError(f"{message} ({part}image {worst}: {one[worst]} against {other[worst]})")


def _check_form(name: str, prompts: Sequence[Prompt], answer: Values | Scores) -> None:
    """Raise a ValueError where an answer is not of float32, or has a NaN without a reason."""
    scores = answer if isinstance(answer, Scores) else Scores(answer)
    parts = [("total", scores.total), *((f"component {key!r}", values) for key, values in scores.components.items())]
    for part, values in parts:
        dtype = np.asarray(values).dtype
        if dtype != np.float32:
            raise ValueError(f"{name}: expected its {part} in float32, got {dtype}; return np.asarray(..., np.float32)")
    for index in map(int, np.flatnonzero(np.isnan(scores.total))):
        if not scores.reasons.get(index):
            raise ValueError(
                f"{name}: gave NaN without a reason for {_named(prompts[index])}; return Scores(total, "
                "reasons={index: why}), or raise Unavailable(why) where nothing of a call has a reward"
            )


def _named(prompt: Prompt) -> str:
    return f"prompt {prompt.id or repr(prompt.text):.80}"
