"""Where prompts come from: the pool protocol, fixed lists, and files in the formats that benchmarks are published in.

Three formats, told apart by the suffix and the keys:

- ``.txt``: one prompt a line (DrawBench, the OCR prompts of Flow-GRPO). Lines end with a line feed alone.
- ``.jsonl`` with ``prompt``: GenEval's ``evaluation_metadata.jsonl`` (arXiv:2310.11513); the other keys are metadata.
- ``.jsonl`` with ``prompt`` and ``image`` (a path, or a list of paths): edit instructions and the pictures to edit.

``id`` and ``group`` are optional keys of a row and become the prompt's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from envs.data.lines import bounded_lines, decode_text, parse_object
from envs.data.pictures import BadRowError, Limits, decode_picture, read_below
from envs.spaces import UnicodeText, describe_text
from rewards.base import Images, Prompt

MAX_BYTES = 2**25
MAX_IMAGE_PIXELS = 2**26
RESERVED_KEYS = ("prompt", "image", "id", "group")
SUFFIXES = (".txt", ".jsonl")
_TEXT = UnicodeText()


@runtime_checkable
class PromptPool(Protocol):
    """Anything that prompts can be drawn from."""

    def draw(self, rng: np.random.Generator, count: int, difficulty: tuple[float, float] = (0.0, 1.0)) -> list[Prompt]:
        """Draw ``count`` prompts whose ``metadata["difficulty"]`` lies in ``difficulty``, both ends included.

        Raises:
            ValueError: the pool holds no such prompt.
        """
        ...


@runtime_checkable
class SourcedPool(PromptPool, Protocol):
    """A pool that says how many pictures its prompts have; editing expects one each of a pool that does not."""

    @property
    def num_sources(self) -> int:
        """Source images of every prompt."""
        ...


@dataclass(frozen=True)
class FixedPool:
    """A list of prompts. Within a draw none comes twice before all have come once.

    A prompt without ``metadata["difficulty"]`` is drawn only where the range is the whole of [0, 1].

    Raises:
        ValueError: ``prompts`` is empty.
    """

    prompts: Sequence[Prompt]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts: expected at least one prompt, got none")

    @property
    def num_sources(self) -> int:
        """See :class:`SourcedPool`; where they differ the largest number, which the others then lack."""
        return max(len(prompt.source_images) for prompt in self.prompts)

    def draw(self, rng: np.random.Generator, count: int, difficulty: tuple[float, float] = (0.0, 1.0)) -> list[Prompt]:
        """See :class:`PromptPool`."""
        low, high = difficulty
        fitting = list(self.prompts)
        if low > 0 or high < 1:
            known = [(prompt, prompt.metadata.get("difficulty")) for prompt in self.prompts]
            fitting = [prompt for prompt, value in known if value is not None and low <= value <= high]
        if not fitting:
            raise ValueError(
                f"difficulty: expected a range that holds one of the pool's {len(self.prompts)} prompts, got "
                f"[{low}, {high}]; widen it, or give the prompts metadata['difficulty']"
            )
        rounds = -(-count // len(fitting))
        order = np.concatenate([rng.permutation(len(fitting)) for _ in range(rounds)] or [np.empty(0, np.int64)])
        return [fitting[index] for index in order[:count].tolist()]


@dataclass(frozen=True)
class Problem:
    """A row that was skipped: its line number from 1, what was expected there, and what came."""

    line: int
    expected: str
    got: str

    def __str__(self) -> str:
        return f"line {self.line}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class LoadedPrompts:
    """What a file held: its good rows as prompts, and what was wrong with the others."""

    prompts: tuple[Prompt, ...]
    problems: tuple[Problem, ...]


def load_prompts(path: Path | str, image_root: Path | str | None = None, max_bytes: int = MAX_BYTES) -> LoadedPrompts:
    """Read prompts from a file in one of this module's formats.

    A bad row is skipped and listed in ``problems``. A row without an id gets the file's stem and its line number.

    Args:
        path: a ``.txt`` or ``.jsonl`` file, UTF-8.
        image_root: folder that the pictures' paths start from; the file's own unless given. Paths may not leave it.
        max_bytes: the longest line, and the largest picture file, that is read. A picture may besides have no more
            than ``MAX_IMAGE_PIXELS`` pixels.

    Raises:
        FileNotFoundError: there is no such file; the message names the nearest.
        ValueError: the suffix is unknown, or no row is good.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    parse = _row_parser(path, root, max_bytes)
    if not path.is_file():
        _raise_missing(path)
    prompts, problems = [], []
    with path.open("rb") as handle:
        for number, line in enumerate(bounded_lines(handle, max_bytes), start=1):
            try:
                if line is None:
                    raise BadRowError(f"a line of at most {max_bytes} bytes", "a longer one")
                prompts.append(parse(decode_text(line, number == 1), f"{path.stem}/{number:05d}"))
            except BadRowError as error:
                problems.append(Problem(number, *error.args))
    if not prompts:
        found = f"{len(problems)} bad rows, the first: {problems[0]}" if problems else "an empty file"
        raise ValueError(f"{path}: expected at least one good row, got {found}")
    return LoadedPrompts(tuple(prompts), tuple(problems))


def _row_parser(path: Path, root: Path, max_bytes: int) -> Callable[[str, str], Prompt]:
    if path.suffix == ".txt":
        return lambda line, name: Prompt(_checked_text(line), id=name)
    if path.suffix == ".jsonl":
        return lambda line, name: _parse_row(line, name, root, max_bytes)
    nearest = get_close_matches(path.suffix, SUFFIXES, 1, cutoff=0)[0]
    raise ValueError(
        f"{path}: expected a file ending in {' or '.join(SUFFIXES)}, got {path.suffix!r}; did you mean "
        f"{path.with_suffix(nearest).name}?"
    )


