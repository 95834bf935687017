"""A reward that another process computes, on this machine or on another one: the client of :mod:`rewards.server`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rewards.base import Images, Prompt, RewardTraits, Scores, Unavailable
from rewards.remote_calls import RemoteCalls, RemoteSettings
from rewards.scoring import call_spans, join_scores
from rewards.wire import parse_answer
from rewards.wire_json import parse_object, valued
from rewards.wire_parts import EncodedCall, read_limits


class RemoteReward:
    """The reward behind a URL, under its own name and traits.

    ``traits`` are the server's, with a batch of at most what it takes in a request, and twice its concurrency, so that
    requests wait there while others are scored. Entries that share a :class:`Prompt` object share one there.

    A call that is beyond what the server takes in a request (bytes, pixels, source images, JSON values) is sent as
    several, one after another; an image is never parted from its sources, nor a group cut.

    No answer in time makes the images of a request NaN, with the reason, and those of the call's later requests, which
    are not sent then. A server that refuses a request, that has another reward than it had at first, or whose reward
    raises an exception ends the scoring.

    Args:
        url: where the server is, such as ``http://127.0.0.1:8765``.
        traits: how it is called; the server is not asked for them then, and need not run yet. Its limits are taken to
            be the default ones.
        settings: how it is asked.

    Raises:
        ValueError: the URL is none, or the server does not answer or is none of rewards.
        ModuleNotFoundError: httpx, of the extra ``reward-server``, is not installed.
    """

    def __init__(self, url: str, traits: RewardTraits | None = None, settings: RemoteSettings | None = None) -> None:
        if importlib.util.find_spec("httpx") is None:
            raise ModuleNotFoundError("a remote reward needs httpx: pip install 'pdtr[reward-server]'")
        self._calls = RemoteCalls(url, settings or RemoteSettings())
        self.url = self._calls.url
        # For messages, metrics and a cache's key: with the server's name, they are those of the reward itself.
        self.__name__ = "RemoteReward"
        self._limits: Mapping[str, int] = {}
        if traits is None:
            self.__name__, traits, self._limits = self._described()
        self.traits = traits

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] on the server.

        Nothing is sent before all of the call is known to be what the server takes.

        Raises:
            Unavailable: no answer in time, not even for some of the images.
            ValueError: the server refuses the request, an image or a group is beyond its limits, metadata is not JSON,
                or the server has another reward now.
            RuntimeError: the reward raised an exception on the server.
        """
        if not len(images):
            return Scores(np.zeros(0, np.float32))
        call = EncodedCall(images, prompts)
        try:
            spans = call.spans(call_spans(replace(self.traits, batch_size=1), prompts), self._limits)
        except ValueError as error:
            raise ValueError(f"{self.url}: {error}") from error
        parts: list[Scores] = []
        for start, stop in spans:
            try:
                parts.append(self._asked(call.body(start, stop), stop - start))
            except Unavailable as missing:
                if not parts:
                    raise
                # What has been answered counts. The rest would wait as long again, each request of it for itself.
                rest = len(images) - start
                values = np.full(rest, np.nan, np.float32)
                return join_scores([*parts, Scores(values, reasons=dict.fromkeys(range(rest), str(missing)))])
        return join_scores(parts)

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self._calls.close()

    def __enter__(self) -> RemoteReward:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _asked(self, content: bytes, count: int) -> Scores:
        """The answer to one request with ``count`` images."""
        body = self._calls.exchange("POST", "/score", content)
        try:
            scores, fingerprint = parse_answer(body, count)
        except ValueError as error:
            raise ValueError(f"{self.url}: {error}") from error
        expected = self.traits.fingerprint
        if expected and fingerprint and fingerprint != expected:
            raise ValueError(
                f"{self.url}: expected the reward with the fingerprint {expected!r}, got {fingerprint!r}: the server "
                "has another reward now; make the RemoteReward anew"
            )
        return scores

    def _described(self) -> tuple[str, RewardTraits, Mapping[str, int]]:
        """The server's name for its reward, the traits to call it with from here, and the server's limits."""
        try:
            document = parse_object(self._calls.exchange("GET", "/health"), "answer")
            if document.get("status") == "ok" and "traits" not in document:
                raise ValueError("the server wants a token; give RemoteSettings(token=...)")
            name = str(valued(document, "reward", str, "answer"))
            limits = read_limits(valued(document, "limits", dict, "answer"))
            traits = RewardTraits(**valued(document, "traits", dict, "answer"))
            return name, _traits_from_here(traits, limits["max_images"]), limits
        except Unavailable as error:
            raise ValueError(
                f"url: expected a reward server, got none: {error}; start it (pdtr reward serve MODULE:REWARD), or "
                "give traits to have it asked for them no more"
            ) from error
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            said = str(error).removeprefix(f"{self.url}: ")
            raise ValueError(f"url: expected a reward server, got {self.url}: {said}") from error


def _traits_from_here(traits: RewardTraits, max_images: int) -> RewardTraits:
    batch_size = None if traits.scope == "group" else min(traits.batch_size or max_images, max_images)
    return RewardTraits(traits.scope, batch_size, 2 * traits.concurrency, traits.fingerprint)
