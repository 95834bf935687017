"""A record cut to a bucket: source and target of an edit alike."""

from __future__ import annotations

from dataclasses import dataclass

from envs.data.buckets import RATIOS, bucket_size, crop_box, cropped, nearest_ratio
from envs.data.pictures import BadRowError
from envs.data.records import Record
from rewards.base import Images


@dataclass(frozen=True)
class Place:
    """Where a row is: set, file of the set, number in the file."""

    data: int
    shard: int
    number: int


@dataclass(frozen=True)
class Example:
    """A record cut to a bucket.

    Attributes:
        place: where it is from.
        text: prompt or instruction.
        ratio: index of its bucket's ratio.
        size: S that the bucket's size follows from.
        target: uint8 [H, W, 3].
        source: the same size; None in text-to-image.
    """

    place: Place
    text: str
    ratio: int
    size: int
    target: Images
    source: Images | None = None


def framed(record: Record, place: Place, size: int, most_stretch: float) -> Example:
    """Cut a record's pictures to the bucket that is nearest to the target: one crop, relative to each, for both.

    Args:
        record: with a target, and one source or none.
        place: where it is from.
        size: S of the bucket.
        most_stretch: how much wider or narrower than the target's the source's shape may be.

    Raises:
        BadRowError: there are several sources, or one of another shape.
    """
    target = record.target
    assert target is not None
    if len(record.sources) > 1:
        raise BadRowError("one source picture", f"{len(record.sources)}")
    shape = target.shape[:2]
    ratio = nearest_ratio(shape)
    into = bucket_size(RATIOS[ratio], size)
    box = crop_box(shape, into)
    source = None
    if record.sources:
        height, width = record.sources[0].shape[:2]
        stretch = (width / height) / (shape[1] / shape[0])
        if max(stretch, 1 / stretch) > most_stretch:
            raise BadRowError("a source of the target's shape", f"{width}x{height} for {shape[1]}x{shape[0]}")
        source = cropped(record.sources[0], box, into)
    return Example(place, record.text, ratio, size, cropped(target, box, into), source)
