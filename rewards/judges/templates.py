"""What a judge is asked: versioned text files, each with its readout, its placeholders checked and a hash.

A template begins with a header and ends, behind the rubric, with the image that is judged, so that the samples of one
prompt share everything before it and the server computes that once::

    readout: digits
    labels: 0 1 2 3 4 5
    ---
    You grade ... Request: {prompt} ... Image: {image}

Header: ``readout`` is digits, yes_no, pairwise or rubric; ``labels`` are for the first three; ``dimensions``
(``name 0-10, other 1-5``) and ``rule`` (min, mean, geometric_mean) for a rubric. Placeholders: ``{prompt}`` is the
prompt or the edit instruction, ``{source}`` its source images, ``{metadata.NAME}`` an entry of its metadata,
``{image}`` the image that is judged, ``{first}`` and ``{second}`` the two of a pair. Of several source images the first
one is what a template calls the picture before the edit; the others follow it behind :func:`reference_label`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rewards.judges.readouts import LabelReadout, digits, pairwise, yes_no
from rewards.judges.rubrics import Dimension, RubricReadout
from rewards.names import nearest

Readout = LabelReadout | RubricReadout
FOLDER = Path(__file__).parent / "templates"
LABEL_READOUTS = {"digits": digits, "yes_no": yes_no, "pairwise": pairwise}
READOUTS = (*LABEL_READOUTS, "rubric")
HEADER_KEYS = ("readout", "labels", "dimensions", "rule")
METADATA = "metadata."
PLACEHOLDERS = ("prompt", "source", "image", "first", "second")
IMAGE_PLACEHOLDERS = ("source", "image", "first", "second")
REFERENCES = (
    "\n\nThe picture above, before the edit, is picture 1. Reference pictures, which the instruction may speak of and "
    "which are not edited themselves:"
)
# JSON in a rubric has a quote or a space behind its brace, so it is no placeholder.
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)\}")
_DIMENSION = re.compile(r"(\w+) (\d+)-(\d+)")


@dataclass(frozen=True)
class Template:
    """A question for a judge; made by :func:`load_template` or :func:`parse_template`.

    Attributes:
        name: the file's name without ".txt", such as "edit_following.v1".
        sha256: of the file's text, 64 hexadecimal digits.
        readout: how an answer becomes a number.
        parts: the text, cut at its placeholders: (text, "") and ("", placeholder) in order.
    """

    name: str
    sha256: str
    readout: Readout
    parts: tuple[tuple[str, str], ...]

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Its placeholders in order."""
        return tuple(placeholder for _, placeholder in self.parts if placeholder)

    @property
    def is_pairwise(self) -> bool:
        """Whether it compares two images of a group."""
        return self.readout.kind == "pairwise"

    def num_pictures(self, num_sources: int = 1) -> int:
        """Images of a request for a prompt with so many source images."""
        counts = {name: num_sources if name == "source" else 1 for name in IMAGE_PLACEHOLDERS}
        return sum(counts.get(name, 0) for name in self.placeholders)


def reference_label(number: int) -> str:
    """The text before the source image of a number from 2 on, which is a reference and not what was edited."""
    return f"{REFERENCES if number == 2 else ''}\n\nPicture {number}: "


def template_names() -> list[str]:
    """The names of the templates that come with the library."""
    return sorted(path.name.removesuffix(".txt") for path in FOLDER.glob("*.txt"))


def load_template(template: str | Path) -> Template:
    """Load one of the library's templates by its name, or any by its path.

    Raises:
        ValueError: no such template (the nearest is named), or its text is not as the module's documentation says.
    """
    if isinstance(template, str) and template in template_names():
        path = FOLDER / f"{template}.txt"
    else:
        path = Path(template)
        if not path.is_file():
            near = nearest(str(template), template_names())
            raise ValueError(
                f"template: expected a path or one of {', '.join(template_names())}, got {str(template)!r}; "
                f"the nearest is {near!r}"
            )
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"template {path}: expected UTF-8 text: {error}") from error
    return parse_template(text, path.name.removesuffix(".txt"))


