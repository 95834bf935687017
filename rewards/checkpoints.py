"""What scorers that are neural networks share: where weights come from, where they run, and loading them once."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rewards.base import Prompt, RewardTraits, Scores
from rewards.names import nearest

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16")
NO_TEXT = "the prompt has no text"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DEVICE = re.compile(r"[a-z]+(:\d+)?")


@dataclass(frozen=True)
class Placement:
    """Where and how a scorer's network runs: on a device and in a precision of its own.

    Attributes:
        device: torch's name of it, such as "cpu", "cuda" or "cuda:1"; whether it is there shows at the first call.
        dtype: of weights and activations: float32, bfloat16 or float16. Published numbers vary with it in the third
            digit, so it is part of the fingerprint; the device is not.
        batch_size: most images of a call.

    Raises:
        ValueError: a value that none of these can be.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device: expected torch's name of one, such as 'cpu' or 'cuda:0', got {self.device!r}")
        if self.dtype not in DTYPES:
            near = nearest(self.dtype, DTYPES)
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}; the nearest is {near!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {self.batch_size}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]


class Once(Generic[T]):
    """A value that is made at the first call and kept: weights are loaded when they are needed, by one thread."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        """The value; a failure to make it is raised, and the next call tries again."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


def require_package(module: str, extra: str, otherwise: str = "") -> None:
    """Say at construction, and not at the first image, that a package is missing.

    Args:
        module: what will be imported.
        extra: the extra of this project that brings it.
        otherwise: another way out, for the message.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        hint = f"; or {otherwise}" if otherwise else ""
        raise ValueError(f"expected the package {module!r}, and it is not installed: pip install 'pdtr[{extra}]'{hint}")


def check_source(name: str, source: str) -> None:
    """Check that weights' source is a folder or a file that is there, or reads like a name on the hub.

    A name on the hub is not looked up: that would need the network before the first call does.

    Args:
        name: of the setting, for the message.
        source: a path, a hub id ("owner/model"), or one file of it ("owner/model:file.pt").

    Raises:
        ValueError: it is a path that leads nowhere (the nearest one is named), or no name of the hub either.
    """
    path = Path(source)
    if source and path.exists():
        return
    if source.startswith(("/", "./", "../", "~")) or (":" not in source and len(path.parts) > 2):
        near = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
        hint = f"; the nearest beside it is {near!r}" if near else f"; {str(path.parent)!r} is no folder or is empty"
        raise ValueError(f"{name}: expected a file or a folder, got {source!r}, which does not exist{hint}")
    model, colon, file = source.partition(":")
    if not _HUB_ID.fullmatch(model) or (colon and not file):
        raise ValueError(
            f"{name}: expected a path, a hub id 'owner/model' or a file of one 'owner/model:file', got {source!r}"
        )


def local_file(source: str) -> Path:
    """The path of a file of weights, fetched from the hub if need be.

    Args:
        source: a path or "owner/model:file", as :func:`check_source` allows.

    Raises:
        OSError: it cannot be had; the hub's message says why.
    """
    path = Path(source)
    if path.is_file():
        return path
    model, _, file = source.partition(":")
    if not file:
        raise FileNotFoundError(f"expected a file, or 'owner/model:file' of the hub, got {source!r}")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, file))


def image_processor(source: str) -> Any:
    """The image processor of a folder or a hub id, on PIL everywhere: torchvision, where it is, resizes otherwise."""
    from transformers import AutoImageProcessor

    auto: Any = AutoImageProcessor
    return auto.from_pretrained(source, backend="pil")


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or of a checkpoint of torch's, never unpickling more than tensors.

    A checkpoint that keeps them under "state_dict", as HPSv2's does, is unwrapped.

    Raises:
        ValueError: it holds something other than named tensors.
    """
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a checkpoint of named tensors, got {type(state).__name__}")
    return dict(state)


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Load a state dict that has to fit exactly.

    Raises:
        ValueError: names are missing or unknown, or shapes differ; the message lists some.
    """
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    differ = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or unknown or differ:
        parts = {"missing": missing, "unknown": unknown, "of another shape": differ}
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in parts.items() if names)
        raise ValueError(f"{what}: the checkpoint does not fit the model: {told}")
    module.load_state_dict(dict(tensors))


def scorer_traits(name: str, settings: Any, placement: Placement, **more: object) -> RewardTraits:
    """Traits whose fingerprint is everything that the scores depend on: settings, precision, and files' sizes.

    Args:
        name: of the reward.
        settings: its dataclass; texts in it that are paths are followed by the size and the time of what they name, so
            that a cache does not answer for weights that were replaced.
        placement: gives the batch size and the precision.
        more: what else is to be said.
    """
    facts = {"reward": name, "dtype": placement.dtype, **_facts(settings), **_fact(more)}
    return RewardTraits(batch_size=placement.batch_size, fingerprint=json.dumps(facts, sort_keys=True))


def with_text(prompts: Sequence[Prompt]) -> tuple[list[int], dict[int, str]]:
    """Which prompts have a text, and the reason for each that has none."""
    rows = [index for index, prompt in enumerate(prompts) if prompt.text.strip()]
    return rows, {index: NO_TEXT for index in range(len(prompts)) if index not in set(rows)}


def scores_at(
    values: NDArray[np.floating[Any]], rows: Sequence[int], count: int, reasons: Mapping[int, str] | None = None
) -> Scores:
    """Scores of the images that could be scored; all others, and what is not finite, are NaN with a reason.

    Args:
        values: [len(rows)].
        rows: the index of each value's image.
        count: of all images.
        reasons: of the images that are not among the rows.
    """
    total, why = np.full(count, np.nan, np.float32), dict(reasons or {})
    for row, value in zip(rows, np.asarray(values, np.float64), strict=True):
        if np.isfinite(value):
            total[row] = value
        else:
            why[row] = f"the model's score is {value}; a lower precision overflows, use dtype='float32'"
    return Scores(total, {}, why)


def _facts(value: Any) -> dict[str, Any]:
    fields = asdict(value) if is_dataclass(value) and not isinstance(value, type) else {}
    return {name: _fact(field) for name, field in fields.items() if name != "placement"}


def _fact(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _fact(field) for name, field in value.items()}
    if not isinstance(value, str) or not value or not Path(value).exists():
        return value
    root = Path(value)
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    return [value, [[str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]]
