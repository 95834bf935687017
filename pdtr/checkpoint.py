"""Checkpoints: safetensors and JSON in a folder that is either whole or not there.

A checkpoint is written into a temporary folder beside its place, flushed to the disk, and renamed into place, so that
a kill or a full disk at any moment leaves the ones before it untouched. Its manifest, written last, has the size and
the SHA-256 of each file; nothing is read that does not agree with it. Nothing is pickled.

    step-000120/
        tensors.safetensors
        meta.json
        manifest.json

One process writes in a run's folder; any number may read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = "pdtr-checkpoint"
VERSION = 1
_TENSORS, _META, _MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".writing-"
_ASIDE = ".replaced-"


class State(NamedTuple):
    """What a checkpoint holds: tensors on the CPU by name, and JSON."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written.

    Attributes:
        folder: the checkpoint.
        problem: what is wrong with it.
        previous: a whole one to fall back to; None where there is none.

    Args:
        folder: the checkpoint.
        problem: what is wrong with it.
        previous: a whole one to fall back to.
        ending: what to do; by default how to go on from ``previous``, with ``folder`` out of the way.
    """

    def __init__(self, folder: Path, problem: str, previous: Path | None = None, ending: str | None = None) -> None:
        super().__init__(f"checkpoint {folder}: {problem}; {ending or _way_back(folder, previous)}")
        self.folder, self.problem, self.previous = folder, problem, previous


def _way_back(folder: Path, previous: Path | None) -> str:
    if previous is None:
        return "there is no whole checkpoint before it"
    if previous.parent == folder:
        return f"it is a folder of checkpoints, whose newest whole one is {previous}"
    return f"to go on from {previous}, delete {folder} and resume"


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after ``step`` iterations: ``step-000120``."""
    if step < 0:
        raise ValueError(f"step: expected at least 0, got {step}")
    return f"step-{step:06d}"


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints in a run's folder by rising step, whole or not; what a kill left behind is no checkpoint."""
    if not run_folder.is_dir():
        return []
    return sorted((path for path in run_folder.iterdir() if _step(path) is not None and path.is_dir()), key=_step_of)


def latest(run_folder: Path) -> Path | None:
    """The checkpoint with the highest step; None where there is none. ``load_state`` finds out whether it is whole."""
    return next(reversed(checkpoints(run_folder)), None)


def prune(run_folder: Path, keep: int) -> list[Path]:
    """Delete all but the ``keep`` checkpoints with the highest steps, and what a kill left behind. -> the deleted."""
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}; a run without a checkpoint cannot be resumed")
    clean_up(run_folder)
    surplus = checkpoints(run_folder)[:-keep]
    for folder in surplus:
        # Renamed first, so that a kill in the middle leaves nothing that looks like a checkpoint.
        _delete(folder.rename(folder.with_name(_TEMPORARY + folder.name)))
    return surplus


def clean_up(run_folder: Path) -> None:
    """Delete what a kill left behind in a run's folder; only for the process that writes there."""
    if not run_folder.is_dir():
        return
    for path in sorted(run_folder.iterdir()):
        original = path.with_name(path.name.removeprefix(_ASIDE))
        if path.name.startswith(_ASIDE) and not original.exists():
            path.rename(original)
        elif path.name.startswith((_ASIDE, _TEMPORARY)):
            _delete(path)


