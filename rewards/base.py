"""The reward contract: any callable from images and prompts to one number an image, NaN where it is not available."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """One thing that is asked for.

    Attributes:
        text: a prompt, or an edit instruction; any Unicode.
        source_images: the images to edit, uint8 [H, W, 3] each; empty for text-to-image.
        metadata: what a reward may need to know (GenEval's clauses, an edit's operations, ...); JSON-like.
        id: a name that is stable across runs, for seeds, caches and reports.
        group: a label of its owner's, kept by prompt files and through the turns of an edit. Nothing is computed from
            it: the samples drawn of one entry of a batch are compared with each other, whatever it says.
    """

    text: str
    source_images: tuple[Images, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    group: str = ""


@dataclass(frozen=True)
class Scores:
    """What a reward may return in place of a plain array.

    Attributes:
        total: the reward of each image, float32 [B]; NaN means not available.
        components: named parts of it, each float32 [B]; logged, not summed.
        reasons: why an image has no reward, by its index.
    """

    total: Values
    components: Mapping[str, Values] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)


class Reward(Protocol):
    """Any callable of this shape is a reward; it may be a coroutine function.

    Images are uint8 [B, H, W, 3]; one prompt an image. A failed judgement is NaN: the sample is masked, counted and
    logged, and never scored 0, at random or in the middle of the scale.
    """

    def __call__(self, images: Images, prompts: Sequence[Prompt], /) -> Values | Scores | Awaitable[Values | Scores]:
        """Score images."""
        ...


@dataclass(frozen=True)
class RewardTraits:
    """How a reward wants to be called; a reward that has none is called once, with everything.

    Attributes:
        scope: "sample": an image's reward depends on that image alone. "group": it is called with one group at a time,
            the samples that were drawn of one prompt, and may compare them (win rates).
        batch_size: most images of a call; None: no bound. A group is never cut.
        concurrency: most calls at a time; a plain function's calls run in threads then.
        fingerprint: what else the answers depend on (model, template hash, sampling parameters): for caches and logs.
    """

    scope: Literal["sample", "group"] = "sample"
    batch_size: int | None = None
    concurrency: int = 1
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.scope not in ("sample", "group"):
            raise ValueError(f"scope: expected 'sample' or 'group', got {self.scope!r}")
        if self.concurrency < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(f"RewardTraits: expected batch_size and concurrency of 1 or more, got {self}")


class Unavailable(Exception):
    """Raised by a reward without an answer for the images of a call: they are NaN, and the message is the reason."""


R = TypeVar("R", bound=Callable[..., Any])


def declare(traits: RewardTraits) -> Callable[[R], R]:
    """Give a reward its traits: ``@declare(RewardTraits(scope="group"))``. A class may just have ``traits``."""

    def mark(reward: R) -> R:
        reward.traits = traits  # type: ignore[attr-defined]
        return reward

    return mark


def reward_traits(reward: Reward) -> RewardTraits:
    """A reward's traits, those of a plain callable unless it declares others."""
    traits = getattr(reward, "traits", None)
    return traits if isinstance(traits, RewardTraits) else RewardTraits()


@runtime_checkable
class Counting(Protocol):
    """A reward that counts what its answers cost: calls, faults, seconds, tokens, hits of a cache."""

    def statistics(self) -> Mapping[str, float]:
        """Numbers by name, since the reward was made."""
        ...


def reward_statistics(reward: Reward) -> dict[str, float]:
    """What a reward has counted; nothing where it does not count."""
    return dict(reward.statistics()) if isinstance(reward, Counting) else {}


def reward_name(reward: Reward) -> str:
    """A reward's name for messages and metrics: its function's or its class's name."""
    name = getattr(reward, "__name__", None)
    return name if isinstance(name, str) else type(reward).__name__
