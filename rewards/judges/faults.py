"""What can go wrong with a call, and what of it is tried again.

Tried again: failed connections, timeouts, half or unreadable bodies, and the statuses 408, 429 and 5xx. Every other
status is a mistake in the configuration: it would answer the same for ever, so it ends the run at once, unless it may
be about one request (400, 413, 422) and others were answered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from rewards.judges.readouts import shortened

RETRIED_STATUSES = (408, 429)
"""Besides every 5xx."""
REFUSED_ALONE = (400, 413, 422)
"""Statuses that may be about one request: fatal only before a call was answered."""
FIXES = {
    400: "check the request against the server's limits (images a prompt, context length, top_logprobs)",
    401: "set api_key",
    403: "set api_key",
    404: "check the model's name and the base URL, which ends in /v1 for most servers",
    413: "lower long_side",
    422: "check the request's extra fields",
}
_LONGEST_EXCERPT = 300


class JudgeConfigurationError(ValueError):
    """The server refuses requests of this kind; no retry helps. Attribute ``status``: its HTTP status, or 0."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Fault(Exception):
    """One attempt that failed and may be tried again.

    Attributes:
        kind: "connection", "timeout", "garbage", "too_large" or "status_NNN": for counters.
        retry_after: seconds that the server asked to wait; 0 if it did not.
        is_unreachable: no connection came about: the server rests.
    """

    def __init__(self, kind: str, reason: str, retry_after: float = 0.0, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.kind = kind
        self.retry_after = retry_after
        self.is_unreachable = is_unreachable


def retry_after_seconds(header: str | None, now: datetime) -> float:
    """A Retry-After header in seconds: a number or an HTTP date (RFC 9110, 10.2.3); 0 if it is neither.

    ``now`` is aware of its time zone.
    """
    text = (header or "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return 0.0
        # A date without a zone means UTC.
        aware = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (aware - now).total_seconds()
    return seconds if 0 < seconds < math.inf else 0.0


def check_status(status: int, retry_after: float, body: bytes, url: str) -> None:
    """Let an answer with status 200 pass.

    Raises:
        Fault: a status that is tried again.
        JudgeConfigurationError: any other; the message quotes the server and says what to check.
    """
    if status == 200:
        return
    said = excerpt(body)
    if status in RETRIED_STATUSES or status >= 500:
        raise Fault(f"status_{status}", f"status {status} from {url}: {said}", retry_after)
    fix = FIXES.get(status, "check the base URL and the request")
    raise JudgeConfigurationError(f"expected status 200 from {url}, got {status}: {said}; {fix}", status)


def parse_object(body: bytes, url: str) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        Fault: it is none.
    """
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Fault("garbage", f"expected JSON from {url}, got {excerpt(body)}") from error
    if not isinstance(parsed, dict):
        raise Fault("garbage", f"expected a JSON object from {url}, got {excerpt(body)}")
    return parsed


def check_completion(answer: Mapping[str, Any], url: str) -> None:
    """Let an answer that has the form of a chat completion pass.

    Raises:
        Fault: it has no choices: some proxy or a server in trouble said something else.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Fault("garbage", f"expected a chat completion from {url}, got {excerpt(json.dumps(answer).encode())}")


def excerpt(body: bytes) -> str:
    """What a server said, for messages: the message of an OpenAI-style error, or the body's beginning."""
    text = body[: 16 * _LONGEST_EXCERPT].decode("utf-8", "replace")
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        parsed = None
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else None
    told = error.get("message") if isinstance(error, dict) else error
    return shortened(told if isinstance(told, str) else text, _LONGEST_EXCERPT)
