"""A reward's answers on disk: what was scored once is not scored again, in this run or in another."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rewards.base import Images, Prompt, Reward, Scores, reward_name, reward_statistics, reward_traits
from rewards.compose import WeightedSum
from rewards.scoring import call_spans, join_scores, score_async

logger = logging.getLogger(__name__)

_APPLICATION = 0x70647472  # "pdtr": which files are such a cache, in SQLite's own field for it.
_FORMAT = 1
_WAIT_SECONDS = 60.0


class Cached:
    """A reward that asks another one only for what it has not answered before.

    The key is the SHA-256 of everything that an answer may depend on: the reward's name and fingerprint, the prompt's
    text and metadata, every source image and the image itself. A reward of group scope has one key for a whole group.
    The prompt's ``id`` and ``group`` are labels and no part of it. Answers hold the total and the components; one with
    a NaN in either, or with a reason why something of it is missing, is not stored, so that what has failed is tried
    again.

    The file is an SQLite database with JSON values, in WAL mode: any number of threads and of processes on one machine
    may use it at a time. It has to be on a local disk, which WAL needs. It only grows; delete it to start anew.

    A prompt whose metadata is not JSON has no key: it is scored every time, counted as ``uncached`` and warned of once.

    Args:
        reward: the reward; it is called as its own traits ask, with the misses of a batch together.
        path: the file; it is created, and so are its folders.
        fingerprint: what the answers depend on, for a reward that does not declare it in its traits.

    Attributes:
        hits: images answered from the file.
        misses: images that the reward was asked for and that have a key.
        uncached: images that the reward was asked for and that have none.

    Raises:
        ValueError: the file is there and not such a cache, or nothing says what the reward's answers depend on: a file
            outlives the code and the settings that filled it.
    """

    def __init__(self, reward: Reward, path: str | Path, fingerprint: str = "") -> None:
        traits = reward_traits(reward)
        if not fingerprint:
            _check_fingerprints(reward)
        self.reward = reward
        self.path = Path(path).resolve()
        self.traits = replace(
            traits, batch_size=None, fingerprint=" ".join(filter(None, (traits.fingerprint, fingerprint)))
        )
        # Messages and metrics speak of the reward, not of its cache.
        self.__name__ = reward_name(reward)
        self.hits = self.misses = self.uncached = 0
        self._identity = [_FORMAT, self.__name__, traits.fingerprint, fingerprint, traits.scope]
        self._lock = threading.Lock()
        self._warned = False
        _open_or_create(self.path)

    async def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images uint8 [B, H, W, 3], from the file where it has them."""
        if not len(images):
            return await score_async(self.reward, images, prompts)
        spans = call_spans(replace(self.traits, batch_size=1), prompts)
        units = [(images[start:stop], prompts[start:stop]) for start, stop in spans]
        # Hashing and reading would hold up what else runs in this loop.
        keys = await asyncio.to_thread(self._keys, units)
        known = await asyncio.to_thread(_read, self.path, [key for key in keys if key])
        answers = {i: known[key] for i, key in enumerate(keys) if key in known}
        missing = [i for i in range(len(units)) if i not in answers]
        self._count(units, keys, answers)
        answers |= dict(zip(missing, await self._scored([units[i] for i in missing]), strict=True))
        new = {key: answers[i] for i in missing if (key := keys[i]) and _is_complete(answers[i])}
        if new:
            await asyncio.to_thread(_write, self.path, new)
        return join_scores([answers[i] for i in range(len(units))])

    def statistics(self) -> dict[str, float]:
        """Images by where their answers came from, and what the reward itself has counted."""
        with self._lock:
            counts = {"hits": self.hits, "misses": self.misses, "uncached": self.uncached}
        return {**{f"cache/{name}": float(count) for name, count in counts.items()}, **reward_statistics(self.reward)}

    async def _scored(self, units: Sequence[tuple[Images, Sequence[Prompt]]]) -> list[Scores]:
        if self.traits.scope == "group":
            # One by one: two groups of one prompt that come to lie side by side would be taken for one.
            return [await score_async(self.reward, *unit) for unit in units]
        if not units:
            return []
        images = np.concatenate([images for images, _ in units])
        scores = await score_async(self.reward, images, [prompts[0] for _, prompts in units])
        return [_entry(scores, index) for index in range(len(units))]

    def _keys(self, units: Sequence[tuple[Images, Sequence[Prompt]]]) -> list[str]:
        return [self._key(*unit) for unit in units]

    def _key(self, images: Images, prompts: Sequence[Prompt]) -> str:
        """The key of an image or of a group, empty where metadata is not JSON."""
        try:
            digest = hashlib.sha256(_canonical([*self._identity, len(images)]))
            for image, prompt in zip(images, prompts, strict=True):
                _feed(digest, image, prompt)
        except (TypeError, ValueError, RecursionError) as error:
            self._warn(prompt, error)
            return ""
        return digest.hexdigest()

    def _warn(self, prompt: Prompt, error: Exception) -> None:
        if not self._warned:
            logger.warning(
                "%s: metadata of prompt %r is not JSON (%s); it and others like it are scored every time",
                self.__name__,
                prompt.id or prompt.text,
                error,
            )
        self._warned = True

    def _count(
        self, units: Sequence[tuple[Images, Sequence[Prompt]]], keys: Sequence[str], answers: Mapping[int, Scores]
    ) -> None:
        sizes = [len(images) for images, _ in units]
        with self._lock:
            self.hits += sum(sizes[i] for i in answers)
            self.misses += sum(size for i, size in enumerate(sizes) if keys[i] and i not in answers)
            self.uncached += sum(size for i, size in enumerate(sizes) if not keys[i])


