"""Drawing from a saved policy: find it, load it, draw images for one prompt, lay them out as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from agents.policies.backbone import BackboneSettings
    from agents.policies.base import FlowPolicy
    from agents.samplers import ODE, Sampler
    from rewards.base import Images, Prompt

# Samples, and pixels in all, drawn at once; it bounds memory and changes no image but in the last bits.
_CHUNK_SIZE, _CHUNK_PIXELS = 32, 2**22
_GAP = 2
_WHITE = 255
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A sampler's fields, and what they are called in a policy's configuration.
_SAMPLER_FIELDS = {
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "shift": "sigma_shift",
}


def policy_folder(folder: Path | None = None) -> Path:
    """The policy of a run's folder, or the folder itself; the base that ships with the package where None is given.

    What looks like a repository of the hub ("owner/name", and no folder of that name) is returned as it is.

    Raises:
        ValueError: there is no such folder, or the run in it has not finished.
    """
    from pdtr.launch import BASE

    if folder is None:
        return BASE
    if not folder.is_dir():
        if _HUB_NAME.fullmatch(str(folder)) and not folder.parent.exists():
            return folder
        owner_and_name = "/".join(folder.parts[-2:])
        hint = f"; one of the hub: hf download {owner_and_name} --local-dir {folder}" if len(folder.parts) > 2 else ""
        raise ValueError(f"{folder}: expected the folder of a run or of a policy, got no folder of that name{hint}")
    if (folder / "policy").is_dir():
        return folder / "policy"
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{folder}: expected a finished run, got one without a policy yet; finish it with --resume, or take the "
            f"policy of a checkpoint: pdtr export {folder}"
        )
    return folder


def load_policy(folder: Path, settings: BackboneSettings | None = None) -> FlowPolicy:
    """Load a saved policy: of the embedded world, or a published model in diffusers' layout.

    Args:
        folder: of the policy, or a repository of the hub.
        settings: of a published model; those that it was saved with, or else the defaults, where None.

    Raises:
        ValueError: the folder is not a policy's, or a file in it is damaged; or there are settings for a policy of the
            embedded world, which has none.
    """
    from safetensors import SafetensorError

    from agents.policies.loading import is_backbone, load_backbone
    from agents.policies.scenes import ScenesPolicy

    if is_backbone(folder) or not folder.is_dir():
        return load_backbone(folder, settings)
    if settings is not None:
        raise ValueError(f"{folder}: expected a model in diffusers' layout for the settings of a backbone, got another")
    try:
        return ScenesPolicy.load(folder)
    except (SafetensorError, TypeError, KeyError, RuntimeError, ZeroDivisionError, json.JSONDecodeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder}: expected a policy, got a damaged or a foreign one ({problem}); copy or train it again"
        ) from error


def evaluation_sampler(folder: Path | None, **changes: float | None) -> ODE:
    """How images are drawn: as the run was evaluated that the policy is of, else as the policy says of itself.

    Args:
        folder: of a run, of the policy within it, or of any other policy; None is the base that ships with the package.
        changes: fields to set; None leaves them.

    Raises:
        ValueError: there is no such policy, a configuration cannot be read, or a field is out of its range.
    """
    from agents.samplers import ODE

    policy = policy_folder(folder)
    recorded: Mapping[str, Any] | None = None
    if policy.absolute().name == "policy":
        recorded = _run_sampler(_read_config(policy.absolute().parent / "config.json"))
    if recorded is None:
        recorded = _policy_sampler(policy)
    chosen: dict[str, Any] = {**recorded} | {name: value for name, value in changes.items() if value is not None}
    try:
        return ODE(**chosen)
    except TypeError as error:
        raise ValueError(f"{policy}: expected numbers as the sampler's settings, got {chosen} ({error})") from error


def _read_config(path: Path) -> Mapping[str, Any]:
    """A configuration; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file ({error})") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}; it is not one of ours")
    return found


