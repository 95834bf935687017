"""Which of several servers answers the next call: the least busy, leaving out those that are away or ask to wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class Server:
    """What the client knows of one server; the times are its event loop's.

    Attributes:
        url: the base URL, without a slash at its end.
        in_flight: calls under way.
        served: calls that it was given so far.
        answers: how often it was heard of so far, whatever it said.
        rests_until: it is not asked before.
        waits_until: it said so itself (Retry-After): it is not asked before while there is another that did not.
        is_on_trial: it could not be reached the last time: one call in each rest, until one gets through.
    """

    url: str
    in_flight: int = 0
    served: int = 0
    answers: int = 0
    rests_until: float = 0.0
    waits_until: float = 0.0
    is_on_trial: bool = False

    def started(self, trial_until: float) -> None:
        """A call goes out; on trial, it is the only one until then."""
        self.in_flight += 1
        self.served += 1
        if self.is_on_trial:
            self.rests_until = trial_until

    def ended(self) -> None:
        """A call is over, whatever came of it."""
        self.in_flight -= 1

    def reached(self) -> None:
        """An answer came: whatever it says, the server is there."""
        self.answers += 1
        self.is_on_trial = False
        self.rests_until = 0.0

    def unreachable(self, until: float) -> None:
        """No connection came about, or it took a call and nobody heard of it since."""
        self.rests_until = until
        self.is_on_trial = True

    def asked_to_wait(self, until: float) -> None:
        """It sent a Retry-After; an answer to a call that was under way does not take that back."""
        self.waits_until = until

    def is_awake(self, now: float) -> bool:
        """Whether it is asked now."""
        return max(self.rests_until, self.waits_until) <= now


def choose(servers: Sequence[Server], now: float, avoid: Server | None = None) -> Server | None:
    """The awake server with the fewest calls in flight, then the fewest served, then the first; None: all rest.

    ``avoid``, where the last attempt failed, comes last whatever its load. Where every server asks to wait, those that
    can be reached are asked all the same: one that was told so may have answered others since.
    """
    willing = [server for server in servers if server.waits_until <= now] or servers
    awake = [server for server in willing if server.rests_until <= now]
    return min(awake, key=lambda server: (server is avoid, server.in_flight, server.served), default=None)


def asked_wait(servers: Sequence[Server], now: float) -> float:
    """Seconds until the first server no longer asks to wait; 0 where one does not."""
    return max(min(server.waits_until for server in servers) - now, 0.0)


def checked_urls(base_urls: str | Sequence[str]) -> tuple[str, ...]:
    """One or several base URLs, without the slash at their ends.

    Raises:
        ValueError: there is none, one is given twice, or one is no http or https URL.
    """
    urls = tuple(url.rstrip("/") for url in ([base_urls] if isinstance(base_urls, str) else base_urls))
    for url in urls:
        parsed = urlsplit(url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname or parsed.query or parsed.fragment:
            raise ValueError(f"base_urls: expected such as http://127.0.0.1:8000/v1, got {url!r}")
    if not urls or len(set(urls)) != len(urls):
        raise ValueError(f"base_urls: expected one or more different URLs, got {list(urls)}")
    return urls
