"""What a reward server counts, as a page in Prometheus' text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ServerMetrics:
    """Counts from any thread; every counter starts at 0 with the server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._seconds = 0.0
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._images = self._missing = self._calls = self._called_images = 0

    def answered(self, status: int, seconds: float) -> None:
        """Count a request for scores by its HTTP status, and the seconds until its answer was ready."""
        with self._lock:
            self._requests[status] += 1
            self._seconds += seconds
            self._buckets[bisect_left(_BOUNDS, seconds)] += 1

    def scored(self, images: int, missing: int) -> None:
        """Count images of an answer, and those of them that have no reward."""
        with self._lock:
            self._images += images
            self._missing += missing

    def called(self, images: int) -> None:
        """Count a call of the reward."""
        with self._lock:
            self._calls += 1
            self._called_images += images

    def page(self, waiting: int) -> str:
        """The metrics as text; ``waiting`` is the number of images in the queue now."""
        with self._lock:
            lines = [
                *_metric("requests_total", "counter", "Requests for scores by HTTP status.", self._by_status()),
                *_metric("request_seconds", "histogram", "Time of a request for scores.", self._histogram()),
                *_metric("images_total", "counter", "Images in answers.", [("", self._images)]),
                *_metric("missing_answers_total", "counter", "Of these, without a reward.", [("", self._missing)]),
                *_metric("calls_total", "counter", "Calls of the reward.", [("", self._calls)]),
                *_metric("called_images_total", "counter", "Images in these calls.", [("", self._called_images)]),
                *_metric("queue_length", "gauge", "Images that wait for a call.", [("", waiting)]),
            ]
        return "\n".join(lines) + "\n"

    def _by_status(self) -> list[tuple[str, float]]:
        return [(f'{{status="{status}"}}', count) for status, count in sorted(self._requests.items())]

    def _histogram(self) -> list[tuple[str, float]]:
        rows: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], self._buckets, strict=True):
            total += count
            rows.append((f'_bucket{{le="{bound}"}}', total))
        return [*rows, ("_sum", self._seconds), ("_count", total)]


def _metric(name: str, kind: str, text: str, rows: Iterable[tuple[str, float]]) -> list[str]:
    name = f"pdtr_reward_{name}"
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *(f"{name}{suffix} {value}" for suffix, value in rows)]
