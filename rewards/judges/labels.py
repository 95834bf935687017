"""Whether a judge's labels can be told apart, and their ids, asked of the server that will use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

from rewards.judges.client import JudgeClient
from rewards.judges.faults import Fault, JudgeConfigurationError
from rewards.judges.readouts import LabelReadout, surface_forms
from rewards.judges.settings import JudgeSettings
from rewards.judges.templates import Template

TOKENIZE = "//tokenize"
"""vLLM has it beside /v1, not below."""
_MARKS = ("▁", "Ġ")
"""How tokenizers write a space inside; as text it is a space."""


def check_label_settings(template: Template, settings: JudgeSettings) -> None:
    """Check that what is asked for is enough to tell the labels of a template apart; a rubric has none.

    Raises:
        ValueError: ids where no label probabilities are read, fewer log-probabilities than labels, or, without ids, a
            label that another one begins with.
    """
    readout = template.readout
    if not isinstance(readout, LabelReadout) or settings.read != "probabilities":
        if settings.token_ids:
            raise ValueError(
                f"token_ids: only for label probabilities, got the readout {readout.kind} read from the text; "
                "set token_ids=False"
            )
        return
    if settings.top_logprobs < len(readout.labels):
        raise ValueError(
            f"top_logprobs: expected {len(readout.labels)} or more, one for each label of {template.name}, "
            f"got {settings.top_logprobs}"
        )
    if not settings.token_ids and (pair := _prefix(readout.labels)):
        raise ValueError(
            f"labels of {template.name}: expected none that another begins with, got {pair[0]!r} and {pair[1]!r}: a "
            f"judge that says {pair[1]} may begin with the token {pair[0]}, which its text does not tell from the "
            "label; set token_ids=True (vLLM), or choose labels such as 0 to 9 or A to E"
        )


async def check_single_tokens(client: JudgeClient, model: str, readout: LabelReadout) -> None:
    """Check the labels by the served tokenizer; where it cannot be asked, as on servers other than vLLM, all pass.

    Raises:
        JudgeConfigurationError: a label is not a single token of this model, or two labels share one.
    """
    try:
        await served_label_ids(client, model, readout, attempts=1)
    except Fault:
        return
    except JudgeConfigurationError as refusal:
        # One with a status is about /tokenize, not about the labels.
        if not refusal.status:
            raise


async def served_label_ids(
    client: JudgeClient, model: str, readout: LabelReadout, attempts: int | None = None
) -> Mapping[str, tuple[int, ...]]:
    """The ids under which each label may come: its own, and those of its other surface forms that are single tokens.

    Each is asked for so often at most, or as often as calls are.

    Raises:
        JudgeConfigurationError: a label is not a single token of this model, two labels share one, or the server has
            no ``/tokenize``.
        Fault: the server did not answer.
    """
    found: dict[str, tuple[int, ...]] = {}
    for label in readout.labels:
        own = await _tokens(client, model, label, attempts)
        if len(own) != 1:
            raise JudgeConfigurationError(
                f"label {label!r}: expected a single token of {model}, got {len(own)}: {own}; "
                "choose labels such as 0 to 9 or A to E"
            )
        others = [form for form in surface_forms(label) if form != label and not form.startswith(_MARKS)]
        more = [await _tokens(client, model, form, attempts) for form in others]
        found[label] = tuple(dict.fromkeys([*own, *(tokens[0] for tokens in more if len(tokens) == 1)]))
    _check_distinct(found, model)
    return found


def _prefix(labels: Sequence[str]) -> tuple[str, str] | None:
    """A label that another one begins with, in whatever form both are written, and that other one; None: there is none.

    Labels are different in all their forms, so that a beginning is never the whole.
    """
    spaces = "".join((" ", *_MARKS))
    forms = {label: {form.lstrip(spaces) for form in surface_forms(label)} for label in labels}
    for first, second in permutations(labels, 2):
        if any(long.startswith(short) for short in forms[first] for long in forms[second]):
            return first, second
    return None


async def _tokens(client: JudgeClient, model: str, text: str, attempts: int | None) -> list[int]:
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        answer = await client.ask_path(TOKENIZE, body, attempts)
    except JudgeConfigurationError as error:
        if error.status not in (404, 405):
            raise
        raise JudgeConfigurationError(
            f"token_ids: the server has no /tokenize, as vLLM does; set token_ids=False: {error}", error.status
        ) from error
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise JudgeConfigurationError(f"token_ids: expected token ids from /tokenize, got {tokens!r}", 200)
    return tokens


def _check_distinct(found: Mapping[str, tuple[int, ...]], model: str) -> None:
    owners: dict[int, str] = {}
    for label, ids in found.items():
        for number in ids:
            if owners.setdefault(number, label) != label:
                raise JudgeConfigurationError(
                    f"labels {owners[number]!r} and {label!r}: the same token {number} of {model}; choose others"
                )
