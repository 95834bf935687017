"""How a flow policy draws: one transition a family of samplers, one ``g(sigma)`` a paper.

A step goes from ``sigma`` to a smaller ``sigma_next`` with ``dt = sigma_next - sigma < 0``. Rollout and replay call the
same ``Sampler.transition``, which is why the importance ratio at the weights that drew is exactly 1. All arithmetic is
fp32 whatever the dtype of the latents; noise always comes in as an argument.

Shapes: B samples, T denoising steps, ... the latent dimensions.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from agents.flow import broadcast_sigma, linear_sigmas, noise_from_velocity, x_0_from_velocity
from agents.functional import KLDivisor, check_choice, gaussian_kl, mean_dims

Density = Literal["gaussian", "paper"]
Diffusion = Callable[[Tensor, Tensor], Tensor]
"""``g(sigma, sigma_next)``: how much noise an SDE adds, per square root of sigma."""


@dataclass(frozen=True)
class Transition:
    """The Gaussian from which the next latents are drawn."""

    mean: Tensor
    """[B, ...], fp32."""
    std: Tensor
    """Broadcastable to ``mean``, fp32; 0 where the step is deterministic."""
    density: Density = "gaussian"
    """What ``log_prob`` evaluates; ``paper`` is CPS's own, which leaves the deviation out."""
    diffusion: Tensor | None = None
    """g of an SDE's step, ``std / sqrt(-dt)``, shaped as ``std``; None for a step of no SDE."""


def log_prob(transition: Transition, x_next: Tensor) -> Tensor:
    """Log-density of the next latents, **mean** over the latent dimensions, not sum.

    ``mean_dims [-(x_next - mean)^2 / (2 std^2) - ln std - ln(2 pi) / 2]``, Flow-GRPO (arXiv:2505.05470).
    The ratio of two such means is a tempered one: the geometric mean over d dimensions of the true ratio. Hence its
    distance from 1 is some d times smaller, and clip ranges are 1e-5 to 1e-3 where language models use 0.2.

    With ``density="paper"``: ``-mean_dims (x_next - mean)^2``, as published for CPS (arXiv:2509.05952).

    Args:
        transition: where the gradient flows.
        x_next: [B, ...], as stored; a constant.

    Returns:
        [B].

    Raises:
        ValueError: if the transition is deterministic, and so has no density.
    """
    if not bool((transition.std > 0).all()):
        raise ValueError(
            "log_prob: expected a transition with positive std, got a deterministic one;"
            " evaluate it on sampler.stochastic_steps() only"
        )
    squared_error = (x_next.detach().float() - transition.mean).square()
    if transition.density == "paper":
        return -mean_dims(squared_error)
    std = transition.std
    return mean_dims(-squared_error / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi))


def kl(transition: Transition, reference: Transition, divisor: KLDivisor = "variance") -> Tensor:
    """``functional.gaussian_kl`` of two steps, with ``divisor="diffusion"`` over ``2 g^2``, not ``2 std^2``. -> [B]."""
    scale = transition.std if divisor == "variance" else transition.diffusion
    if scale is None:
        raise ValueError('kl: expected an SDE\'s step for the divisor "diffusion", got one without g; use "variance"')
    return gaussian_kl(transition.mean, reference.mean, scale)


def flow_sde_g(noise_level: float = 0.7) -> Diffusion:
    """``g = noise_level sqrt(sigma / (1 - sigma))``, Flow-GRPO (arXiv:2505.05470).

    At ``sigma = 1``, where that is infinite, ``1 - sigma`` becomes ``1 - sigma_next``, as in the published code (there:
    the second sigma of the schedule, which is the same). That first step gains variance a^4 / 4 at any step size, and T
    steps forget it only as T^(-a^2): many steps approach the target's marginal slowly, from above.
    """

    def g(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_next, sigma))).sqrt()

    return g


