"""A learnt judge of edits as a reward: a vision-language model with a head, loaded from a checkpoint.

Skywork-EditReward's shape (UniPic 2.0, arXiv:2509.04548). ``rewards.edit_reward_training`` trains one.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewards.base import Images, Prompt, RewardTraits, Scores
from rewards.edit_reward_calibration import Curve, load_curves
from rewards.edit_reward_inputs import EditInputs, EditTemplate

if TYPE_CHECKING:
    from rewards.edit_reward_model import EditRewardModel

# What answers depend on; shards of weights have many names.
_HASHED = ("*.safetensors", "*.json")
_MAX_INSTRUCTION = 20_000


class EditReward:
    """A learnt edit reward: ``total`` is the calibrated last dimension, the others are components.

    Nothing heavy happens before the first call or the first look at ``traits``. A prompt without an instruction or
    without exactly one source image, or with pictures that cannot be read, is NaN with a reason.

    Args:
        checkpoint: folder of a trained edit reward, or its name on the hub.
        device: where the model goes, such as "cuda:1"; a GPU where there is one unless given.
        batch_size: most edits of a forward pass.
        dtype: of the weights, such as "bfloat16".
        max_pixels: most pixels of a picture; what the checkpoint says unless given.

    Raises:
        ValueError: a number is below 1, or the dtype is unknown; later, on first use: the checkpoint is none.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str = "",
        batch_size: int = 32,
        dtype: str = "float32",
        max_pixels: int | None = None,
    ) -> None:
        if batch_size < 1 or (max_pixels is not None and max_pixels < 1):
            raise ValueError(f"batch_size and max_pixels: expected 1 or more, got {batch_size} and {max_pixels}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
        self.checkpoint = checkpoint
        self._device = device
        self._batch_size = batch_size
        self._dtype = dtype
        self._max_pixels = max_pixels
        # A server calls from threads: the weights must not be read twice.
        self._lock = threading.Lock()

    @cached_property
    def traits(self) -> RewardTraits:
        """How it is called; the fingerprint covers weights, calibration, tokenizer, template, dtype and resolution."""
        folder = checkpoint_folder(self.checkpoint)
        marks = (template_of(folder).sha256, folder_digest(folder), self._dtype, str(self._max_pixels))
        digest = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:16]
        return RewardTraits(batch_size=self._batch_size, fingerprint=f"edit_reward {digest}")

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score edits, uint8 [B, H, W, 3], each of its prompt's source image.

        Returns:
            Scores, float32 [B]: the calibrated total, the other dimensions as components, reasons where it is NaN.
        """
        loaded = self._ready
        names = loaded.model.dimensions
        values = np.full((len(images), len(names)), np.nan, np.float32)
        reasons: dict[int, str] = {}
        rows = []
        for row, prompt in enumerate(prompts):
            reason = _unfit(prompt) or loaded.inputs.unfit(prompt.text, (prompt.source_images[0], images[row]))
            if reason:
                reasons[row] = reason
            else:
                rows.append(row)
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            values[part] = self._predict(loaded, images[part], [prompts[row] for row in part])
        for broken in np.flatnonzero(~np.isfinite(values).all(1)).tolist():
            values[broken] = np.nan
            reasons.setdefault(broken, f"{self.checkpoint}: the model's answer is no number; try dtype float32")
        columns = {name: values[:, column] for column, name in enumerate(names)}
        return Scores(columns[names[-1]], {name: columns[name] for name in names[:-1]}, reasons)

    @staticmethod
    def _predict(loaded: _Loaded, images: Images, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        said = loaded.model.rewards(
            loaded.inputs([p.text for p in prompts], [p.source_images[0] for p in prompts], list(images))
        )
        curves = [loaded.curves.get(name, Curve()) for name in loaded.model.dimensions]
        return np.stack([curve(said[:, column]) for column, curve in enumerate(curves)], 1).astype(np.float32)

    @property
    def _ready(self) -> _Loaded:
        with self._lock:
            return self._loaded

    @cached_property
    def _loaded(self) -> _Loaded:
        import torch

        from rewards.edit_reward_model import load_model

        folder = checkpoint_folder(self.checkpoint)
        model = load_model(folder, getattr(torch, self._dtype))
        if type(model).__name__ not in (model.config.architectures or ()):
            raise ValueError(
                f"{self.checkpoint}: expected a trained edit reward, got a checkpoint whose head is new; "
                "train it first: pdtr edit-reward train --base ..."
            )
        inputs = EditInputs.load(folder, template_of(folder), self._max_pixels)
        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch.nn.Module.to(model, device)
        return _Loaded(model, inputs, load_curves(folder))


class _Loaded(NamedTuple):
    """What a call needs."""

    model: EditRewardModel
    inputs: EditInputs
    curves: dict[str, Curve]


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint; a name on the hub is downloaded, or found in the hub's cache.

    Raises:
        ValueError: there is no such folder, and no such name that can be reached.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: expected a checkpoint, got a folder without config.json")
        return folder
    if folder.exists() or str(checkpoint).count("/") != 1 or str(checkpoint).startswith(("/", ".")):
        raise ValueError(
            f"checkpoint: expected a folder or a name on the hub such as owner/name, got {str(checkpoint)!r}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(checkpoint), allow_patterns=["*.safetensors", "*.json", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"checkpoint: expected a folder or a name on the hub, got {str(checkpoint)!r}: {error}"
        ) from error


def folder_digest(folder: Path) -> str:
    """SHA-256 over the weights and settings of a checkpoint, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _HASHED for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def template_of(folder: Path) -> EditTemplate:
    """The template that a checkpoint was trained with; two pictures where it says nothing."""
    import json

    try:
        name = json.loads((folder / "config.json").read_text()).get("edit_reward_template")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder}/config.json: expected a model's configuration, got a damaged file") from error
    return EditTemplate.load(name) if name else EditTemplate.load()


def _unfit(prompt: Prompt) -> str:
    """Why a prompt cannot be judged; empty where it can."""
    if not prompt.text.strip():
        return "text: expected an instruction, got none"
    if len(prompt.text) > _MAX_INSTRUCTION:
        return f"text: expected an instruction of at most {_MAX_INSTRUCTION} characters, got {len(prompt.text)}"
    if len(prompt.source_images) != 1:
        return f"source_images: expected one picture, got {len(prompt.source_images)}"
    return ""
