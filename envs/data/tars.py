"""WebDataset tars: consecutive members of one key are a row; pictures stay in the tar until they are wanted.

A member's key is its path up to the first dot of its name, what follows names the field: ``7.jpg`` and ``7.txt`` are
the fields ``jpg`` and ``txt`` of row 7, ``7.source.png`` is ``source``, and a ``.json`` adds the keys of its object.
Members that are no plain files, hidden ones, and those of other suffixes are passed over. Nothing is written to disk.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from envs.data.lines import decode_text, parse_object
from envs.data.parts import Blob, Parts, PartsReader
from envs.data.pictures import BadRowError, Limits

_PICTURES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "text", "caption", "prompt")
_BLOCK = 512


@dataclass(frozen=True)
class TarRow:
    """The members of one key.

    Attributes:
        key: what they have in common.
        members: (what follows the key in the name, where its bytes are).
        max_bytes: of a text or an object.
    """

    key: str
    members: tuple[tuple[str, Blob], ...]
    max_bytes: int

    def values(self) -> Mapping[str, Any]:
        """See :class:`envs.data.rows.Row`; the key is ``__key__``, and a member goes before an object's entry."""
        found: dict[str, Any] = {}
        objects: dict[str, Any] = {}
        for name, blob in self.members:
            stem, _, suffix = name.rpartition(".")
            field = stem or suffix
            if suffix == "json":
                objects |= parse_object(self._text(name, blob))
                continue
            if field in found:
                raise BadRowError("members of different names", f"{field!r} twice")
            found[field] = blob if suffix in _PICTURES else self._text(name, blob)
        return {**objects, **found, "__key__": self.key}

    def _text(self, name: str, blob: Blob) -> str:
        if blob.size > self.max_bytes:
            raise BadRowError(f"a text of at most {self.max_bytes} bytes", f"{name} of {blob.size}")
        try:
            return decode_text(blob.read(), is_first=True).strip()
        except OSError as error:
            raise BadRowError("a whole tar file", str(error)) from error


def tar_rows(parts: Parts, limits: Limits) -> Iterator[TarRow]:
    """The rows of a tar, in order.

    Raises:
        tarfile.TarError: the tar is cut off or damaged, after the rows before that.
        OSError: it cannot be read.
    """
    for key, members in groupby(_members(parts), lambda member: member[0]):
        yield TarRow(key, tuple((name, blob) for _, name, blob in members), limits.max_bytes)


def _members(parts: Parts) -> Iterator[tuple[str, str, Blob]]:
    """(key, rest of the name, where it is) of every member that a row may have."""
    with io.BufferedReader(PartsReader(parts)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        before = -1
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # It would keep them all.
            if member.offset <= before or member.size < 0:
                raise tarfile.ReadError(f"a header at byte {member.offset} that leads back")
            before = member.offset
            folder, slash, base = member.name.rpartition("/")
            stem, dot, name = base.partition(".")
            is_known = name.rpartition(".")[2].lower() in (*_PICTURES, *_TEXTS, "json")
            if member.isreg() and not member.issparse() and stem and dot and is_known:
                yield f"{folder}{slash}{stem}", name.lower(), Blob(parts, member.offset_data, member.size)
        # tarfile takes a damaged header for the end; a real end is zeros, or nothing more.
        file.seek(archive.offset)
        if any(file.read(_BLOCK)):
            raise tarfile.ReadError(f"a damaged header at byte {archive.offset}")
