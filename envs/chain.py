"""What a denoising chain is made of, and N of them in step: the core of ``pdtr/Denoising-v0``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Dict, Space
from numpy.typing import NDArray

from envs.base import Observation, check_options, describe_array
from rewards.base import Images

Float = NDArray[np.float32]

_POOL = 8
_SEED_SPACE = 2**63
_LARGEST = float(np.finfo(np.float32).max)


def pool_encode(images: Images) -> Float:
    """Means over 8x8 pixels, scaled to [-1, 1].  uint8 [B, H, W, 3] -> float32 [B, 3, H/8, W/8]."""
    batch, height, width, channels = images.shape
    blocks = images.reshape(batch, height // _POOL, _POOL, width // _POOL, _POOL, channels)
    means = blocks.mean((2, 4), dtype=np.float32).transpose(0, 3, 1, 2)
    latents: Float = means / np.float32(127.5) - np.float32(1)
    return latents


def pool_decode(latents: Float) -> Images:
    """Each value as 8x8 pixels, [-1, 1] to 0..255, clipped.  float32 [B, 3, h, w] -> uint8 [B, 8h, 8w, 3]."""
    levels = np.rint((latents.clip(-1, 1) + 1) * np.float32(127.5)).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1).repeat(_POOL, axis=1).repeat(_POOL, axis=2)


@dataclass(frozen=True)
class GaussianLatents:
    """Standard normal noise of a shape, float32 [C, h, w], from a seed."""

    shape: tuple[int, int, int]

    def __call__(self, seed: int) -> Float:
        """Draw the noise of ``seed``."""
        return np.random.default_rng(seed).standard_normal(self.shape, np.float32)


@dataclass(frozen=True)
class DenoisingChain:
    """The chain that :class:`DenoisingEnv` exposes; by default four steps on latents of 8x8 pixels of a 48x48 scene.

    Attributes:
        sigmas: the noise levels, T + 1 falling numbers from at most 1 to 0.
        latent_shape: (C, h, w).
        decode: final latents, float32 [1, C, h, w], to an image, uint8 [1, H, W, 3], of the outer environment's size.
        initial_latents: an integer seed to the latents that a chain starts from, float32 [C, h, w].
        embed: the outer environment's observation, of one member, to the condition, float32 [embedding_size].
        embedding_size: length of the condition; 0 without ``embed``.
        bound: latents and actions lie in [-bound, bound]; libraries clip their actions to it. May be infinite.

    Raises:
        ValueError: a field is not as described.
    """

    sigmas: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0)
    latent_shape: tuple[int, int, int] = (3, 6, 6)
    decode: Callable[[Float], Images] = pool_decode
    initial_latents: Callable[[int], Float] = GaussianLatents((3, 6, 6))
    embed: Callable[[Any], Float] | None = None
    embedding_size: int = 0
    bound: float = 10.0

    def __post_init__(self) -> None:
        levels = np.asarray(self.sigmas, np.float32)
        falls = levels.ndim == 1 and len(levels) >= 2 and bool((np.diff(levels) < 0).all())
        if not falls or levels[0] > 1 or levels[-1] != 0:
            raise ValueError(f"sigmas: expected two or more falling numbers from at most 1 to 0, got {self.sigmas}")
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ValueError(f"latent_shape: expected (C, h, w), got {self.latent_shape}")
        if (self.embed is None) != (self.embedding_size == 0) or self.embedding_size < 0:
            raise ValueError(
                f"embedding_size: expected the length of embed's vectors, and 0 without embed, got "
                f"{self.embedding_size} {'without' if self.embed is None else 'with'} embed"
            )
        if not self.bound > 0:
            raise ValueError(f"bound: expected a positive number, got {self.bound}")

    def observation_space(self) -> Dict:
        """Of one chain: ``latents``, ``sigma`` and ``condition``."""
        return Dict(
            {
                "latents": self.action_space(),
                "sigma": Box(0.0, 1.0, (1,), np.float32),
                "condition": Box(-_LARGEST, _LARGEST, (self.embedding_size,), np.float32),
            }
        )

    def action_space(self) -> Space[Any]:
        """Of one chain: the next latent."""
        return Box(-self.bound, self.bound, self.latent_shape, np.float32)


class Chains:
    """N chains of one kind at the same step."""

    def __init__(self, chain: DenoisingChain, count: int) -> None:
        self.chain = chain
        self.count = count
        self.sigmas = np.asarray(chain.sigmas, np.float32)
        self.step = -1
        self.seeds: tuple[int, ...] = ()
        self.latents = np.empty(0, np.float32)
        self.condition = np.empty(0, np.float32)

    def start(self, seeds: Sequence[int], observations: Sequence[Any]) -> None:
        """Begin at the first sigma, from a seed and on an outer observation a chain."""
        drawn = [self.chain.initial_latents(seed) for seed in seeds]
        latents = [self._checked("initial_latents", each, self.chain.latent_shape) for each in drawn]
        self.step, self.seeds, self.latents = 0, tuple(seeds), np.stack(latents)
        self.condition = np.zeros((self.count, self.chain.embedding_size), np.float32)
        if self.chain.embed is not None:
            vectors = [self.chain.embed(observation) for observation in observations]
            size = (self.chain.embedding_size,)
            self.condition = np.stack([self._checked("embed", vector, size, _LARGEST) for vector in vectors])

    def advance(self, action: object) -> bool:
        """Take the next latents; whether they are the last."""
        if not 0 <= self.step < len(self.sigmas) - 1:
            raise ResetNeeded("Denoising: no chain is under way; call reset first")
        self.latents = self._checked("action", action, (self.count, *self.chain.latent_shape)).copy()
        self.step += 1
        return self.step == len(self.sigmas) - 1

    def images(self) -> Images:
        """The latents decoded one by one, so that an image does not depend on its batch; uint8 [N, H, W, 3]."""
        images = [self.chain.decode(self.latents[i : i + 1]) for i in range(self.count)]
        for image in images:
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 4 or len(image) != 1:
                raise ValueError(f"decode: expected uint8 [1, H, W, 3], got {describe_array(image)}")
        return np.concatenate(images)

    def observe(self) -> Observation:
        """The state of every chain, in arrays of its own."""
        sigma = np.full((self.count, 1), self.sigmas[self.step], np.float32)
        return {"latents": self.latents.copy(), "sigma": sigma, "condition": self.condition.copy()}

    def _checked(self, name: str, value: object, shape: tuple[int, ...], bound: float | None = None) -> Float:
        if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.shape != shape:
            raise ValueError(f"{name}: expected float32 {list(shape)}, got {describe_array(value)}")
        limit = self.chain.bound if bound is None else bound
        if not (np.abs(value) <= limit).all():
            worst = "NaN" if np.isnan(value).any() else f"{float(np.abs(value).max()):g}"
            raise ValueError(
                f"{name}: expected values in [-{limit:g}, {limit:g}], got {worst}; clip them, or raise bound"
            )
        return value


def draw_seed(rng: np.random.Generator) -> int:
    """A seed for ``initial_latents``."""
    return int(rng.integers(_SEED_SPACE))


def draw_seeds(options: dict[str, Any], count: int, rng: np.random.Generator) -> tuple[list[int], dict[str, Any]]:
    """The chains' seeds, and the options that are the outer environment's."""
    check_options(options, ("prompts", "latent_seeds"))
    outer = {name: value for name, value in options.items() if name != "latent_seeds"}
    seeds = options.get("latent_seeds")
    if seeds is None:
        return [draw_seed(rng) for _ in range(count)], outer
    if not isinstance(seeds, Sequence | np.ndarray) or len(seeds) != count:
        raise ValueError(f"latent_seeds: expected {count} integers, got {seeds!r}")
    return [int(seed) for seed in seeds], outer
