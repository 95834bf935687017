"""A reward that another process computes, on this machine or on another one: the client of :mod:`rewards.server`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from rewards.base import Images, Prompt, RewardTraits, Scores, Unavailable
from rewards.remote_calls import RemoteCalls, RemoteSettings
from rewards.wire import encode_request, parse_answer
from rewards.wire_json import parse_object, valued


class RemoteReward:
    """The reward behind a URL, under its own name and traits.

    ``traits`` are the server's, with a batch of at most what it takes in a request, and twice its concurrency, so that
    requests wait there while others are scored. Entries that share a :class:`Prompt` object share one there.

    No answer in time makes the images of a call NaN, with the reason. A server that refuses a request, that has another
    reward than it had at first, or whose reward raises an exception ends the scoring.

    Args:
        url: where the server is, such as ``http://127.0.0.1:8765``.
        traits: how it is called; the server is not asked for them then, and need not run yet.
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
        if traits is None:
            self.__name__, traits = self._described()
        self.traits = traits

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3] on the server.

        Raises:
            Unavailable: no answer in time.
            ValueError: the server refuses the request, metadata is not JSON, or the server has another reward now.
            RuntimeError: the reward raised an exception on the server.
        """
        if not len(images):
            return Scores(np.zeros(0, np.float32))
        body = self._calls.exchange("POST", "/score", encode_request(images, prompts))
        try:
            scores, fingerprint = parse_answer(body, len(images))
        except ValueError as error:
            raise ValueError(f"{self.url}: {error}") from error
        expected = self.traits.fingerprint
        if expected and fingerprint and fingerprint != expected:
            raise ValueError(
                f"{self.url}: expected the reward with the fingerprint {expected!r}, got {fingerprint!r}: the server "
                "has another reward now; make the RemoteReward anew"
            )
        return scores

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self._calls.close()

    def __enter__(self) -> RemoteReward:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _described(self) -> tuple[str, RewardTraits]:
        """The server's name for its reward, and the traits to call it with from here."""
        try:
            document = parse_object(self._calls.exchange("GET", "/health"), "answer")
            if document.get("status") == "ok" and "traits" not in document:
                raise ValueError("the server wants a token; give RemoteSettings(token=...)")
            name = str(valued(document, "reward", str, "answer"))
            most = int(valued(document, "limits", dict, "answer")["max_images"])
            return name, _traits_from_here(RewardTraits(**valued(document, "traits", dict, "answer")), most)
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
