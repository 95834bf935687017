"""The ids of a judge's labels, asked of the server that will use them, never hard-coded."""

from __future__ import annotations

from collections.abc import Mapping

from rewards.judges.client import JudgeClient
from rewards.judges.faults import JudgeConfigurationError
from rewards.judges.readouts import LabelReadout, surface_forms

TOKENIZE = "//tokenize"
"""vLLM has it beside /v1, not below."""
_MARKS = ("▁", "Ġ")
"""How tokenizers write a space inside; as text it is a space."""


async def served_label_ids(client: JudgeClient, model: str, readout: LabelReadout) -> Mapping[str, tuple[int, ...]]:
    """The ids under which each label may come: its own, and those of its other surface forms that are single tokens.

    Raises:
        JudgeConfigurationError: a label is not a single token of this model, two labels share one, or the server has
            no ``/tokenize``.
        Fault: the server did not answer.
    """
    found: dict[str, tuple[int, ...]] = {}
    for label in readout.labels:
        own = await _tokens(client, model, label)
        if len(own) != 1:
            raise JudgeConfigurationError(
                f"label {label!r}: expected a single token of {model}, got {len(own)}: {own}; "
                "choose labels such as 0 to 9 or A to E"
            )
        others = [form for form in surface_forms(label) if form != label and not form.startswith(_MARKS)]
        more = [await _tokens(client, model, form) for form in others]
        found[label] = tuple(dict.fromkeys([*own, *(tokens[0] for tokens in more if len(tokens) == 1)]))
    _check_distinct(found, model)
    return found


async def _tokens(client: JudgeClient, model: str, text: str) -> list[int]:
    try:
        answer = await client.ask_path(TOKENIZE, {"model": model, "prompt": text, "add_special_tokens": False})
    except JudgeConfigurationError as error:
        if error.status not in (404, 405):
            raise
        raise JudgeConfigurationError(
            f"token_ids: the server has no /tokenize, as vLLM does; set token_ids=False: {error}", error.status
        ) from error
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise JudgeConfigurationError(f"token_ids: expected token ids from /tokenize, got {tokens!r}")
    return tokens


def _check_distinct(found: Mapping[str, tuple[int, ...]], model: str) -> None:
    owners: dict[int, str] = {}
    for label, ids in found.items():
        for number in ids:
            if owners.setdefault(number, label) != label:
                raise JudgeConfigurationError(
                    f"labels {owners[number]!r} and {label!r}: the same token {number} of {model}; choose others"
                )
