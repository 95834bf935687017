"""From a chat-completions answer to a number: the probabilities of labels at the first generated token.

Reading the expected score off the logits agrees with people more often than a sampled score or one after a chain of
thought (UniWorld-V2 / Edit-R1, arXiv:2510.16888, Table 4). Everything here is a pure function of one answer, the dict
that a server sends, and nothing is made up: what cannot be read is NaN, with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

NAN = math.nan
TOKEN_ID = "token_id:"
"""What vLLM's ``return_tokens_as_token_ids`` puts before an id in place of a token's text."""
_SPACES = ("", " ", "▁", "Ġ")
"""Nothing, a space, and how SentencePiece and byte-level BPE write one."""

Answer = Mapping[str, Any]
Keys = Mapping[str, frozenset[str]]
"""By label: the names under which its tokens may stand in an answer."""


class Unreadable(Exception):
    """An answer that holds no judgement; the message is the reason."""


@dataclass(frozen=True)
class Reading:
    """What one answer says.

    Attributes:
        value: the judgement in [0, 1]; NaN means not available.
        components: its named parts.
        reason: why the value is NaN; empty otherwise.
    """

    value: float
    components: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class LabelReadout:
    """Labels, each a single token of the judge, and what each is worth.

    Attributes:
        kind: "digits" (a scale), "yes_no" (the first label is yes) or "pairwise" (the first label: the first image).
        labels: at least two different words without spaces.
        worth: the value of each, in [0, 1]; its largest is 1.

    Raises:
        ValueError: fewer than two labels, two that are equal, or a worth outside [0, 1].
    """

    kind: str
    labels: tuple[str, ...]
    worth: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_labels(self.labels)
        if len(self.worth) != len(self.labels):
            raise ValueError(f"worth: expected {len(self.labels)} numbers, one a label, got {len(self.worth)}")
        if not all(0 <= worth <= 1 for worth in self.worth) or max(self.worth) != 1:
            raise ValueError(f"worth: expected numbers in [0, 1] with 1 the largest, got {list(self.worth)}")


def digits(labels: Sequence[str] = ("0", "1", "2", "3", "4", "5")) -> LabelReadout:
    """A scale: label k is worth k / max, so that the reward is sum_k p_k k / max.

    Raises:
        ValueError: a label that is no number of 0 or more, or none above 0.
    """
    numbers = [int(label) if label.isascii() and label.isdigit() else -1 for label in labels]
    if not numbers or min(numbers) < 0 or max(numbers) == 0:
        raise ValueError(f"labels: expected digits such as 0 1 2 3 4 5, got {' '.join(labels)!r}")
    return LabelReadout("digits", tuple(labels), tuple(number / max(numbers) for number in numbers))


def yes_no(labels: Sequence[str] = ("yes", "no")) -> LabelReadout:
    """P(yes) / (P(yes) + P(no)), summed over surface forms. VQAScore (arXiv:2404.01291)."""
    return LabelReadout("yes_no", tuple(labels), (1.0, 0.0))


def pairwise(labels: Sequence[str] = ("A", "B")) -> LabelReadout:
    """P(the first image is better) = P(first) / (P(first) + P(second))."""
    return LabelReadout("pairwise", tuple(labels), (1.0, 0.0))


def surface_forms(label: str) -> tuple[str, ...]:
    """How a label may be written: as it is and, if it is a word, in the three usual cases; with a space or without.

    One letter has one case only: "a" as the first word of a sentence is no choice of A.
    """
    cases = (label, label.lower(), label.upper(), label.capitalize()) if len(label) > 1 else (label,)
    return tuple(dict.fromkeys(space + case for case in cases for space in _SPACES))


def text_keys(labels: Sequence[str]) -> Keys:
    """The keys of labels for a server that names tokens by their text."""
    return {label: frozenset(surface_forms(label)) for label in labels}


def id_keys(ids: Mapping[str, Sequence[int]]) -> Keys:
    """The keys of labels for a server that names tokens by their ids (``return_tokens_as_token_ids``)."""
    return {label: frozenset(f"{TOKEN_ID}{number}" for number in numbers) for label, numbers in ids.items()}


def message(answer: Answer) -> Mapping[str, Any]:
    """The first choice of an answer.

    Raises:
        Unreadable: it has none.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unreadable("the answer has no choices")
    return choices[0]


def content(answer: Answer) -> str:
    """The text of an answer.

    Raises:
        Unreadable: it has none.
    """
    said = message(answer).get("message")
    text = said.get("content") if isinstance(said, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise Unreadable("the answer has no text")
    return text


def first_token(answer: Answer) -> list[tuple[str, float]]:
    """(token, log-probability) of the most likely first tokens, the one that was drawn included.

    Raises:
        Unreadable: the answer has no log-probabilities, or one that is none.
    """
    logprobs = message(answer).get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], dict):
        raise Unreadable("the answer has no logprobs; the server does not give them, or did not for this request")
    top = tokens[0].get("top_logprobs")
    entries = [*(top if isinstance(top, list) else []), tokens[0]]
    # The drawn token stands in both places; two ids with one text differ in their log-probability.
    return list(dict.fromkeys(_token(entry) for entry in entries))


