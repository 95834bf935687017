"""Prompts from files of records, as many as there are: texts are known at once, pictures are decoded when drawn."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from envs.data.buckets import Size, crop_box, cropped
from envs.data.framing import Place
from envs.data.pictures import BadRowError, Limits, check_picture, picture_bytes
from envs.data.problems import Problems
from envs.data.records import Record, RecordFiles, RecordSet, listed
from envs.data.rows import BrokenRow, Row, held_bytes
from rewards.base import Images, Prompt

# A row that holds more is read again from its file when it is drawn.
_MOST_HELD = 2**16


class OtherSourcesError(ValueError):
    """No row has as many pictures to edit as were asked for. Attribute ``found``: how many most rows have."""

    def __init__(self, message: str, found: int) -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class _Entry:
    """A row that looks good: where, the row itself if it is small, what a held-out set may not share, pictures."""

    place: Place
    row: Row | None
    difficulty: float | None
    likeness: str
    num_sources: int


class RecordPool:
    """A pool of the prompts in files; satisfies ``envs.prompts.SourcedPool``. Made by :func:`prompts_from_records`.

    Within a draw none comes twice before all have come once. A picture that turns out damaged when it is decoded is
    counted, and the next prompt comes in its place.

    Args:
        files: where rows are read from.
        entries: the rows.
        image_size: (height, width) that pictures are cropped and resized to; None leaves them as they are.
        problems: what was wrong with other rows.
    """

    def __init__(
        self, files: RecordFiles, entries: Sequence[_Entry], image_size: Size | None, problems: Problems
    ) -> None:
        self._files, self._entries, self._image_size, self.problems = files, entries, image_size, problems

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_sources(self) -> int:
        """See :class:`envs.prompts.SourcedPool`; where rows differ the largest number, which the others then lack."""
        return max(entry.num_sources for entry in self._entries)

    def draw(self, rng: np.random.Generator, count: int, difficulty: tuple[float, float] = (0.0, 1.0)) -> list[Prompt]:
        """See :class:`envs.prompts.PromptPool`."""
        low, high = difficulty
        fitting = list(range(len(self._entries)))
        if low > 0 or high < 1:
            known = ((index, entry.difficulty) for index, entry in enumerate(self._entries))
            fitting = [index for index, value in known if value is not None and low <= value <= high]
        if not fitting:
            raise ValueError(
                f"difficulty: expected a range that holds one of the pool's {len(self)} prompts, got [{low}, {high}]; "
                "widen it, or give the rows a 'difficulty'"
            )
        drawn: list[Prompt] = []
        while len(drawn) < count:
            found = self._round(rng.permutation(fitting).tolist(), count - len(drawn))
            if not found:
                raise ValueError(
                    f"{', '.join(self._files.data.files)}: expected a prompt that can be used, got damaged pictures "
                    f"alone; the commonest reason: {self.problems.commonest()}"
                )
            drawn += found
        return drawn

    def first(self, count: int) -> list[Prompt]:
        """The first prompts that can be used, ``count`` of them or all."""
        return self._round(list(range(len(self._entries))), count)

    def split(self, count: int, seed: int = 0) -> tuple[RecordPool, RecordPool]:
        """A held-out pool of ``count`` prompts or a few more, and one of the others.

        What is alike stays together: prompts of one text, edits of one picture, which is the first of several.

        Raises:
            ValueError: nothing would be left.
        """
        kinds = list(dict.fromkeys(entry.likeness for entry in self._entries))
        order = np.random.default_rng(seed).permutation(len(kinds)).tolist()
        sizes: dict[str, int] = dict.fromkeys(kinds, 0)
        for entry in self._entries:
            sizes[entry.likeness] += 1
        held: set[str] = set()
        num_held = 0
        for index in order:
            if num_held >= count:
                break
            held.add(kinds[index])
            num_held += sizes[kinds[index]]
        parts = [[entry for entry in self._entries if (entry.likeness in held) is side] for side in (True, False)]
        if not all(parts) or num_held < count:
            raise ValueError(
                f"{', '.join(self._files.data.files)}: expected more than {count} prompts, to hold {count} out, got "
                f"{len(self)} of {len(kinds)} kinds; lower the number, or name a held-out file"
            )
        held_out, rest = (RecordPool(self._files, part, self._image_size, self.problems) for part in parts)
        return held_out, rest

    def _round(self, order: list[int], count: int) -> list[Prompt]:
        """The first ``count`` of some rows that can be used; fewer where there are no more."""
        found: list[Prompt] = []
        while order and len(found) < count:
            missing = count - len(found)
            found += self._usable([self._entries[index] for index in order[:missing]])
            order = order[missing:]
        return found

    def _usable(self, entries: Sequence[_Entry]) -> list[Prompt]:
        again: dict[int, list[int]] = {}
        for entry in entries:
            if entry.row is None:
                again.setdefault(entry.place.shard, []).append(entry.place.number)
        rows = {shard: self._files.rows_at(shard, numbers) for shard, numbers in again.items()}
        gone = BrokenRow("a row that was read before", "a shorter file")
        found = []
        for entry in entries:
            shard, number = entry.place.shard, entry.place.number
            row = entry.row if entry.row is not None else rows[shard].get(number, gone)
            try:
                found.append(as_prompt(self._files.record(row, shard, number), self._image_size))
            except BadRowError as error:
                self.problems.add(self._files.shards[shard].path, number, error)
        return found


def prompts_from_records(
    data: RecordSet,
    kind: Literal["t2i_prompt", "edit_prompt"],
    image_size: Size | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    num_sources: int | None = None,
) -> RecordPool:
    """The prompts of a data set: texts, or instructions with the pictures to edit; no target is needed.

    Every row is looked at once: its text, its picture's size. Bad ones are counted in the pool's ``problems``. A row's
    other values become the prompt's metadata, ``group`` its group.

    Args:
        data: the set.
        kind: what the prompts are for.
        image_size: (height, width) that pictures are cropped and resized to; None leaves them as they are.
        limits: what a row may cost.
        num_sources: pictures to edit of a row; one with another number is left out and counted. None is any number.

    Raises:
        FileNotFoundError: a path or a glob finds nothing.
        OtherSourcesError: no row of any file has ``num_sources`` pictures.
        ValueError: a file is of no known kind, or has no good row; the commonest reason is named.
    """
    files = RecordFiles(data, kind, limits)
    problems = Problems()
    entries: list[_Entry] = []
    others: Counter[int] = Counter()
    for shard, file in enumerate(files.shards):
        good = list(_good_rows(files, shard, problems))
        if not good:
            raise ValueError(
                f"{file.path}: expected at least one prompt, got "
                f"{f'bad rows alone, the commonest reason: {problems.commonest()}' if problems.num_bad else 'no row'}"
            )
        for entry in good:
            if num_sources in (None, entry.num_sources):
                entries.append(entry)
            else:
                others[entry.num_sources] += 1
                unlike = BadRowError(_to_edit(num_sources), str(entry.num_sources))
                problems.add(file.path, entry.place.number, unlike)
    if not entries:
        got = ", ".join(f"{number} ({count} rows)" for number, count in others.most_common())
        expected = f"{', '.join(data.files)}: expected rows with {_to_edit(num_sources)}"
        raise OtherSourcesError(f"{expected}, got {got}", others.most_common(1)[0][0])
    return RecordPool(files, entries, image_size, problems)


def as_prompt(record: Record, image_size: Size | None) -> Prompt:
    """A record as a prompt, its pictures cropped in the middle to a shape and resized."""
    metadata = dict(record.metadata)
    group = metadata.pop("group", "")
    sources = tuple(_resized(image, image_size) for image in record.sources)
    return Prompt(record.text, sources, metadata, record.id, group if isinstance(group, str) else "")


def _resized(image: Images, size: Size | None) -> Images:
    return image if size is None else cropped(image, crop_box(image.shape[:2], size), size)


def _to_edit(num_sources: int | None) -> str:
    return "one picture to edit" if num_sources == 1 else f"{num_sources} pictures to edit"


def _good_rows(files: RecordFiles, shard: int, problems: Problems) -> Iterator[_Entry]:
    """The good rows of a file, with however many pictures; bad ones are counted."""
    for number, row in files.rows(shard):
        problems.num_rows += 1
        try:
            yield _entry(files, row, shard, number)
        except BadRowError as error:
            problems.add(files.shards[shard].path, number, error)


def _entry(files: RecordFiles, row: Row, shard: int, number: int) -> _Entry:
    count = 0
    values = row.values()
    names = files.data.fields.resolve(tuple(values), files.kind)
    likeness = hashlib.sha256()
    for name in names.sources:
        for picture in listed(values[name], name):
            encoded = picture_bytes(picture, files.root(shard), files.limits, name)
            check_picture(encoded, files.limits, name)
            # The picture that is edited; the others are references, which many edits may share.
            if not count:
                likeness.update(encoded)
            count += 1
    text = files.text(values, names)
    if not names.sources:
        likeness.update(text.strip().lower().encode())
    given = values.get("difficulty")
    difficulty = float(given) if isinstance(given, int | float) else None
    kept = row if held_bytes(row) <= _MOST_HELD else None
    return _Entry(Place(0, shard, number), kept, difficulty, likeness.hexdigest(), count)