def _check_fingerprints(reward: Reward) -> None:
    if isinstance(reward, WeightedSum):
        # A sum's own fingerprint is never empty, its members' may be.
        for member in (*reward.rewards.values(), *reward.held_out.values()):
            _check_fingerprints(member)
    elif not reward_traits(reward).fingerprint:
        raise ValueError(
            f"fingerprint of {reward_name(reward)}: expected text that names what its answers depend on (version, "
            "model, settings), got none; declare RewardTraits(fingerprint=...) or give Cached(..., fingerprint=...)"
        )


def _canonical(value: object) -> bytes:
    # A line each, so that what follows cannot be taken for a part of it; escapes keep lone surrogates encodable.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_as_dict).encode() + b"\n"


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} {value!r:.50}")


def _feed(digest: Any, image: Images, prompt: Prompt) -> None:
    """Add text, metadata, shapes and bytes; the shapes come first and say where each image ends."""
    pictures = [*prompt.source_images, image]
    shapes = [[str(picture.dtype), *picture.shape] for picture in pictures]
    digest.update(_canonical([prompt.text, prompt.metadata, shapes]))
    for picture in pictures:
        digest.update(np.ascontiguousarray(picture))


def _is_complete(scores: Scores) -> bool:
    return not scores.reasons and not any(
        np.isnan(values).any() for values in (scores.total, *scores.components.values())
    )


def _entry(scores: Scores, index: int) -> Scores:
    reasons = {0: scores.reasons[index]} if index in scores.reasons else {}
    part = slice(index, index + 1)
    return Scores(scores.total[part], {name: values[part] for name, values in scores.components.items()}, reasons)


def _connect(path: Path) -> closing[sqlite3.Connection]:
    # One for each use: a connection belongs to the thread and to the process that made it.
    return closing(sqlite3.connect(path, timeout=_WAIT_SECONDS))


def _open_or_create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            return _set_up(path)
        except sqlite3.OperationalError as error:
            # The switch to WAL does not wait for other processes that open the file, as everything else does.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise ValueError(f"path: expected a cache of rewards or a new file, got {path}: {error}") from error
            time.sleep(0.02)
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"path: expected a cache of rewards, got {path}, which is none ({error}); name another file"
            ) from error


def _set_up(path: Path) -> None:
    with _connect(path) as connection:
        # In the order opposite to writing: a cache that another process is about to set up is none of something else.
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        if tables and application != _APPLICATION:
            raise sqlite3.DatabaseError("a database of something else")
        if not tables:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA application_id={_APPLICATION}")
            connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")


def _read(path: Path, keys: Sequence[str]) -> dict[str, Scores]:
    found = {}
    with _connect(path) as connection:
        for key in keys:
            row = connection.execute("SELECT value FROM answers WHERE key=?", (key,)).fetchone()
            if row:
                found[key] = _decoded(row[0])
    return found


def _write(path: Path, answers: Mapping[str, Scores]) -> None:
    rows = [(key, _encoded(scores)) for key, scores in answers.items()]
    with _connect(path) as connection, connection:
        # The first answer stays, so that everyone reads the same one.
        connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)


def _encoded(scores: Scores) -> str:
    parts = {name: values.tolist() for name, values in scores.components.items()}
    return json.dumps({"total": scores.total.tolist(), "components": parts})


def _decoded(value: str) -> Scores:
    stored = json.loads(value)
    components = {name: np.asarray(values, np.float32) for name, values in stored["components"].items()}
    return Scores(np.asarray(stored["total"], np.float32), components)