def label_probabilities(tokens: Sequence[tuple[str, float]], keys: Keys) -> dict[str, float]:
    """The probability of each label, summed over its keys; 0 for one that is not among the tokens.

    The sum over labels is the label mass: how much of what the model wanted to say was an answer at all.
    """
    return {
        label: math.fsum(math.exp(logprob) for token, logprob in tokens if token in names)
        for label, names in keys.items()
    }


def answered_label(answer: Answer, keys: Keys) -> dict[str, float]:
    """The label that an answer's text is, as probabilities 0 and 1: for servers without log-probabilities.

    Raises:
        Unreadable: the text is no label, punctuation around it aside.
    """
    text = content(answer).strip(" \t\r\n.,:;!\"'*()[]")
    probabilities = {label: float(text in names) for label, names in keys.items()}
    if sum(probabilities.values()) != 1:
        raise Unreadable(f"expected one of {', '.join(keys)}, got the text {shortened(text)}")
    return probabilities


def expectation(probabilities: Mapping[str, float], readout: LabelReadout, min_mass: float = 0.5) -> Reading:
    """sum_k p_k w_k over the labels, where p is renormalised over them: a softmax restricted to their logits.

    Args:
        probabilities: of each label, over the whole vocabulary.
        readout: the labels and what each is worth.
        min_mass: least label mass; below it the model was saying something else, and nothing is available.

    Returns:
        A reading with the component ``label_mass``.
    """
    mass = math.fsum(probabilities[label] for label in readout.labels)
    components = {"label_mass": mass}
    # Different tokens cannot exceed 1 together; a bit more is rounding.
    if mass > 1.01:
        return Reading(NAN, components, f"the labels have the probability {mass:.3g} together; expected at most 1")
    if mass < min_mass or mass == 0:
        labels = ", ".join(readout.labels)
        reason = f"label mass {mass:.3g} is below {min_mass:g}: the judge was saying something other than {labels}"
        return Reading(NAN, components, reason)
    pairs = zip(readout.labels, readout.worth, strict=True)
    value = math.fsum(probabilities[label] * worth for label, worth in pairs) / mass
    return Reading(min(value, 1.0), components)


def read_label(answer: Answer, readout: LabelReadout, keys: Keys, min_mass: float = 0.5) -> Reading:
    """Read a judgement off the log-probabilities of an answer's first token."""
    try:
        tokens = first_token(answer)
    except Unreadable as unreadable:
        return Reading(NAN, {}, str(unreadable))
    by_id = any(token.startswith(TOKEN_ID) for token, _ in tokens)
    if by_id and not any(name.startswith(TOKEN_ID) for names in keys.values() for name in names):
        return Reading(NAN, {}, "the server names tokens by their ids, and those of the labels were not asked for")
    reading = expectation(label_probabilities(tokens, keys), readout, min_mass)
    if not reading.reason:
        return reading
    likeliest = max(tokens, key=lambda token: token[1])[0]
    return replace(reading, reason=f"{reading.reason}; its likeliest first token is {shortened(likeliest)}")


def read_answered_label(answer: Answer, readout: LabelReadout, keys: Keys) -> Reading:
    """Read a judgement off an answer's text, without a label mass: it takes no value between two labels."""
    try:
        probabilities = answered_label(answer, keys)
    except Unreadable as unreadable:
        return Reading(NAN, {}, str(unreadable))
    return Reading(expectation(probabilities, readout).value)


def shortened(text: str, length: int = 80) -> str:
    """The beginning of a text, quoted, for messages."""
    return repr(text if len(text) <= length else text[:length] + "...")


def _check_labels(labels: tuple[str, ...]) -> None:
    if (
        len(labels) < 2
        or len(set(labels)) != len(labels)
        or any(not label or label.split() != [label] for label in labels)
    ):
        raise ValueError(f"labels: expected two or more different words without spaces, got {list(labels)}")
    forms = [form for label in labels for form in surface_forms(label)]
    if len(set(forms)) != len(forms):
        raise ValueError(f"labels: expected words that differ in more than their case, got {list(labels)}")


def _token(entry: object) -> tuple[str, float]:
    token, logprob = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
    # A little above 0 is rounding; -inf is a token that the server masked. NaN fails the comparison.
    if not isinstance(token, str) or not isinstance(logprob, int | float) or not logprob <= 1e-3:
        raise Unreadable(f"expected a token and its log-probability, got {token!r} and {logprob!r}")
    return token, float(logprob)