def dance_sde_g(eta: float = 0.3) -> Diffusion:
    """``g = eta`` at every sigma, DanceGRPO (arXiv:2505.07818)."""

    def g(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.full_like(sigma, eta)

    return g


def sde_transition(
    x: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float, g: Diffusion
) -> Transition:
    """One Euler-Maruyama step of the SDE that has the flow's marginals.

    ``dx = [velocity - g^2 / 2 score] dsigma + g dW``, ``score = -noise / sigma``, hence
    ``mean = x + (velocity + g^2 / (2 sigma) noise) dt``, ``std = g sqrt(-dt)``, ``noise = x + (1 - sigma) velocity``.
    Flow-GRPO (arXiv:2505.05470) and DanceGRPO (arXiv:2505.07818) are this step, each with its own g.

    Args:
        x: [B, ...].
        velocity: [B, ...], guided already.
        sigma: [] or [B], positive.
        sigma_next: [] or [B], less than sigma.
        g: see ``Diffusion``.
    """
    sigma, sigma_next = broadcast_sigma(sigma, x), broadcast_sigma(sigma_next, x)
    dt = sigma_next - sigma
    g_sigma = g(sigma, sigma_next)
    drift = velocity.float() + g_sigma.square() / (2 * sigma) * noise_from_velocity(x, velocity, sigma)
    return Transition(mean=x.float() + drift * dt, std=g_sigma * (-dt).sqrt(), diffusion=g_sigma)


def cps_transition(
    x: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float, eta: float
) -> Transition:
    """A coefficients-preserving step, Flow-CPS (arXiv:2509.05952).

    ``std = sigma_next sin(eta pi / 2)``, ``mean = (1 - sigma_next) x_0 + sigma_next cos(eta pi / 2) noise``: part of
    the noise that the velocity implies is exchanged for fresh noise, so that the latents keep exactly
    ``1 - sigma_next`` of x_0 and ``sigma_next`` of noise at any step size. ``eta = 0`` is the ODE's step.

    It is not a discretisation of an SDE with the flow's marginals: more steps do not bring its final distribution to
    the target's. Shapes as in ``sde_transition``; ``eta`` in [0, 1] is the share of fresh noise, as an angle.
    """
    next_sigma, angle = broadcast_sigma(sigma_next, x), eta * math.pi / 2
    x_0, noise = x_0_from_velocity(x, velocity, sigma), noise_from_velocity(x, velocity, sigma)
    mean = (1 - next_sigma) * x_0 + next_sigma * math.cos(angle) * noise
    return Transition(mean=mean, std=next_sigma * math.sin(angle))


def ode_step(x: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """Euler's step, ``x + velocity (sigma_next - sigma)``. [B, ...] -> [B, ...], fp32."""
    return x.float() + velocity.float() * (broadcast_sigma(sigma_next, x) - broadcast_sigma(sigma, x))


@final
@dataclass(frozen=True)
class AllSteps:
    """Every step that may be stochastic is."""

    def steps(self, num_steps: int, generator: torch.Generator | None) -> tuple[int, ...]:
        """The stochastic ones among steps 0 to num_steps - 1."""
        return tuple(range(num_steps))


@final
@dataclass(frozen=True)
class FixedWindow:
    """Steps ``start`` to ``start + size - 1`` are stochastic, the others follow the ODE. MixGRPO (arXiv:2507.21802)."""

    start: int = 0
    size: int = 2

    def __post_init__(self) -> None:
        if self.start < 0 or self.size < 1:
            raise ValueError(f"FixedWindow: expected start >= 0 and size >= 1, got {self}")

    def steps(self, num_steps: int, generator: torch.Generator | None) -> tuple[int, ...]:
        """The stochastic ones among steps 0 to num_steps - 1; a ValueError if the window does not fit."""
        _check_window_end(self, self.start + self.size, num_steps)
        return tuple(range(self.start, self.start + self.size))


@final
@dataclass(frozen=True)
class RandomWindow:
    """``size`` consecutive steps, placed afresh at each call, uniformly inside ``[low, high)``. Flow-GRPO-Fast's way.

    All samples of a group must share one draw: seed the generator from (run seed, iteration).
    """

    size: int = 3
    low: int = 0
    high: int = 5

    def __post_init__(self) -> None:
        if self.low < 0 or self.size < 1 or self.low + self.size > self.high:
            raise ValueError(f"RandomWindow: expected low >= 0, size >= 1 and low + size <= high, got {self}")

    def steps(self, num_steps: int, generator: torch.Generator | None) -> tuple[int, ...]:
        """The stochastic ones among steps 0 to num_steps - 1; a ValueError if the range does not fit."""
        _check_window_end(self, self.high, num_steps)
        if generator is None:
            raise ValueError("RandomWindow: expected a torch.Generator to place the window, got None; pass one")
        shape, device = (1,), generator.device
        start = int(torch.randint(self.low, self.high - self.size + 1, shape, generator=generator, device=device))
        return tuple(range(start, start + self.size))


Window = AllSteps | FixedWindow | RandomWindow


def _check_window_end(window: Window, end: int, num_steps: int) -> None:
    if end > num_steps:
        raise ValueError(
            f"window: expected it to end at step {num_steps} at most, since the last of the {num_steps + 1} steps is"
            f" never stochastic, got {window}; shorten it or raise num_inference_steps"
        )


@dataclass(frozen=True)
class Sampler(ABC):
    """How latents are drawn, and so the policy whose log-probabilities are learnt from.

    The step into ``sigma = 0`` always follows the ODE: noise there would stay in the image, and CPS has none.
    Construction raises a ValueError for any setting that could not be run.
    """

    num_inference_steps: int = 10
    """T, at least 1 (at least 2 if stochastic)."""
    guidance_scale: float = 1.0
    """Classifier-free guidance, applied by the policy; 1 is none."""
    shift: float | None = 1.0
    """SD3's schedule shift; 1 is an even grid. None is the policy's own schedule, see ``FlowPolicy.sigmas``."""
    window: Window = AllSteps()
    """Which steps are stochastic."""

    def __post_init__(self) -> None:
        self.sigmas()
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale: expected 0 or more, got {self.guidance_scale}; 1.0 is no guidance")

    @final
    def sigmas(self) -> Tensor:
        """The schedule, [T + 1] on the CPU, falling from 1 to 0; without a shift where that is left to the policy."""
        return linear_sigmas(self.num_inference_steps, 1.0 if self.shift is None else self.shift)

    def stochastic_steps(self, generator: torch.Generator | None = None) -> tuple[int, ...]:
        """Which of the steps 0 to T - 2 are stochastic; the generator is needed by ``RandomWindow`` only."""
        return self.window.steps(self.num_inference_steps - 1, generator)

    @abstractmethod
    def transition(self, x: Tensor, velocity: Tensor, sigmas: Tensor, step: int) -> Transition:
        """The Gaussian of a stochastic step; arguments as in ``step``. Rollout and replay both come here."""

    @final
    def step(
        self, x: Tensor, velocity: Tensor, sigmas: Tensor, step: int, is_stochastic: bool, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One step of a rollout.

        The log-probability is that of the next latents after their rounding to the dtype of ``x``, because those are
        the ones that are stored and replayed.

        Args:
            x: latents at ``sigmas[step]``, [B, ...], in the storage dtype.
            velocity: [B, ...], guided already.
            sigmas: [T + 1].
            step: 0 to T - 1.
            is_stochastic: whether ``step`` is among ``stochastic_steps``; if not, this is the ODE's step.
            noise: standard normal, [B, ...]; used, and needed, by a stochastic step only.

        Returns:
            The next latents, [B, ...] in the dtype of ``x``, and their log-probability, [B], or None for the ODE.

        Raises:
            ValueError: for a stochastic step without noise, or one into ``sigma = 0``.
        """
        if not is_stochastic:
            return ode_step(x, velocity, sigmas[step], sigmas[step + 1]).to(x.dtype), None
        if noise is None or step >= len(sigmas) - 2:
            raise ValueError(
                f"step: expected noise and a step up to {len(sigmas) - 3} for a stochastic step, got"
                f" noise={'None' if noise is None else list(noise.shape)}, step={step}; see stochastic_steps()"
            )
        transition = self.transition(x, velocity, sigmas, step)
        x_next = (transition.mean + transition.std * noise.float()).to(x.dtype)
        return x_next, log_prob(transition, x_next)


@final
@dataclass(frozen=True)
class FlowSDE(Sampler):
    """Flow-GRPO's sampler (arXiv:2505.05470): ``sde_transition`` with ``flow_sde_g``."""

    noise_level: float = 0.7
    """The paper's a: "noise level a = 0.7"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_stochastic(self, "noise_level", self.noise_level, math.inf)

    def transition(self, x: Tensor, velocity: Tensor, sigmas: Tensor, step: int) -> Transition:
        """See ``Sampler.transition``."""
        return sde_transition(x, velocity, sigmas[step], sigmas[step + 1], flow_sde_g(self.noise_level))


@final
@dataclass(frozen=True)
class DanceSDE(Sampler):
    """DanceGRPO's sampler (arXiv:2505.07818): ``sde_transition`` with ``dance_sde_g``."""

    eta: float = 0.3
    """The paper's noise level, constant in sigma."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_stochastic(self, "eta", self.eta, math.inf)

    def transition(self, x: Tensor, velocity: Tensor, sigmas: Tensor, step: int) -> Transition:
        """See ``Sampler.transition``."""
        return sde_transition(x, velocity, sigmas[step], sigmas[step + 1], dance_sde_g(self.eta))


@final
@dataclass(frozen=True)
class CPS(Sampler):
    """Flow-CPS's sampler (arXiv:2509.05952): ``cps_transition``."""

    eta: float = 0.8
    """Share of fresh noise as an angle, in (0, 1]; Flow-GRPO's configurations with CPS use 0.8."""
    log_prob: Density = "paper"
    """``paper``: -mean (x_next - mean)^2, as published; ``gaussian``: the density that is really sampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_stochastic(self, "eta", self.eta, 1.0)
        check_choice("log_prob", self.log_prob, ("paper", "gaussian"))

    def transition(self, x: Tensor, velocity: Tensor, sigmas: Tensor, step: int) -> Transition:
        """See ``Sampler.transition``."""
        transition = cps_transition(x, velocity, sigmas[step], sigmas[step + 1], self.eta)
        return Transition(transition.mean, transition.std, self.log_prob)


@final
@dataclass(frozen=True)
class ODE(Sampler):
    """Euler's method: no stochastic step, no log-probability. For evaluation and forward-process algorithms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window != AllSteps():
            raise ValueError(f"window: expected none for ODE, which has no stochastic steps, got {self.window}")

    def stochastic_steps(self, generator: torch.Generator | None = None) -> tuple[int, ...]:
        """None of them."""
        return ()

    def transition(self, x: Tensor, velocity: Tensor, sigmas: Tensor, step: int) -> Transition:
        """A point mass at the ODE's step."""
        return Transition(ode_step(x, velocity, sigmas[step], sigmas[step + 1]), torch.zeros(()))


def _check_stochastic(sampler: Sampler, name: str, value: float, high: float) -> None:
    if not sampler.stochastic_steps(torch.Generator()):
        raise ValueError("num_inference_steps: expected at least 2, got 1; with a single step use ODE()")
    if not (math.isfinite(value) and 0 < value <= high):
        bound = "a positive number" if high == math.inf else f"a number in (0, {high}]"
        raise ValueError(f"{name}: expected {bound}, got {value}; for sampling without noise use ODE()")


def derive_seed(*parts: int | str) -> int:
    """A seed from what the draw is for, such as (run seed, iteration, prompt index, sample index).

    A 63-bit blake2b hash: the same on every machine and in every process, so that the world size, the chunk size and a
    restart change nothing. Parts keep their type and their borders: 1, "1", and ("a", "b"), ("ab",) all differ.
    """
    encoded = [part.encode() if isinstance(part, str) else b"%d" % part for part in parts]
    tagged = [
        b"%s%d:%s" % (b"s" if isinstance(p, str) else b"i", len(e), e) for p, e in zip(parts, encoded, strict=True)
    ]
    return int.from_bytes(hashlib.blake2b(b"".join(tagged), digest_size=8).digest(), "big") >> 1


def sample_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, each sample from its own generator.

    Drawn on the CPU, so that the device changes nothing either. A CPU generator uses the low 32 bits of its seed.

    Args:
        seeds: one for each sample, see ``derive_seed``.
        shape: of one sample's noise, such as (C, H, W), or (T, C, H, W) for a whole chain.
        device: where the result goes.

    Returns:
        [len(seeds), *shape], fp32.
    """
    noise = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise.to(device)
