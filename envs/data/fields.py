"""Which of a row's fields are the text, the picture to learn, and the pictures to edit: named, or found by usual names.

The usual names are those of the published sets: InstructPix2Pix, MagicBrush, UltraEdit, HQ-Edit, OmniEdit,
ShareGPT-4o-Image, X2I2, GPT-Image-Edit, Pico-Banana, of image folders, and of WebDataset's suffixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from envs.data.pictures import BadRowError

Kind = Literal["t2i", "edit", "t2i_prompt", "edit_prompt"]
"""What a record is for: learning to draw a text or to edit (with a target), or asking for it (without one)."""

INSTRUCTIONS = ("instruction", "edit_instruction", "edit_prompt", "edit", "prompt", "input_prompt", "text", "txt")
CAPTIONS = ("prompt", "caption", "input_prompt", "text", "txt", "long_caption", "short_caption", "instruction")
_MEMBERS = ("jpg", "jpeg", "png", "webp")
PICTURES = (*_MEMBERS, "image", "output_image", "target_image", "target", "img", "image_path", "file_name", "filename")
EDITED = ("output_image", "edited_image", "target_image", "target_img", "edited_img", "edited", "target", "output")
_BEFORE = ("input_image", "input_images", "source_image", "source_images", "original_image", "source_img", "src_img")
SOURCES = (*_BEFORE, "input_img", "source", "input", "original", "image", *_MEMBERS)
IDS = ("id", "__key__", "key", "uid")


@dataclass(frozen=True)
class Resolved:
    """The names in one file; empty where it has none. ``sources`` are several where a row has a field each."""

    text: str
    target: str
    sources: tuple[str, ...]
    id: str

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset(filter(None, (self.text, self.target, *self.sources, self.id)))


@dataclass(frozen=True)
class Fields:
    """Names of a row's fields; one that is left empty is found among the usual names, whatever their case.

    Attributes:
        text: prompt or instruction; of a list of texts the first is taken.
        target: the picture to learn.
        sources: the pictures to edit, a field each, or one field with a list.
        id: a name of the row; its file and number unless the row has one.
    """

    text: str = ""
    target: str = ""
    sources: tuple[str, ...] = ()
    id: str = ""

    def resolve(self, names: Sequence[str], kind: Kind) -> Resolved:
        """The names that a file with fields of these names uses.

        Raises:
            BadRowError: one that ``kind`` needs is not there.
        """
        return _resolve(self, tuple(names), kind)

    def wanted(self, names: Sequence[str], kind: Kind) -> frozenset[str]:
        """The names of :meth:`resolve`, or none where one is missing: every row then says so for itself."""
        try:
            return self.resolve(names, kind).names
        except BadRowError:
            return frozenset()


@lru_cache(maxsize=1024)
def _resolve(fields: Fields, names: tuple[str, ...], kind: Kind) -> Resolved:
    is_edit = kind.startswith("edit")
    text = _find(names, fields.text, INSTRUCTIONS if is_edit else CAPTIONS, "a text")
    target, sources = "", fields.sources if is_edit else ()
    if kind in ("t2i", "edit"):
        target = _find(names, fields.target, EDITED if is_edit else PICTURES, "a target picture")
    if is_edit and not sources:
        others = [name for name in names if name not in (text, target)]
        sources = (_find(others, "", SOURCES, "a source picture"),)
    for name in sources:
        _find(names, name, (), "a source picture")
    return Resolved(text, target, sources, fields.id if fields.id in names else _first(names, IDS))


def _find(names: Sequence[str], given: str, usual: Sequence[str], what: str) -> str:
    if given and given not in names:
        raise BadRowError(f"{what} in {given!r}", _listed(names))
    found = given or _first(names, usual)
    if not found:
        raise BadRowError(f"{what} under a usual name ({', '.join(usual[:4])}, ...)", _listed(names))
    return found


def _first(names: Sequence[str], usual: Sequence[str]) -> str:
    """The first of the usual names that is there, as it is written there; empty where none is."""
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), "")


def _listed(names: Sequence[str]) -> str:
    return f"the fields {', '.join(map(repr, names[:8])) or 'of an empty row'}; name them in Fields"
