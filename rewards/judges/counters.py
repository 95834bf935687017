"""What calls cost and how they fail, as numbers for the log."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

_LATENCIES_KEPT = 4096


@dataclass(frozen=True)
class Statistics:
    """A client's counts since it was made.

    Attributes:
        calls: finished calls, the failed ones included.
        retries: attempts after a call's first.
        faults: attempts that failed, by kind ("connection", "timeout", "garbage", "too_large", "status_429", ...).
        failures: calls without an answer, by the kind of their last fault; "deadline" where they had none.
        p50_seconds: median time of the calls that were answered, its retries included and the wait
            for its turn not; of the last 4096, NaN before any.
        p95_seconds: its 95th percentile.
        prompt_tokens: what the servers say they have read.
        completion_tokens: what the servers say they have written.
        cached_tokens: of the prompt tokens, those that the servers say their prefix cache had; 0 where they do not say.
    """

    calls: int
    retries: int
    faults: Mapping[str, int]
    failures: Mapping[str, int]
    p50_seconds: float
    p95_seconds: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def metrics(self) -> dict[str, float]:
        """The numbers by name, for a log: those of kinds are ``faults/KIND`` and ``failures/KIND``."""
        kinds = {f"faults/{kind}": float(count) for kind, count in self.faults.items()}
        kinds |= {f"failures/{kind}": float(count) for kind, count in self.failures.items()}
        named = (
            *("calls", "retries", "p50_seconds", "p95_seconds"),
            *("prompt_tokens", "completion_tokens", "cached_tokens"),
        )
        return {**{name: float(getattr(self, name)) for name in named}, **kinds}


@dataclass
class Counters:
    """Counts that one thread writes and any thread may read."""

    calls: int = 0
    retries: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES_KEPT))
    tokens: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)

    def fault(self, kind: str) -> None:
        """An attempt failed."""
        with self._lock:
            self.faults[kind] += 1

    def answered(self, seconds: float, attempts: int, answer: Mapping[str, Any]) -> None:
        """A call has its answer."""
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        counts = {"prompt_tokens": usage.get("prompt_tokens"), "completion_tokens": usage.get("completion_tokens")}
        counts["cached_tokens"] = cached
        with self._lock:
            self._finished(attempts)
            self.latencies.append(seconds)
            for name, count in counts.items():
                self.tokens[name] += count if isinstance(count, int) else 0

    def failed(self, kind: str, attempts: int) -> None:
        """A call was given up."""
        with self._lock:
            self._finished(attempts)
            self.failures[kind] += 1

    def snapshot(self) -> Statistics:
        """The counts as they are now."""
        with self._lock:
            latencies = sorted(self.latencies)
            return Statistics(
                self.calls,
                self.retries,
                dict(self.faults),
                dict(self.failures),
                percentile(latencies, 0.5),
                percentile(latencies, 0.95),
                self.tokens["prompt_tokens"],
                self.tokens["completion_tokens"],
                self.tokens["cached_tokens"],
            )

    def _finished(self, attempts: int) -> None:
        self.calls += 1
        self.retries += max(attempts - 1, 0)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least value that at least this share of the ordered ones does not exceed; NaN of none."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else math.nan
