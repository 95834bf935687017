"""A space of text in any script: Gymnasium's own ``Text`` has to list its characters, a prompt may hold any."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium.spaces import Space

# Long enough for a prompt rewritten by a language model, short enough to keep a runaway file out of a batch.
MAX_PROMPT_LENGTH = 65_536
_SAMPLE_LENGTH = 64
_LAST_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


class UnicodeText(Space[str]):
    """All Unicode strings of up to ``max_length`` code points, the empty one included.

    A lone surrogate is not text (no file or tokenizer can hold it), so strings with one are outside. Samples are short,
    64 code points at the most, from all scripts. ``gymnasium.vector.utils.batch_space`` makes a tuple of such spaces,
    so a vector environment's observation is a tuple of strings. An ``AsyncVectorEnv`` needs ``shared_memory=False``.

    Args:
        max_length: the longest text, in code points.
        seed: seed of the samples.

    Raises:
        ValueError: ``max_length`` is not an integer of at least 0.
    """

    def __init__(self, max_length: int = MAX_PROMPT_LENGTH, seed: int | np.random.Generator | None = None) -> None:
        if isinstance(max_length, bool) or not isinstance(max_length, int | np.integer) or max_length < 0:
            raise ValueError(f"max_length: expected an integer of at least 0, got {max_length!r}")
        self.max_length = int(max_length)
        super().__init__(dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """False: a text has no fixed size."""
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """Draw a text: its length uniformly up to 64, then its code points, surrogates left out.

        Raises:
            ValueError: a mask or a probability is given; there is no table of characters to apply it to.
        """
        if mask is not None or probability is not None:
            raise ValueError("UnicodeText.sample: expected no mask and no probability, got one; leave both out")
        length = int(self.np_random.integers(min(self.max_length, _SAMPLE_LENGTH) + 1))
        gap = _SURROGATES[1] - _SURROGATES[0] + 1
        drawn = self.np_random.integers(1, _LAST_CODE_POINT + 1 - gap, length)
        return "".join(chr(point + gap if point >= _SURROGATES[0] else point) for point in drawn.tolist())

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a string of at most ``max_length`` code points without lone surrogates."""
        return isinstance(x, str) and len(x) <= self.max_length and _is_encodable(x)

    def to_jsonable(self, sample_n: Iterable[str]) -> list[str]:
        """The texts as a JSON array."""
        return list(sample_n)

    def from_jsonable(self, sample_n: list[Any]) -> list[str]:
        """The texts of a JSON array.

        Raises:
            ValueError: an entry lies outside the space.
        """
        for index, text in enumerate(sample_n):
            if text not in self:
                raise ValueError(f"entry {index}: expected {self.description}, got {describe_text(text)}")
        return list(sample_n)

    @property
    def description(self) -> str:
        """What lies inside, in words for a message."""
        return f"a text of at most {self.max_length} code points without lone surrogates"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnicodeText) and self.max_length == other.max_length

    def __hash__(self) -> int:
        return hash((UnicodeText, self.max_length))

    def __repr__(self) -> str:
        return f"UnicodeText({self.max_length})"


def describe_text(text: object) -> str:
    """A text, or what came in its place, short enough for a message."""
    if not isinstance(text, str):
        return type(text).__name__
    start = f"{text[:40]!r}{'...' if len(text) > 40 else ''}"
    return f"{start} ({len(text)} code points{'' if _is_encodable(text) else ', with a lone surrogate'})"


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
