"""What a benchmark is: items, how many images of each, where the images lie, what is measured, how it is averaged.

The steps are apart from each other: :mod:`pdtr.benchmarks.drawing` draws images once and keeps them,
:mod:`pdtr.benchmarks.scoring` scores what is there, image by image, and :mod:`pdtr.benchmarks.aggregate` makes numbers
of the scores. A protocol is a function that reads its published files into a :class:`Benchmark`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pdtr.benchmarks.aggregate import Number
    from pdtr.benchmarks.layouts import Layout
    from pdtr.benchmarks.pictures import Picture
    from pdtr.benchmarks.scoring import Row
    from rewards.base import Prompt, Reward

Values = Mapping[str, float]
"""What was measured of one image, by name; what is not available is absent."""


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Attributes:
        index: its place in the published file, from 0; the noise follows from it.
        id: its name there; the paths of its images are made of it where the official layout is.
        text: the prompt, or the edit instruction.
        task: what it is averaged with.
        metadata: what scoring needs to know.
        sources: pictures to edit, as the policy is given them.
        shown_sources: the same as the judge is shown them, where the data has them twice.
    """

    index: int
    id: str
    text: str
    task: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Picture, ...] = ()
    shown_sources: tuple[Picture, ...] = ()

    def asked(self, image_size: tuple[int, int]) -> Prompt:
        """The prompt for a policy that works at (height, width): its sources are resized to that."""
        from pdtr.benchmarks.pictures import resized
        from rewards.base import Prompt

        sources = tuple(resized(picture.load(), image_size) for picture in self.sources)
        return Prompt(self.text, sources, self.metadata, self.id)

    def shown(self) -> Prompt:
        """The prompt for a reward, its sources at their own size."""
        from rewards.base import Prompt

        pictures = self.shown_sources or self.sources
        return Prompt(self.text, tuple(picture.load() for picture in pictures), self.metadata, self.id)


@dataclass(frozen=True)
class Metric:
    """One number that a benchmark reports.

    Attributes:
        name: in tables.
        value: which of an image's values it is a mean of.
        scale: the mean is multiplied by it, for the published scale.
    """

    name: str
    value: str
    scale: float = 1.0


Derive = Callable[[Item, Values], Values]
"""From an image's values as they were scored to those that are averaged."""
More = Callable[[Sequence[Item], "Sequence[Row]"], "list[Number]"]
"""Further numbers of all items and rows."""


def unchanged(item: Item, values: Values) -> Values:
    """The values as they were scored."""
    return values


def nothing_more(items: Sequence[Item], rows: Sequence[Row]) -> list[Number]:
    """No further numbers."""
    return []


@dataclass(frozen=True)
class Benchmark:
    """A published protocol over the items of a file.

    Attributes:
        name: as the command line has it.
        title: name and source of the protocol.
        items: in the order of the file.
        samples: images an item.
        layout: where the images lie, as the official scorer reads them.
        metrics: what is reported; the first is the benchmark's number.
        average: of the tasks' means ("tasks", unweighted), or of all prompts ("prompts").
        at_source_size: resize the image to its source's size before it is scored.
        derive: pure function from an image's values as they were scored to those that are averaged.
        more: further published numbers, such as a subset's.
        digest: of the whole file's items; images of another file's are not mixed with these.
        problems: rows of the file that were skipped.
        deviations: in what the items or their images differ from the published protocol.
    """

    name: str
    title: str
    items: tuple[Item, ...]
    samples: int
    layout: Layout
    metrics: tuple[Metric, ...]
    average: Literal["tasks", "prompts"]
    at_source_size: bool = False
    derive: Derive = unchanged
    more: More = nothing_more
    digest: str = ""
    problems: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.items or not self.metrics or self.samples < 1:
            raise ValueError(f"{self.name}: expected items, metrics and one or more samples, got {self.samples}")
        names = [item.id for item in self.items]
        if len(set(names)) < len(names):
            repeated = Counter(names).most_common(1)[0][0]
            raise ValueError(f"{self.name}: expected items of different ids, got {repeated!r} more than once")
        if not self.digest:
            object.__setattr__(self, "digest", items_digest(self.items))

    def limited(self, limit: int | None, samples: int | None = None) -> Benchmark:
        """Some of the items, evenly over the file, or another number of samples: for a quick look.

        The images are the same as in the whole; the numbers are labelled.

        Raises:
            ValueError: a number below 1, or more samples than the layout holds.
        """
        most = self.layout.most_samples
        for name, number in (("limit", limit), ("samples", samples)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected 1 or more, got {number}")
        if samples is not None and most is not None and samples > most:
            raise ValueError(f"samples: expected at most {most}, as {self.name} keeps its images, got {samples}")
        changed, count = self, len(self.items)
        if limit is not None and limit < count:
            kept = tuple(self.items[position * count // limit] for position in range(limit))
            told = f"{limit} of {count} prompts"
            changed = replace(changed, items=kept, deviations=(*changed.deviations, told))
        if samples is not None and samples != self.samples:
            told = f"{samples} images a prompt in place of {self.samples}"
            changed = replace(changed, samples=samples, deviations=(*changed.deviations, told))
        return changed


@dataclass(frozen=True)
class Scorer:
    """What scores the images of a benchmark.

    Attributes:
        reward: gives the values of an image, its total and its components.
        facts: what is printed beside the numbers: detector or judge, the templates' hashes, ...
        deviations: in what it differs from the published scorer; empty: its numbers compare with published ones.
        batch_size: images scored at once.
    """

    reward: Reward
    facts: Mapping[str, Any]
    deviations: tuple[str, ...] = ()
    batch_size: int = 64

    @property
    def fingerprint(self) -> str:
        """Of everything that its answers depend on, 16 hexadecimal digits."""
        from rewards.base import reward_name, reward_traits

        parts = [reward_name(self.reward), reward_traits(self.reward).fingerprint, dict(self.facts)]
        return digest_of(parts)


def digest_of(value: Any) -> str:
    """A hash of a JSON value, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def items_digest(items: Sequence[Item]) -> str:
    """A hash of the items: what is asked, in which order, and of which pictures."""
    return digest_of([[item.id, item.text, [picture.digest for picture in item.sources]] for item in items])


def count_deviations(items: Sequence[Item], expected: Mapping[str, int]) -> tuple[str, ...]:
    """What differs from the published number of items a task; empty where nothing does."""
    found = Counter(item.task for item in items)
    differ = [f"{task} {found[task]} and not {count}" for task, count in expected.items() if found[task] != count]
    unknown = tuple(f"{task}: no task of the benchmark" for task in sorted(set(found) - set(expected)))
    if not differ:
        return unknown
    # Where the number of all differs that says it; else the tasks do.
    published = sum(expected.values())
    told = f"{len(items)} prompts, published {published}"
    return (told if len(items) != published else f"prompts a task: {', '.join(differ)}", *unknown)