def _run_sampler(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The evaluation's sampler in a run's configuration; None where it is not a run's."""
    found: Any = config
    for name in ("config", "evaluation", "sampler"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not all(name in found for name in _SAMPLER_FIELDS):
        return None
    return {name: found[name] for name in _SAMPLER_FIELDS}


def _policy_sampler(folder: Path) -> Mapping[str, Any]:
    """The sampler that a policy or a published model is drawn with; what is not said is the default of its class."""
    from agents.policies.loading import backbone_class, is_backbone
    from agents.policies.scenes import ScenesPolicyConfig

    if is_backbone(folder) or not folder.is_dir():
        return _sampler_fields(backbone_class(folder).default_sampler)
    config = _read_config(folder / "config.json")
    defaults = {field.name: field.default for field in fields(ScenesPolicyConfig)}
    return {name: config.get(key, defaults[key]) for name, key in _SAMPLER_FIELDS.items()}


def _sampler_fields(sampler: Sampler) -> Mapping[str, Any]:
    return {name: getattr(sampler, name) for name in _SAMPLER_FIELDS}


def device_or_gpu(name: str = "") -> str:
    """Torch's name of the device to draw on: the one that is given, or else the GPU where there is one."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def load_source_image(path: Path, image_size: tuple[int, int]) -> tuple[Images, tuple[int, int]]:
    """Read a picture to edit.

    Args:
        path: any format that Pillow reads.
        image_size: (height, width) that the policy works at; other pictures are resized to it.

    Returns:
        uint8 [height, width, 3], and the (height, width) that the file had.

    Raises:
        ValueError: the file is not a picture.
        OSError: it cannot be read.
    """
    from PIL import Image

    picture = _read_picture(path)
    height, width = image_size
    found = (picture.height, picture.width)
    if found != image_size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.uint8), found


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture to edit, as :func:`load_source_image` finds it, with the same errors."""
    picture = _read_picture(path)
    return picture.height, picture.width


def _read_picture(path: Path) -> Picture:
    """A picture in RGB, the way up that its camera meant."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a picture, got a file that cannot be read as one ({error})") from error


def sample_images(policy: FlowPolicy, prompt: Prompt, num_images: int, seed: int, sampler: Sampler) -> Images:
    """Draw ``num_images`` images of one prompt, uint8 [N, H, W, 3].

    Image i follows from (seed, i) alone: more images change none of the first.

    Raises:
        ValueError: ``num_images`` is below 1.
    """
    import torch

    from agents.rollout import denoise
    from agents.samplers import derive_seed

    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    steps = sampler.stochastic_steps(torch.Generator().manual_seed(derive_seed(seed, "window")))
    images = []
    with torch.no_grad():
        condition = policy.encode([prompt])
        height, width = policy.image_size
        chunk_size = max(1, min(_CHUNK_SIZE, _CHUNK_PIXELS // (height * width)))
        for start in range(0, num_images, chunk_size):
            count = min(chunk_size, num_images - start)
            seeds = [derive_seed(seed, "sample", index) for index in range(start, start + count)]
            trajectory = denoise(policy, condition.repeat_interleave(count), sampler, steps, seeds)
            images.append(policy.decode(trajectory.x_0).cpu().numpy())
    return np.concatenate(images)


def image_grid(images: Images, num_columns: int, scale: int = 1) -> Images:
    """Images [N, H, W, 3] side by side, row by row, with white gaps; every pixel becomes ``scale`` x ``scale``.

    -> uint8 [rows (s H + 2) - 2, columns (s W + 2) - 2, 3].

    Raises:
        ValueError: there is no image, or a number below 1.
    """
    if len(images) == 0 or num_columns < 1 or scale < 1:
        raise ValueError(
            f"image_grid: expected images, and columns and scale of at least 1, got {len(images)} images, "
            f"{num_columns} columns, scale {scale}"
        )
    enlarged = images.repeat(scale, axis=1).repeat(scale, axis=2)
    _, height, width, channels = enlarged.shape
    num_columns = min(num_columns, len(images))
    num_rows = -(-len(images) // num_columns)
    size = (num_rows * (height + _GAP) - _GAP, num_columns * (width + _GAP) - _GAP, channels)
    grid = np.full(size, _WHITE, np.uint8)
    for index, image in enumerate(enlarged):
        top, left = (index // num_columns) * (height + _GAP), (index % num_columns) * (width + _GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def unknown_words(policy: FlowPolicy, text: str) -> list[str]:
    """Words of a text that the policy was never shown: it takes them all for one and the same, or does not see them.

    None for a published model, whose tokenizers know all words.
    """
    from agents.policies.scenes import ScenesPolicy
    from agents.policies.scenes_parts import words_of

    if not isinstance(policy, ScenesPolicy):
        return []
    known = set(policy.config.vocabulary)
    unknown: dict[str, None] = {}
    for piece in text.split():
        # The encoder passes over what is neither a Latin letter, a digit nor a comma.
        unseen = [piece] if any(map(str.isalnum, piece)) else []
        unknown |= dict.fromkeys(word for word in words_of(piece) or unseen if word not in known)
    return list(unknown)
