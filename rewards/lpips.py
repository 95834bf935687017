"""LPIPS, the learned perceptual distance of two images: differences of a network's features, weighted per channel.

The networks are torchvision's AlexNet and VGG16 up to the layers that LPIPS reads; their checkpoints fit by name, and
torchvision itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rewards.checkpoints import load_strictly

if TYPE_CHECKING:
    import torch
    from torch import nn

Network = Literal["alex", "vgg"]
SMALLEST = {"alex": 31, "vgg": 16}
"""Least side, in pixels, that leaves something after the poolings."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation, for pixels in [-1, 1]."""
_EPSILON = 1e-10
# (channels in, channels out, kernel, stride, padding); "pool" is a max pooling; "tap" ends a part that LPIPS reads.
_VGG_PARTS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
_ALEX = (
    (3, 64, 11, 4, 2), "tap", "pool", (64, 192, 5, 1, 2), "tap", "pool", (192, 384, 3, 1, 1), "tap",
    (384, 256, 3, 1, 1), "tap", (256, 256, 3, 1, 1), "tap",
)  # fmt: skip


@dataclass(frozen=True)
class LPIPS:
    """A network in float32 and the weight of each channel of each part it is cut into.

    Attributes:
        parts: five parts; each one's output is read and goes into the next.
        weights: of each part, [C], 0 or more.
    """

    parts: tuple[nn.Sequential, ...]
    weights: tuple[torch.Tensor, ...]

    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Pixels float32 [B, 3, H, W] in [0, 1] to features of unit length at every position, [B, C, h, w] each."""
        import torch

        shift, scale = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        current, read = (2 * pixels - 1 - shift) / scale, []
        for part in self.parts:
            current = part(current)
            read.append(current / (current.square().sum(1, keepdim=True).sqrt() + _EPSILON))
        return read

    def distance(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> torch.Tensor:
        """D = sum_l mean_hw sum_c w_lc (f_l - g_l)^2 of two images' features.  -> [B].

        Zhang et al., arXiv:1801.03924, Eq. 1, version 0.1 of the weights.
        """
        parts = zip(self.weights, first, second, strict=True)
        terms = [((a - b).square() * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2)) for weight, a, b in parts]
        total: torch.Tensor = sum(terms[1:], start=terms[0])
        return total


def make_lpips(
    network: Network, trunk: Mapping[str, torch.Tensor], linear: Mapping[str, torch.Tensor], device: str = "cpu"
) -> LPIPS:
    """LPIPS of the two published checkpoints.

    Args:
        network: which one; both checkpoints have to be of it.
        trunk: torchvision's, by its names, ``features.0.weight`` and so on; the classifier is ignored.
        linear: LPIPS's own, ``lin0.model.1.weight`` to ``lin4.model.1.weight``, [1, C, 1, 1] each.
        device: where it runs.

    Raises:
        ValueError: a checkpoint does not fit.
    """
    from torch import nn

    parts = _parts(network)
    whole = nn.Sequential(*(layer for part in parts for layer in part))
    kept = {name.removeprefix("features."): t.float() for name, t in trunk.items() if name.startswith("features.")}
    # VGG16 ends with a pooling that LPIPS does not read; it has no weights, so that names agree all the same.
    load_strictly(whole, kept, f"LPIPS's {network} network")
    names = [f"lin{index}.model.1.weight" for index in range(len(parts))]
    channels = [[layer.out_channels for layer in part if isinstance(layer, nn.Conv2d)][-1] for part in parts]
    shapes = {name: [1, width, 1, 1] for name, width in zip(names, channels, strict=True)}
    if {name: list(tensor.shape) for name, tensor in linear.items()} != shapes:
        got = {name: list(tensor.shape) for name, tensor in linear.items()}
        raise ValueError(f"LPIPS's weights for {network}: expected {shapes}, got {got}")
    weights = tuple(linear[name].float().flatten().to(device) for name in names)
    return LPIPS(tuple(part.to(device).eval() for part in parts), weights)


def _parts(network: Network) -> list[nn.Sequential]:
    from torch import nn

    layers: list[nn.Module] = []
    parts: list[nn.Sequential] = []
    for step in _ALEX if network == "alex" else _vgg():
        if step == "tap":
            parts.append(nn.Sequential(*layers))
            layers = []
        elif step == "pool":
            layers.append(nn.MaxPool2d(3, 2) if network == "alex" else nn.MaxPool2d(2, 2))
        elif isinstance(step, tuple):
            below, above, kernel, stride, padding = step
            layers += [nn.Conv2d(below, above, kernel, stride, padding), nn.ReLU()]
    return parts


def _vgg() -> list[tuple[int, int, int, int, int] | str]:
    steps: list[tuple[int, int, int, int, int] | str] = []
    below = 3
    for count, above in _VGG_PARTS:
        for _ in range(count):
            steps.append((below, above, 3, 1, 1))
            below = above
        steps += ["tap", "pool"]
    return steps[:-1]