def save_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint so that it is there whole, or not at all; one of the same name is replaced.

    Args:
        folder: where; its parents are made.
        tensors: any device and layout, every dtype that safetensors has; tensors that share memory are written apart.
        meta: JSON: string keys, lists, finite numbers.

    Raises:
        CheckpointError: the disk is full, or ``folder`` is something else than a checkpoint.
        ValueError: a tensor or a part of ``meta`` cannot be written so that it reads back the same.
    """
    text = _json(meta)
    if folder.exists() and not _is_ours(folder):
        raise CheckpointError(folder, "exists and is not a checkpoint, and is not overwritten; choose another folder")
    with _full_disk_explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        clean_up(folder.parent)
        temporary = folder.with_name(_TEMPORARY + folder.name)
        try:
            temporary.mkdir()
            _write_tensors(temporary / _TENSORS, tensors)
            _write(temporary / _META, text)
            _write(temporary / _MANIFEST, _manifest({name: _describe(temporary / name) for name in (_TENSORS, _META)}))
            _flush(temporary)
            _move_into_place(temporary, folder)
        finally:
            _delete(temporary)


def check_state(folder: Path) -> None:
    """Read every byte of a checkpoint, once, and compare it with the manifest.

    Raises:
        CheckpointError: it is missing, truncated, damaged or foreign; ``previous`` is the newest whole one before it.
    """
    if (problem := _problem(folder)) is not None:
        raise CheckpointError(folder, problem, _previous(folder))


def load_state(folder: Path, prefix: str = "", is_checked: bool = False) -> State:
    """Read a checkpoint, after every byte of it has been checked; tensors are mapped, and read where they are used.

    Args:
        folder: the checkpoint.
        prefix: tensors whose names start otherwise are left on the disk.
        is_checked: :func:`check_state` has found it whole, maybe in another process.

    Raises:
        CheckpointError: see :func:`check_state`.
    """
    if not is_checked:
        check_state(folder)
    from safetensors import safe_open

    with safe_open(folder / _TENSORS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    return State(tensors, json.loads((folder / _META).read_bytes()))


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser as tensors and JSON, for ``save_state``.

    The tensors are the live ones, for a copy would double the memory: save them before the next step.

    Raises:
        ValueError: the optimiser keeps something that is neither a tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}
    packed = optimizer.state_dict()
    state = {
        str(index): {name: _split(value, f"state.{index}.{name}", tensors) for name, value in entry.items()}
        for index, entry in packed["state"].items()
    }
    groups = [
        {name: _split(value, f"group.{index}.{name}", tensors) for name, value in group.items()}
        for index, group in enumerate(packed["param_groups"])
    ]
    meta = {"optimizer": type(optimizer).__name__, "shapes": _shapes(optimizer), "state": state, "groups": groups}
    json.loads(_json(meta))
    return tensors, meta


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Put an optimiser into a state that ``optimizer_state`` took, bit for bit; its hyper-parameters too.

    Raises:
        ValueError: the optimiser is of another class, its parameters have other shapes, or a tensor is missing.
    """
    import torch

    expected = {"optimizer": type(optimizer).__name__, "shapes": _shapes(optimizer)}
    for key, value in expected.items():
        if meta.get(key) != value:
            raise ValueError(f"optimizer state: expected {key} {value}, got {meta.get(key)}; make the optimiser alike")
    state = {
        int(index): {name: _join(value, tensors) for name, value in entry.items()}
        for index, entry in meta["state"].items()
    }
    groups = [{name: _join(value, tensors) for name, value in group.items()} for group in meta["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # torch casts each state tensor to its parameter's dtype, which is not what was saved where the two differ.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in state.items():
        loaded = optimizer.state[parameters[index]]
        for name, value in entry.items():
            if isinstance(value, torch.Tensor) and value.dtype != loaded[name].dtype:
                loaded[name] = value.to(loaded[name].device)


def _step(path: Path) -> int | None:
    match = _NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def _step_of(path: Path) -> int:
    step = _step(path)
    return -1 if step is None else step


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return _step(folder) is not None or (folder / _MANIFEST).is_file() or not any(folder.iterdir())


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        raw = (folder / _MANIFEST).read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        return f"{_MANIFEST} is missing: it is not a checkpoint, or was not copied whole"
    except (ValueError, OSError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f"{_MANIFEST} is not that of a {FORMAT}: it is a foreign format"
    if manifest.get("version") != VERSION:
        return f"expected version {VERSION} of the format, got {manifest.get('version')!r}"
    found: dict[str, dict[str, Any]] = {}
    for name in (_TENSORS, _META):
        try:
            found[name] = _describe(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if (problem := _file_problem(name, found[name], manifest)) is not None:
            return problem
    # The manifest is what the files give, to the byte; so a flipped bit in it cannot hide either.
    return None if raw == _manifest(found) else f"{_MANIFEST} is damaged"


def _file_problem(name: str, found: Mapping[str, Any], manifest: Mapping[str, Any]) -> str | None:
    try:
        entry = manifest["files"][name]
        size, digest = entry["size"], entry["sha256"]
    except (KeyError, TypeError):
        return f"{_MANIFEST} is damaged: it does not describe {name}"
    if found["size"] != size:
        return f"{name} is truncated or was changed: expected {size} bytes, got {found['size']}"
    return None if found["sha256"] == digest else f"{name} is damaged: its SHA-256 is not the manifest's"


def _previous(folder: Path) -> Path | None:
    """The newest whole checkpoint before this one, or in this folder where it is a run's."""
    step = _step(folder)
    earlier = [path for path in checkpoints(folder.parent) if step is None or _step_of(path) < step]
    candidates = checkpoints(folder) or earlier
    return next((path for path in reversed(candidates) if _problem(path) is None), None)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    return _json({"format": FORMAT, "version": VERSION, "files": files})


def _json(value: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(value, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta: expected JSON with finite numbers, got something else ({error})") from error
    if json.loads(text) != value:
        raise ValueError("meta: does not read back the same; use string keys, and lists in place of tuples")
    return text.encode()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _flush(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    import torch
    from safetensors.torch import save_file

    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype == torch.complex128:
            raise ValueError(
                f"tensor {name!r}: expected a dense tensor of a dtype that safetensors has,"
                f" got {tensor.layout} {tensor.dtype}"
            )
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; a copy only of those keeps the peak low.
        apart[name] = own.clone() if storage in seen else own
        seen.add(storage)
    save_file(apart, path)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, folder: Path) -> None:
    aside = folder.with_name(_ASIDE + folder.name)
    if folder.exists():
        # A folder cannot be renamed onto a full one. clean_up puts the old one back after a kill between the two.
        folder.rename(aside)
    temporary.rename(folder)
    _flush(folder.parent)
    _delete(aside)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports what the system said as text only.
        code = getattr(error, "errno", None)
        full = code in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)
        if not full:
            raise
        previous = latest(folder.parent)
        start = "the beginning, for there is no checkpoint yet" if previous is None else previous.name
        ending = f"free some space and resume: the run goes on from {start}"
        problem = "the disk is full, so nothing was written"
        raise CheckpointError(folder, problem, previous, ending) from error


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, with tensors moved out under their names and tuples marked, for JSON has neither."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, tuple):
        return {"tuple": [_split(part, f"{name}.{index}", tensors) for index, part in enumerate(value)]}
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_join(part, tensors) for part in value["tuple"])
    if value["tensor"] not in tensors:
        raise ValueError(f"optimizer state: expected a tensor {value['tensor']!r} beside it, got none of that name")
    # A copy: the optimiser writes into its state, and the checkpoint must stay as it was read.
    return tensors[value["tensor"]].clone()