def parse_template(text: str, name: str) -> Template:
    """Make a template of its text; ``name`` is for logs and messages.

    Raises:
        ValueError: the header or a placeholder is not as the module's documentation says.
    """
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    head, line, body = text.replace("\r\n", "\n").partition("\n---\n")
    if not line:
        raise ValueError(f"template {name}: expected a header, a line of --- and the question; there is no such line")
    readout = _readout(_header(head, name), name)
    pieces = _PLACEHOLDER.split(body.strip())
    # The pattern has one group, so texts and placeholders alternate.
    parts = [(piece, "") if index % 2 == 0 else ("", piece) for index, piece in enumerate(pieces)]
    template = Template(name, sha256, readout, tuple(part for part in parts if any(part)))
    _check_placeholders(template)
    return template


def _header(head: str, name: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    for line in head.splitlines():
        key, colon, value = (piece.strip() for piece in line.partition(":"))
        if not colon or key not in HEADER_KEYS:
            raise ValueError(
                f"template {name}: expected header lines 'KEY: VALUE' with {', '.join(HEADER_KEYS)}, got {line!r}; "
                f"the nearest key is {nearest(key, HEADER_KEYS)!r}"
            )
        entries[key] = value
    return entries


def _readout(header: Mapping[str, str], name: str) -> Readout:
    kind = header.get("readout", "")
    if kind not in READOUTS:
        raise ValueError(
            f"template {name}: readout: expected one of {', '.join(READOUTS)}, got {kind!r}; "
            f"the nearest is {nearest(kind, READOUTS)!r}"
        )
    allowed = {"readout", "dimensions", "rule"} if kind == "rubric" else {"readout", "labels"}
    if extra := sorted(header.keys() - allowed):
        raise ValueError(f"template {name}: {', '.join(extra)}: not for the readout {kind}; remove it")
    try:
        if kind == "rubric":
            # RubricReadout checks the rule, which is any text here.
            return RubricReadout(_dimensions(header.get("dimensions", "")), header.get("rule", "min"))  # type: ignore[arg-type]
        build, labels = LABEL_READOUTS[kind], header.get("labels", "").split()
        return build(labels) if labels else build()
    except ValueError as error:
        raise ValueError(f"template {name}: {error}") from error


def _dimensions(text: str) -> tuple[Dimension, ...]:
    matches = [_DIMENSION.fullmatch(piece.strip()) for piece in text.split(",")]
    if not all(matches):
        raise ValueError(f"dimensions: expected such as 'edit_success 0-10, restraint 0-10', got {text!r}")
    return tuple(Dimension(match[1], int(match[2]), int(match[3])) for match in matches if match)


def _check_placeholders(template: Template) -> None:
    names = template.placeholders
    for name in names:
        if name not in PLACEHOLDERS and not (name.startswith(METADATA) and len(name) > len(METADATA)):
            raise ValueError(
                f"template {template.name}: unknown placeholder {{{name}}}; expected {', '.join(PLACEHOLDERS)} or "
                f"{METADATA}NAME; the nearest is {{{nearest(name, PLACEHOLDERS)}}}"
            )
    judged = ("first", "second") if template.is_pairwise else ("image",)
    found = tuple(name for name in names if name in ("image", "first", "second"))
    if found != judged:
        needed = " and ".join(f"{{{name}}}" for name in judged)
        raise ValueError(
            f"template {template.name}: expected {needed} once each and in this order for the readout "
            f"{template.readout.kind}, got {', '.join(found) or 'none'}"
        )
    if names[-1] != judged[-1] or template.parts[-1] != ("", judged[-1]):
        raise ValueError(
            f"template {template.name}: expected {{{judged[-1]}}} at the very end, so that the samples of a prompt "
            "share what is before it (the server's prefix cache); move the text behind it to the front"
        )
