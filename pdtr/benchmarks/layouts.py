"""Where a benchmark's images lie: the layouts that the official scorers read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from pdtr.benchmarks.pictures import Picture, save_picture

if TYPE_CHECKING:
    from pdtr.benchmarks.base import Item
    from rewards.base import Images

_SAFE = re.compile(r"[\w-][\w .()-]*")


class Layout(Protocol):
    """Where the images of an item are; ``samples`` is how many it has, ``most_samples`` (None: any) its bound."""

    @property
    def most_samples(self) -> int | None: ...  # noqa: D102

    def missing(self, root: Path, item: Item, samples: int) -> list[int]:
        """The samples that are not there."""
        ...

    def write(self, root: Path, item: Item, images: Mapping[int, Images]) -> None:
        """Write samples; all those that were missing come at once."""
        ...

    def read(self, root: Path, item: Item, samples: int) -> list[Images]:
        """All samples, uint8 [H, W, 3] each.

        Raises:
            ValueError: one is not there, is no picture, or belongs to another prompt.
        """
        ...


def is_safe_name(name: object) -> bool:
    """Whether something is a text that may be a part of a path: no folder, no hidden file."""
    return isinstance(name, str) and len(name) <= 200 and _SAFE.fullmatch(name) is not None


@dataclass(frozen=True)
class SampleFolders:
    """GenEval's: ``00012/metadata.jsonl``, one line, and ``00012/samples/0000.png`` and on."""

    most_samples: ClassVar[int | None] = None

    def missing(self, root: Path, item: Item, samples: int) -> list[int]:
        """See :class:`Layout`."""
        return [sample for sample in range(samples) if not self._path(root, item, sample).is_file()]

    def write(self, root: Path, item: Item, images: Mapping[int, Images]) -> None:
        """See :class:`Layout`."""
        for sample, image in images.items():
            save_picture(self._path(root, item, sample), image)
        # The prompt stands last in GenEval's own lines.
        line = {**{key: value for key, value in item.metadata.items() if key != "prompt"}, "prompt": item.text}
        self._metadata(root, item).write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8")

    def read(self, root: Path, item: Item, samples: int) -> list[Images]:
        """See :class:`Layout`."""
        path = self._metadata(root, item)
        if path.is_file():
            _check_prompt(path, item)
        paths = [self._path(root, item, sample) for sample in range(samples)]
        return [Picture(str(path), path).load() for path in paths]

    def _path(self, root: Path, item: Item, sample: int) -> Path:
        return root / f"{item.index:05d}" / "samples" / f"{sample:04d}.png"

    def _metadata(self, root: Path, item: Item) -> Path:
        return root / f"{item.index:05d}" / "metadata.jsonl"


def _check_prompt(path: Path, item: Item) -> None:
    try:
        found = json.loads(path.read_text("utf-8"))["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected one line of JSON with a prompt, got another file ({error!r})") from error
    if found != item.text:
        raise ValueError(
            f"{path}: expected the images of {item.text!r}, got those of {found!r}; they are of another prompts file"
        )


@dataclass(frozen=True)
class Grids:
    """DPG-Bench's: one ``ID.png`` with four samples, two by two, without gaps."""

    most_samples: ClassVar[int | None] = 4

    def missing(self, root: Path, item: Item, samples: int) -> list[int]:
        """See :class:`Layout`."""
        return [] if self._path(root, item).is_file() else list(range(samples))

    def write(self, root: Path, item: Item, images: Mapping[int, Images]) -> None:
        """See :class:`Layout`."""
        tiles = [images[sample] for sample in sorted(images)]
        if len(tiles) > 4:
            raise ValueError(f"{item.id}: expected at most 4 images for a grid of two by two, got {len(tiles)}")
        blank = np.zeros_like(tiles[0])
        tiles += [blank] * (4 - len(tiles))
        rows = [np.concatenate(tiles[start : start + 2], axis=1) for start in (0, 2)]
        save_picture(self._path(root, item), np.concatenate(rows, axis=0))

    def read(self, root: Path, item: Item, samples: int) -> list[Images]:
        """See :class:`Layout`."""
        path = self._path(root, item)
        grid = Picture(str(path), path).load()
        height, width = grid.shape[0] // 2, grid.shape[1] // 2
        if grid.shape[0] % 2 or grid.shape[1] % 2:
            raise ValueError(f"{path}: expected a grid of two by two, got a picture of {grid.shape[1]}x{grid.shape[0]}")
        corners = [(top, left) for top in (0, height) for left in (0, width)]
        return [grid[top : top + height, left : left + width] for top, left in corners[:samples]]

    def _path(self, root: Path, item: Item) -> Path:
        return root / f"{item.id}.png"


@dataclass(frozen=True)
class OneEach:
    """One picture an item, under a path made of the item's task, language, id and place in the file.

    Attributes:
        pattern: with ``{task}``, ``{language}``, ``{id}`` and ``{index}``.
        source_pattern: where its source is kept, as GEdit-Bench's scorer reads it; empty: nowhere.
    """

    most_samples: ClassVar[int | None] = 1

    pattern: str = "{id}.png"
    source_pattern: str = ""

    def missing(self, root: Path, item: Item, samples: int) -> list[int]:
        """See :class:`Layout`."""
        return [] if self._path(root, item, self.pattern).is_file() else [0]

    def write(self, root: Path, item: Item, images: Mapping[int, Images]) -> None:
        """See :class:`Layout`."""
        save_picture(self._path(root, item, self.pattern), images[0])
        if self.source_pattern:
            source = (item.shown_sources or item.sources)[0]
            save_picture(self._path(root, item, self.source_pattern), source.load())

    def read(self, root: Path, item: Item, samples: int) -> list[Images]:
        """See :class:`Layout`."""
        path = self._path(root, item, self.pattern)
        return [Picture(str(path), path).load()]

    def _path(self, root: Path, item: Item, pattern: str) -> Path:
        language = item.metadata.get("language", "")
        return root / pattern.format(task=item.task, language=language, id=item.id, index=item.index)
