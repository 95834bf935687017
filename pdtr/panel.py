"""What gives a hacked reward away: statistics of the drawn images, and a trained reward that leaves the held-out one.

A policy that has found a fault of its reward shows it in pictures that all change one way (over-saturated, dark, full
of edges, blank), that grow alike within a group, or that leave an edit's source as it was.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdtr.evaluate import mean
from pdtr.statistics import Interval, paired_bootstrap
from rewards.agreement import spearman

Images = NDArray[np.uint8]

# Of grey levels in [0, 1]: the step between neighbours that counts as an edge, and the pixel that counts as dark.
_EDGE, _DARK = 0.1, 0.125
_JPEG_QUALITY = 75


def image_statistics(images: Images) -> dict[str, float]:
    """Means over uint8 [N, H, W, 3].

    Returns:
        ``saturation`` (HSV's, in [0, 1]), ``edge_density`` (share of pixels that differ from their right or lower
        neighbour by more than a tenth), ``entropy`` (of an image's 256 grey levels, bits), ``dark_share`` (of pixels)
        and ``jpeg_bytes`` (an image's, quality 75).
    """
    pixels = images.astype(np.float32) / 255
    high, low = pixels.max(-1), pixels.min(-1)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    right = np.abs(np.diff(grey, axis=2, append=grey[:, :, -1:])) > _EDGE
    down = np.abs(np.diff(grey, axis=1, append=grey[:, -1:])) > _EDGE
    return {
        "saturation": float(np.where(high > 0, (high - low) / np.maximum(high, 1e-6), 0).mean()),
        "edge_density": float((right | down).mean()),
        "entropy": float(np.mean([_entropy(image) for image in grey])),
        "dark_share": float((grey < _DARK).mean()),
        "jpeg_bytes": float(np.mean([_jpeg_bytes(image) for image in images])),
    }


def _entropy(grey: NDArray[np.float32]) -> float:
    counts = np.bincount((grey * 255).astype(np.uint8).ravel(), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _jpeg_bytes(image: Images) -> int:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=_JPEG_QUALITY)
    return stream.tell()


def group_diversity(images: Images, group_size: int) -> float:
    """Mean distance of two images of a group, the root mean square of their pixels' differences in [0, 1].

    Args:
        images: uint8 [N, H, W, 3], groups one after the other.
        group_size: G; NaN where it is 1.
    """
    if group_size < 2:
        return float("nan")
    flat = images.reshape(-1, group_size, int(np.prod(images.shape[1:]))).astype(np.float32) / 255
    first, second = np.triu_indices(group_size, 1)
    squares = [np.square(group[first] - group[second]).mean(-1) for group in flat]
    return float(np.sqrt(squares).mean())


def source_distance(images: Images, sources: Sequence[Images]) -> float:
    """Mean root mean square of the pixels' differences to the picture that was to be edited, in [0, 1]."""
    differences = [
        np.square((image.astype(np.float32) - source) / 255).mean()
        for image, source in zip(images, sources, strict=True)
    ]
    return float(np.sqrt(differences).mean())


def panel_metrics(task: str, images: Images, group_size: int, sources: Sequence[Images]) -> dict[str, float]:
    """The statistics of one task's images by the names that they are logged under.

    Args:
        task: its name, the last part of each name.
        images: uint8 [N, H, W, 3], groups one after the other.
        group_size: of the groups.
        sources: the picture to be edited of each image; empty where there is none.
    """
    found = image_statistics(images) | {"diversity": group_diversity(images, group_size)}
    if sources:
        found["source_distance"] = source_distance(images, sources)
    return {f"image/{name}/{task}": value for name, value in found.items()}


def agreement(trained: NDArray[Any], held_out: NDArray[Any]) -> float:
    """Spearman's rank correlation of two rewards of the same images; NaN where one is constant or under 3 have both."""
    both = ~(np.isnan(trained) | np.isnan(held_out))
    return spearman(trained[both], held_out[both]) if both.sum() > 2 else float("nan")


def hacking_alarm(history: Sequence[Mapping[str, Any]], name: str = "") -> str:
    """Say so where the trained reward rises while the held-out one falls; empty where it does not.

    The last evaluation is compared with the one whose held-out reward was best so far, and with the first, prompt by
    prompt: the alarm goes off where the 95 % paired bootstrap interval of the held-out reward's change lies below 0 and
    that of the trained one's above. With the first too, because a reward that is hacked fast has risen by the time that
    the held-out one is best, and then stands while that one falls (LOG.md, 2026-11-30). What stages weigh by name may
    rise where the total does not, so each of that may set it off too.

    Args:
        history: evaluations of one task on the same prompts, in order, each with "iteration", and "trained" and
            "reward", the held-out one, [N] each; and "parts", what is weighed by name, [N] each, where there is any.
        name: of the held-out reward, where there are several.
    """
    if len(history) < 2:
        return ""
    *before, last = history
    means = [mean(entry["reward"]) for entry in before]
    if all(np.isnan(means)):
        return ""
    which = f" ({name})" if name else ""
    for since in (before[index] for index in dict.fromkeys((int(np.nanargmax(means)), 0))):
        held_out = paired_bootstrap(last["reward"], since["reward"])
        if not held_out.high < 0:  # NaN too
            continue
        for part, trained in _rises(last, since):
            return (
                f"since iteration {since['iteration']} the trained reward{part} rose by {trained.value:.3f} "
                f"[{trained.low:.3f}, {trained.high:.3f}] and the held-out one{which} fell by {-held_out.value:.3f} "
                f"[{-held_out.high:.3f}, {-held_out.low:.3f}]: the reward is being hacked"
            )
    return ""


def _rises(last: Mapping[str, Any], since: Mapping[str, Any]) -> Iterator[tuple[str, Interval]]:
    """What is trained on and has risen between two evaluations, the total first."""
    for part in ("", *last.get("parts", ())):
        now, then = (entry.get("parts", {}).get(part) if part else entry["trained"] for entry in (last, since))
        if then is not None and (change := paired_bootstrap(now, then)).low > 0:
            yield f" ({part})" if part else "", change
