"""Drawing from a saved policy: find it, load it, draw images for one prompt, lay them out as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from agents.policies.base import FlowPolicy
    from agents.policies.scenes import ScenesPolicy
    from agents.samplers import ODE, Sampler
    from rewards.base import Images, Prompt

# Samples drawn at once; it bounds memory and changes no image but in the last bits.
_CHUNK_SIZE = 32
_GAP = 2
_WHITE = 255


def policy_folder(folder: Path | None = None) -> Path:
    """The policy of a run's folder, or the folder itself; the base that ships with the package where None is given.

    Raises:
        ValueError: there is no such folder, or the run in it has not finished.
    """
    from pdtr.launch import BASE

    if folder is None:
        return BASE
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of a run or of a policy, got no folder of that name")
    if (folder / "policy").is_dir():
        return folder / "policy"
    if (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder}: expected a finished run, got one without a policy yet; finish it with --resume")
    return folder


def load_policy(folder: Path) -> ScenesPolicy:
    """Load a saved policy.

    Raises:
        ValueError: the folder is not a policy's, or a file in it is damaged.
    """
    from safetensors import SafetensorError

    from agents.policies.scenes import ScenesPolicy

    try:
        return ScenesPolicy.load(folder)
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: expected a policy, got a damaged one ({error}); copy or train it again") from error


def evaluation_sampler(folder: Path | None, **changes: float | None) -> ODE:
    """How images are drawn: as a run was evaluated, or as a policy says of itself.

    Args:
        folder: of a run or of a policy; None is the base that ships with the package.
        changes: fields to set; None leaves them.

    Raises:
        ValueError: the configuration cannot be read, or a field is out of its range.
    """
    from agents.samplers import ODE
    from pdtr.launch import BASE

    path = (folder or BASE) / "config.json"
    recorded: dict[str, Any] = {}
    if path.is_file():
        try:
            recorded = _recorded_sampler(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected JSON, got a damaged file ({error})") from error
    chosen: dict[str, Any] = recorded | {name: value for name, value in changes.items() if value is not None}
    return ODE(**chosen)


def _recorded_sampler(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler in a run's configuration, else in a policy's."""
    run = config.get("config")
    if isinstance(run, Mapping):
        sampler = run["evaluation"]["sampler"]
        return {name: sampler[name] for name in ("num_inference_steps", "guidance_scale", "shift")}
    names = {"num_inference_steps": "num_inference_steps", "guidance_scale": "guidance_scale", "shift": "sigma_shift"}
    return {name: config[key] for name, key in names.items() if key in config}


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
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a picture, got a file that cannot be read as one ({error})") from error
    height, width = image_size
    found = (picture.height, picture.width)
    if found != image_size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.uint8), found


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
        for start in range(0, num_images, _CHUNK_SIZE):
            count = min(_CHUNK_SIZE, num_images - start)
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


def unknown_words(policy: ScenesPolicy, text: str) -> list[str]:
    """Words of a text that the policy was never shown: it takes them all for one and the same."""
    known = set(policy.config.vocabulary)
    words = (word.strip(".,;:!?'\"()").lower() for word in text.split())
    return [word for word in dict.fromkeys(words) if word and word not in known]