def _raise_missing(path: Path) -> NoReturn:
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []
    nearest = get_close_matches(path.name, names, 1, cutoff=0.3)
    hint = f"the nearest name there is {nearest[0]}" if nearest else f"no file in {folder} has a name like it"
    if not folder.is_dir():
        hint = f"there is no folder {folder}"
    raise FileNotFoundError(f"{path}: expected a prompts file, got no such file; {hint}")


def _checked_text(text: str) -> str:
    if not text.strip():
        raise BadRowError("a prompt", "an empty line")
    if text not in _TEXT:
        raise BadRowError(_TEXT.description, describe_text(text))
    return text


def _parse_row(line: str, name: str, root: Path, max_bytes: int) -> Prompt:
    row = parse_object(line)
    if row.get("prompt") not in _TEXT:
        keys = ", ".join(map(repr, list(row)[:8]))
        got = describe_text(row["prompt"]) if "prompt" in row else f"the keys {keys or 'of an empty object'}"
        raise BadRowError(f"'prompt': {_TEXT.description}", got)
    for key in ("id", "group"):
        if not isinstance(row.get(key, ""), str):
            raise BadRowError(f"{key!r}: a string", describe_text(row[key]))
    paths = row.get("image", [])
    sources = tuple(_load_image(each, root, max_bytes) for each in (paths if isinstance(paths, list) else [paths]))
    metadata = {key: value for key, value in row.items() if key not in RESERVED_KEYS}
    return Prompt(row["prompt"], sources, metadata, row.get("id", name), row.get("group", ""))


def _load_image(path: object, root: Path, max_bytes: int) -> Images:
    if not isinstance(path, str) or not path:
        raise BadRowError("'image': a relative path or a list of them", repr(path)[:80])
    limits = Limits(max_bytes, MAX_IMAGE_PIXELS)
    return decode_picture(read_below(path, root, limits, "image"), limits, repr(path))


def save_prompts(path: Path | str, prompts: Sequence[Prompt]) -> None:
    """Write prompts so that :func:`load_prompts` reads the same texts, pictures, metadata, ids and groups.

    Pictures go losslessly, as PNG, into ``<stem>_images`` beside a ``.jsonl``. A ``.txt`` holds texts alone; ids are
    then made anew from the line numbers.

    Raises:
        ValueError: the suffix is unknown, there is no prompt, or a prompt cannot be written without loss.
    """
    path = Path(path)
    _row_parser(path, path.parent, 0)
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt to save, got none")
    if path.suffix == ".txt":
        rows = [_text_row(prompt, index) for index, prompt in enumerate(prompts)]
    else:
        rows = [_json_row(prompt, index, path) for index, prompt in enumerate(prompts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        _save_images(path, prompts)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes("".join(f"{row}\n" for row in rows).encode())
    partial.replace(path)


def _text_row(prompt: Prompt, index: int) -> str:
    text = prompt.text
    blank = not text.strip() or text not in _TEXT
    if prompt.metadata or prompt.source_images or blank or {"\n", "\r"} & set(text) or text.startswith("\ufeff"):
        raise ValueError(
            f"prompts[{index}]: expected one line of text alone for a .txt file, got {describe_text(text)}, metadata "
            f"{dict(prompt.metadata)} and {len(prompt.source_images)} source images; save it as .jsonl"
        )
    return text


def _json_row(prompt: Prompt, index: int, path: Path) -> str:
    if prompt.text not in _TEXT:
        raise ValueError(f"prompts[{index}].text: expected {_TEXT.description}, got {describe_text(prompt.text)}")
    reserved = [key for key in RESERVED_KEYS if key in prompt.metadata]
    if reserved:
        raise ValueError(
            f"prompts[{index}].metadata: expected keys other than {', '.join(RESERVED_KEYS)}, which the file uses "
            f"itself, got {reserved[0]!r}; rename it, or leave it out"
        )
    row: dict[str, Any] = {"prompt": prompt.text, "id": prompt.id}
    if prompt.group:
        row["group"] = prompt.group
    names = _image_names(prompt, index, path)
    if names:
        row["image"] = names[0] if len(names) == 1 else names
    return _exact_json({**row, **prompt.metadata}, prompt.metadata, index)


def _exact_json(row: Mapping[str, Any], metadata: Mapping[str, Any], index: int) -> str:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        text.encode()
        same = {key: value for key, value in json.loads(text).items() if key in metadata} == dict(metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompts[{index}].metadata: expected JSON values, got {error}") from error
    if not same:
        raise ValueError(
            f"prompts[{index}].metadata: expected JSON values that are read back as they were, got "
            f"{str(dict(metadata))[:200]}; write tuples as lists, and keys as strings"
        )
    return text


def _image_names(prompt: Prompt, index: int, path: Path) -> list[str]:
    """Paths of a prompt's pictures, relative to the file's folder."""
    for image in prompt.source_images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"prompts[{index}].source_images: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}"
            )
    return [f"{path.stem}_images/{index:05d}_{number}.png" for number in range(len(prompt.source_images))]


def _save_images(path: Path, prompts: Sequence[Prompt]) -> None:
    for index, prompt in enumerate(prompts):
        for name, image in zip(_image_names(prompt, index, path), prompt.source_images, strict=True):
            (path.parent / name).parent.mkdir(exist_ok=True)
            Image.fromarray(np.ascontiguousarray(image)).save(path.parent / name)
