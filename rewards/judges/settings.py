"""How judges are asked and calls are made: checked where they are set."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

_OWN_FIELDS = (
    *("model", "messages", "temperature", "max_tokens", "logprobs", "top_logprobs", "return_tokens_as_token_ids"),
    *("response_format", "stream", "n"),
)


@dataclass(frozen=True)
class Retry:
    """How often and when a call is tried again.

    Attributes:
        attempts: most attempts of one call, the first included; those that reach no server are not counted, so that a
            server may restart meanwhile: only the deadline ends the wait for it.
        first_wait: seconds before the second attempt, doubled for each one after it.
        longest_wait: most seconds that this grows to; a server's Retry-After may ask for more.
        seed: of the jitter.

    Raises:
        ValueError: a value out of its range.
    """

    attempts: int = 8
    first_wait: float = 0.5
    longest_wait: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts: expected 1 or more, got {self.attempts}")
        if not 0 <= self.first_wait <= self.longest_wait < math.inf:
            raise ValueError(
                f"expected 0 <= first_wait <= longest_wait, got first_wait {self.first_wait} and "
                f"longest_wait {self.longest_wait}"
            )

    def wait(self, call: int, attempt: int, retry_after: float = 0.0) -> float:
        """Seconds after attempt 0, 1, ...: min(first 2^attempt, longest) times [0.5, 1), at least ``retry_after``.

        The jitter, which keeps calls that failed together from coming back together, is a function of the seed, the
        call's number and the attempt.
        """
        jitter = 0.5 + 0.5 * random.Random(f"{self.seed}/{call}/{attempt}").random()
        # Beyond 2^30 the longest wait has been reached, and a float would overflow in the end.
        return max(jitter * min(self.first_wait * 2.0 ** min(attempt, 30), self.longest_wait), retry_after)


@dataclass(frozen=True)
class ClientSettings:
    """How calls are made.

    Attributes:
        max_in_flight: most calls at a time, over all servers.
        attempt_seconds: most time of one attempt, to the last byte.
        call_seconds: most time of one call, its waits and retries included, from when its turn comes.
        batch_seconds: most time of one :meth:`JudgeClient.ask`, the wait for a turn included.
        rest_seconds: how long a server that cannot be reached is left alone.
        retry: how often and when a call is tried again.
        max_answer_bytes: a larger answer is a fault.
        api_key: sent as a bearer token; in no message, log or fingerprint.
        use_environment_proxies: whether HTTP_PROXY and its like are followed; judges are mostly near.

    Raises:
        ValueError: a number that is not positive, or a key that no header can hold.
    """

    max_in_flight: int = 64
    attempt_seconds: float = 60.0
    call_seconds: float = 180.0
    batch_seconds: float = 900.0
    rest_seconds: float = 5.0
    retry: Retry = field(default_factory=Retry)
    max_answer_bytes: int = 4 * 2**20
    api_key: str = field(default="", repr=False)
    use_environment_proxies: bool = False

    def __post_init__(self) -> None:
        numbers = ("attempt_seconds", "call_seconds", "batch_seconds", "rest_seconds")
        if not self.api_key.isascii() or any(letter.isspace() for letter in self.api_key):
            raise ValueError("api_key: expected ASCII without spaces or line breaks; strip it")
        for name in ("max_in_flight", "max_answer_bytes", *numbers):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge is asked; all of it is part of the fingerprint but ``group_concurrency``.

    Attributes:
        long_side: larger images are scaled down to this many pixels on their longer side: the server's preprocessing
            is what limits it.
        temperature: 0 takes the most likely token; label probabilities are those before it on vLLM.
        max_tokens: None: 1 for label probabilities, 8 for a label as text, 1024 for a rubric.
        read: "probabilities": from the log-probabilities of the first token; "answer": from its text, for servers that
            give none. Rubrics are text always.
        top_logprobs: how many are asked for; vLLM's limit is 20 unless its ``--max-logprobs`` says more.
        min_label_mass: least probability of all labels together; below it a judgement is not available.
        token_ids: ask for tokens by id and take the labels' ids from the server's ``/tokenize`` (vLLM): no two tokens
            are mistaken for each other, and labels that are no single tokens are noticed before the first call.
        disable_thinking: send ``chat_template_kwargs={"enable_thinking": false}``, for models that think by default.
        structured: send a rubric's JSON schema as ``response_format``.
        extra: more fields for the body, such as ``{"mm_processor_kwargs": {...}}`` or ``{"seed": 0}``.
        max_missing_pairs: largest share of an image's pairs that may be lost; above it the image's win rate is not
            available. A quarter: of 3 other images none, of 4 to 7 one, of 15 three.
        group_concurrency: how many groups a pairwise judge is called with at a time; the client bounds the calls.

    Raises:
        ValueError: a value out of its range, or a field of the judge's own in ``extra``.
    """

    long_side: int = 768
    temperature: float = 0.0
    max_tokens: int | None = None
    read: Literal["probabilities", "answer"] = "probabilities"
    top_logprobs: int = 20
    min_label_mass: float = 0.5
    token_ids: bool = False
    disable_thinking: bool = False
    structured: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    max_missing_pairs: float = 0.25
    group_concurrency: int = 16

    def __post_init__(self) -> None:
        for name in ("long_side", "top_logprobs", "group_concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected 1 or more, or None, got {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        for name in ("min_label_mass", "max_missing_pairs"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        if self.read not in ("probabilities", "answer"):
            raise ValueError(f"read: expected 'probabilities' or 'answer', got {self.read!r}")
        own = (*_OWN_FIELDS, *(("chat_template_kwargs",) if self.disable_thinking else ()))
        if taken := sorted(set(self.extra) & set(own)):
            raise ValueError(f"extra: {', '.join(taken)}: set by the judge itself; use its settings")
        try:
            json.dumps(self.extra)
        except TypeError as error:
            raise ValueError(f"extra: expected JSON: {error}") from error

    def fingerprint(self) -> dict[str, Any]:
        """What the answers depend on."""
        return {name: value for name, value in asdict(self).items() if name != "group_concurrency"}
