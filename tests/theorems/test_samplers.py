"""What is true of every sampler, and what is true of one."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from agents import samplers
from agents.flow import interpolate, noise_from_velocity, velocity_target
from agents.functional import ratio
from agents.samplers import CPS, ODE, AllSteps, DanceSDE, FixedWindow, FlowSDE, RandomWindow, Sampler, Transition

STOCHASTIC: list[Sampler] = [
    FlowSDE(),
    DanceSDE(),
    DanceSDE(eta=1.0, shift=3.0),
    CPS(),
    CPS(eta=0.5, log_prob="gaussian"),
    FlowSDE(window=FixedWindow(2, 3), shift=3.0),
    CPS(window=RandomWindow(2, 0, 5)),
]
TRANSITIONS: dict[str, Callable[[Tensor, Tensor, float, float], Transition]] = {
    "flow": functools.partial(samplers.sde_transition, g=samplers.flow_sde_g(0.7)),
    "dance": functools.partial(samplers.sde_transition, g=samplers.dance_sde_g(0.3)),
    "cps": functools.partial(samplers.cps_transition, eta=0.8),
}
STEPS = [(1.0, 0.9), (0.6, 0.45), (0.2, 0.1)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def velocity_model() -> torch.nn.Module:
    """A small network over latents [B, 3, 4, 4]; its weights do not matter."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 1))


# --- One step --------------------------------------------------------------------------------------------------------


def test_sde_step_by_hand() -> None:
    """noise = 1 + .5 * 2 = 2, g^2 / (2 sigma) = 1, drift = 2 + 2 = 4."""
    x, velocity = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    transition = samplers.sde_transition(x, velocity, 0.5, 0.25, samplers.dance_sde_g(1.0))
    assert transition.mean.tolist() == [[0.0]]
    assert transition.std.item() == 0.5
    log_prob = samplers.log_prob(transition, torch.tensor([[0.5]]))
    torch.testing.assert_close(log_prob, torch.tensor([-0.7257914]))  # -1/2 - ln .5 - ln(2 pi) / 2


def test_cps_step_by_hand() -> None:
    """x_0 = 0 and noise = 2; at eta = 1/3 the angle is 30 degrees."""
    x, velocity = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    transition = samplers.cps_transition(x, velocity, 0.5, 0.25, eta=1 / 3)
    torch.testing.assert_close(transition.mean, torch.tensor([[0.4330127]]))
    torch.testing.assert_close(transition.std, torch.tensor(0.125))
    paper = replace(transition, density="paper")
    torch.testing.assert_close(samplers.log_prob(paper, transition.mean + 3), torch.tensor([-9.0]))


def test_g_by_hand() -> None:
    sigma, sigma_next = torch.tensor([0.5, 0.9, 1.0]), torch.tensor([0.4, 0.8, 0.75])
    torch.testing.assert_close(samplers.flow_sde_g(0.7)(sigma, sigma_next), torch.tensor([0.7, 2.1, 1.4]))
    torch.testing.assert_close(samplers.dance_sde_g(0.3)(sigma, sigma_next), torch.tensor([0.3, 0.3, 0.3]))


@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_flow_and_dance_are_one_step_for_equal_g(sigma: float, sigma_next: float) -> None:
    """Both published formulas, written out, equal the one transition."""
    x, velocity, dt = draw(2, 4), draw(2, 4, seed=1), sigma_next - sigma
    level = 0.7
    g = level * math.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
    flow = x * (1 + g**2 / (2 * sigma) * dt) + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    x_0 = x - sigma * velocity
    score = -(x - (1 - sigma) * x_0) / sigma**2
    dance = x + (velocity - 0.5 * g**2 * score) * dt
    as_flow = samplers.sde_transition(x, velocity, sigma, sigma_next, samplers.flow_sde_g(level))
    as_dance = samplers.sde_transition(x, velocity, sigma, sigma_next, samplers.dance_sde_g(g))
    torch.testing.assert_close(as_flow.mean, flow, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(as_dance.mean, dance, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(as_flow.mean, as_dance.mean)
    torch.testing.assert_close(as_flow.std, as_dance.std)


@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_without_noise_every_step_is_the_odes(sigma: float, sigma_next: float) -> None:
    step = (draw(2, 4), draw(2, 4, seed=1), sigma, sigma_next)
    ode = samplers.ode_step(*step)
    for transition in (
        samplers.sde_transition(*step, samplers.flow_sde_g(0.0)),
        samplers.sde_transition(*step, samplers.dance_sde_g(0.0)),
        samplers.cps_transition(*step, 0.0),
    ):
        torch.testing.assert_close(transition.mean, ode)
        assert transition.std == 0


@pytest.mark.parametrize("g", [samplers.flow_sde_g, samplers.dance_sde_g])
def test_the_sde_tends_to_the_ode_as_the_square_of_its_noise(g: Callable[[float], samplers.Diffusion]) -> None:
    step = (draw(2, 4), draw(2, 4, seed=1), 0.6, 0.45)
    ode = samplers.ode_step(*step)

    def distance(level: float) -> float:
        return float((samplers.sde_transition(*step, g(level)).mean - ode).abs().max())

    assert distance(0.4) / distance(0.2) == pytest.approx(4, rel=1e-2)


@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
@pytest.mark.parametrize("name", list(TRANSITIONS))
def test_a_step_keeps_the_share_of_x_0_and_only_cps_that_of_noise(name: str, sigma: float, sigma_next: float) -> None:
    """With the exact velocity the mean is a x_0 + b noise: a = 1 - sigma_next; the noise's variance is b^2 + std^2."""
    x_0, noise = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    x, velocity = interpolate(x_0, noise, sigma), velocity_target(x_0, noise)
    transition = TRANSITIONS[name](x, velocity, sigma, sigma_next)
    share_x_0, share_noise = transition.mean.flatten().tolist()
    variance = share_noise**2 + transition.std.item() ** 2
    assert share_x_0 == pytest.approx(1 - sigma_next, abs=1e-6)
    if name == "cps":
        assert variance == pytest.approx(sigma_next**2, abs=1e-6)
    else:
        assert variance > sigma_next**2 + 1e-5


def test_the_sdes_excess_of_noise_vanishes_with_the_square_of_the_step() -> None:
    def excess(dt: float) -> float:
        x, velocity = torch.tensor([[0.6]]), torch.tensor([[1.0]])  # x_0 = 0, noise = 1
        transition = TRANSITIONS["flow"](x, velocity, 0.6, 0.6 - dt)
        return float(transition.mean**2 + transition.std**2) - (0.6 - dt) ** 2

    assert excess(0.15) == pytest.approx(0.2385 - 0.2025, abs=1e-3)
    assert excess(0.15) / excess(0.075) == pytest.approx(4, rel=1e-2)


# --- The chain -------------------------------------------------------------------------------------------------------


def final_std(sampler: Sampler, target_mean: float, target_std: float) -> tuple[float, float]:
    """Mean and deviation that a sampler reaches from N(0, 1) with the exact velocity of N(target_mean, target_std^2).

    The exact velocity is affine in x, so every step is: its slope and offset are read off two points, and mean and
    variance follow without drawing anything.
    """
    sigmas = sampler.sigmas()
    steps = sampler.stochastic_steps()
    mean, variance = 0.0, 1.0
    x = torch.tensor([[0.0], [1.0]])
    for step, sigma in enumerate(sigmas[:-1].tolist()):
        scale = ((1 - sigma) * target_std) ** 2 + sigma**2
        centred = (x - (1 - sigma) * target_mean) / scale
        velocity = sigma * centred - (target_mean + (1 - sigma) * target_std**2 * centred)
        following, std = samplers.ode_step(x, velocity, sigmas[step], sigmas[step + 1]), 0.0
        if step in steps:
            transition = sampler.transition(x, velocity, sigmas, step)
            following, std = transition.mean, float(transition.std)
        offset, slope = float(following[0]), float(following[1] - following[0])
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("sampler", [ODE(), FlowSDE(), FlowSDE(shift=3.0), DanceSDE(), DanceSDE(eta=1.0)])
def test_marginals_converge_to_the_target_with_the_steps(sampler: Sampler) -> None:
    results = [final_std(replace(sampler, num_inference_steps=steps), 0.8, 0.5) for steps in (20, 320, 2560)]
    errors = [abs(std - 0.5) for _, std in results]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3  # Flow-SDE's is .0007, since it forgets its first step as T^(-.49) only.
    assert results[2][0] == pytest.approx(0.8, abs=1e-3)


def test_cps_keeps_the_targets_mean_but_not_its_deviation() -> None:
    """Known and stated in its docstring: fresh noise replaces the implied noise, whatever the step size."""
    for steps in (160, 320, 640):
        mean, std = final_std(CPS(eta=0.7, num_inference_steps=steps), 0.8, 0.5)
        assert mean == pytest.approx(0.8, abs=2e-2)
        assert std < 0.45


def rollout(sampler: Sampler, model: torch.nn.Module, dtype: torch.dtype) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Step, latents, next latents and log-probability of every stochastic step of a chain of 5 samples."""
    sigmas = sampler.sigmas()
    steps = sampler.stochastic_steps(torch.Generator().manual_seed(0))
    noises = samplers.sample_noise(range(5), (len(sigmas), 3, 4, 4)).unbind(1)
    x, stored = noises[-1].to(dtype), []
    with torch.no_grad():
        for step in range(sampler.num_inference_steps):
            x_next, log_prob = sampler.step(x, model(x.float()), sigmas, step, step in steps, noises[step])
            assert x_next.dtype == dtype
            assert (log_prob is not None) == (step in steps)
            if log_prob is not None:
                stored.append((step, x, x_next, log_prob))
            x = x_next
    assert x.isfinite().all()
    return stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", STOCHASTIC, ids=str)
def test_replayed_log_prob_is_the_rollouts_bit_for_bit(sampler: Sampler, dtype: torch.dtype) -> None:
    model = velocity_model()
    stored = rollout(sampler, model, dtype)
    assert tuple(step for step, *_ in stored) == sampler.stochastic_steps(torch.Generator().manual_seed(0))
    for step, x, x_next, old_log_prob in stored:
        transition = sampler.transition(x, model(x.float()), sampler.sigmas(), step)
        log_prob = samplers.log_prob(transition, x_next)
        assert torch.equal(log_prob, old_log_prob)
        importance = ratio(log_prob, old_log_prob)
        assert (importance == 1).all()
        gradients = torch.autograd.grad(importance.sum(), list(model.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert max(gradient.abs().max() for gradient in gradients) > 0


@pytest.mark.parametrize("sampler", STOCHASTIC, ids=str)
def test_the_chunk_size_changes_no_step(sampler: Sampler) -> None:
    """Given the velocity; a network's own last bits may depend on its batch."""
    sigmas, step = sampler.sigmas(), sampler.stochastic_steps(torch.Generator())[0]
    x, velocity, noise = draw(3, 7, 4, 8, 8).bfloat16()
    x_next, log_prob = sampler.step(x, velocity, sigmas, step, True, noise)
    assert log_prob is not None
    for size in (1, 2, 3):
        chunks = zip(x.split(size), velocity.split(size), noise.split(size), strict=True)
        steps = [sampler.step(a, b, sigmas, step, True, c) for a, b, c in chunks]
        assert torch.equal(x_next, torch.cat([latents for latents, _ in steps]))
        assert torch.equal(log_prob, torch.cat([value for _, value in steps if value is not None]))


def test_the_log_prob_is_that_of_the_stored_latents() -> None:
    """In bfloat16 the rounding is visible: the log-density of the unrounded draw would be another."""
    sampler, x, velocity, noise = DanceSDE(), draw(2, 64), draw(2, 64, seed=1), draw(2, 64, seed=2)
    x = x.bfloat16()
    x_next, log_prob = sampler.step(x, velocity, sampler.sigmas(), 4, True, noise)
    assert log_prob is not None
    transition = sampler.transition(x, velocity, sampler.sigmas(), 4)
    unrounded = samplers.log_prob(transition, transition.mean + transition.std * noise)
    assert torch.equal(samplers.log_prob(transition, x_next), log_prob)
    assert not torch.equal(unrounded, log_prob)


# --- Densities -------------------------------------------------------------------------------------------------------


def test_log_prob_is_the_mean_of_torchs_normal() -> None:
    transition = Transition(draw(3, 2, 4), torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1))
    x_next = draw(3, 2, 4, seed=1)
    normal = torch.distributions.Normal(transition.mean, transition.std)
    expected = normal.log_prob(x_next).mean((1, 2))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(samplers.log_prob(transition, x_next), expected)


def test_log_prob_holds_the_next_latents_constant() -> None:
    mean = torch.zeros(2, 3, requires_grad=True)
    x_next = mean + draw(2, 3)
    gradient = torch.autograd.grad(samplers.log_prob(Transition(mean, torch.tensor(0.5)), x_next).sum(), mean)[0]
    torch.testing.assert_close(gradient, x_next.detach() / 0.25 / 3)


def test_papers_cps_ratio_is_a_gaussians_of_variance_one_half() -> None:
    mean, other, x_next = draw(3, 2, 5)
    std = torch.tensor(math.sqrt(0.5))
    paper = samplers.log_prob(Transition(mean, std, "paper"), x_next)
    paper_other = samplers.log_prob(Transition(other, std, "paper"), x_next)
    gaussian = samplers.log_prob(Transition(mean, std), x_next) - samplers.log_prob(Transition(other, std), x_next)
    torch.testing.assert_close(paper - paper_other, gaussian)


@pytest.mark.parametrize("sampler", STOCHASTIC, ids=str)
def test_kl_to_itself_is_exactly_zero_with_zero_gradient(sampler: Sampler) -> None:
    model, x, step = velocity_model(), draw(5, 3, 4, 4), sampler.stochastic_steps(torch.Generator())[0]
    transition = sampler.transition(x, model(x), sampler.sigmas(), step)
    with torch.no_grad():
        reference = sampler.transition(x, model(x), sampler.sigmas(), step)
    kl = samplers.kl(transition, reference)
    assert torch.equal(kl, torch.zeros(5))
    gradients = torch.autograd.grad(kl.sum(), list(model.parameters()))
    assert all((gradient == 0).all() for gradient in gradients)


def test_expected_log_ratio_is_minus_the_kl_between_old_and_new() -> None:
    """E_old[log_prob - old_log_prob] = -mean (mean - old_mean)^2 / (2 std^2), the bias that GRPO-Guard removes."""
    old = Transition(torch.zeros(200_000, 4), torch.tensor(0.5))
    new = Transition(old.mean + torch.tensor([0.1, -0.2, 0.3, 0.0]), old.std)
    x_next = old.mean + old.std * draw(200_000, 4)
    log_ratio = samplers.log_prob(new, x_next) - samplers.log_prob(old, x_next)
    kl = samplers.kl(new, old)
    assert kl[0].item() == pytest.approx((0.01 + 0.04 + 0.09) / 4 / 0.5, rel=1e-4)
    standard_error = log_ratio.std() / math.sqrt(len(log_ratio))
    assert abs(log_ratio.mean() + kl[0]) < 4 * standard_error
    assert kl[0] > 20 * standard_error


def test_a_deterministic_step_has_no_log_prob() -> None:
    sampler, x = ODE(), draw(2, 4)
    with pytest.raises(ValueError, match="got a deterministic one"):
        samplers.log_prob(sampler.transition(x, x, sampler.sigmas(), 0), x)


# --- Which steps are stochastic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [*STOCHASTIC, ODE()], ids=str)
def test_the_last_step_is_never_stochastic(sampler: Sampler) -> None:
    for seed in range(50):
        steps = sampler.stochastic_steps(torch.Generator().manual_seed(seed))
        assert all(0 <= step <= sampler.num_inference_steps - 2 for step in steps)
    with pytest.raises(ValueError, match="expected noise and a step up to 8"):
        sampler.step(draw(1, 4), draw(1, 4), sampler.sigmas(), 9, True, draw(1, 4))


def test_windows_by_hand() -> None:
    assert FlowSDE(num_inference_steps=4).stochastic_steps() == (0, 1, 2)
    assert FlowSDE(num_inference_steps=4, window=FixedWindow(1, 2)).stochastic_steps() == (1, 2)
    assert ODE(num_inference_steps=1).stochastic_steps() == ()


def test_random_window_covers_its_range_evenly_and_repeats_under_a_seed() -> None:
    sampler, generator = CPS(window=RandomWindow(2, 1, 5)), torch.Generator().manual_seed(0)
    drawn = [sampler.stochastic_steps(generator) for _ in range(600)]
    assert set(drawn) == {(1, 2), (2, 3), (3, 4)}
    assert all(abs(drawn.count(window) - 200) < 60 for window in set(drawn))
    again = torch.Generator().manual_seed(0)
    assert drawn[:20] == [sampler.stochastic_steps(again) for _ in range(20)]


def test_a_step_outside_the_window_is_the_odes_and_needs_no_noise() -> None:
    sampler, x, velocity = FlowSDE(window=FixedWindow(0, 1)), draw(2, 4), draw(2, 4, seed=1)
    sigmas = sampler.sigmas()
    x_next, log_prob = sampler.step(x, velocity, sigmas, 5, False, None)
    assert log_prob is None
    assert torch.equal(x_next, samplers.ode_step(x, velocity, sigmas[5], sigmas[6]))
    with pytest.raises(ValueError, match="noise=None"):
        sampler.step(x, velocity, sigmas, 0, True, None)


def test_the_last_step_returns_the_x_0_that_the_velocity_implies() -> None:
    sampler, x, velocity = FlowSDE(), draw(2, 4), draw(2, 4, seed=1)
    x_next, _ = sampler.step(x, velocity, sampler.sigmas(), 9, False, None)
    torch.testing.assert_close(x_next, x - sampler.sigmas()[9] * velocity)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowSDE(num_inference_steps=0), "num_inference_steps: expected at least 1, got 0"),
        (lambda: FlowSDE(num_inference_steps=1), "num_inference_steps: expected at least 2, got 1"),
        (lambda: FlowSDE(noise_level=0.0), "noise_level: expected a positive number, got 0.0; .* ODE"),
        (lambda: DanceSDE(eta=float("nan")), "eta: expected a positive number, got nan"),
        (lambda: CPS(eta=1.5), r"eta: expected a number in \(0, 1.0\], got 1.5"),
        (lambda: CPS(log_prob="gausian"), "log_prob: .* got 'gausian'; did you mean 'gaussian'"),  # type: ignore[arg-type]
        (lambda: ODE(guidance_scale=-1.0), "guidance_scale: expected 0 or more, got -1.0"),
        (lambda: ODE(shift=0.0), "shift: expected a positive number, got 0.0"),
        (lambda: ODE(window=FixedWindow()), "window: expected none for ODE"),
        (lambda: FlowSDE(num_inference_steps=4, window=FixedWindow(2, 2)), "window: expected it to end at step 3"),
        (lambda: FlowSDE(num_inference_steps=4, window=RandomWindow(2, 0, 4)), "window: expected it to end at step 3"),
        (lambda: FixedWindow(-1, 2), "FixedWindow: expected start >= 0"),
        (lambda: FixedWindow(0, 0), "size >= 1"),
        (lambda: RandomWindow(3, 0, 2), "RandomWindow: expected .* low \\+ size <= high"),
        (lambda: CPS(window=RandomWindow()).stochastic_steps(), "expected a torch.Generator"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_samplers_are_values() -> None:
    assert FlowSDE() == FlowSDE(window=AllSteps())
    assert len({FlowSDE(), FlowSDE(), DanceSDE()}) == 2


# --- Noise -----------------------------------------------------------------------------------------------------------


def test_derive_seed_is_the_same_in_every_process() -> None:
    """Pinned: a change would change every run."""
    assert samplers.derive_seed(0, 7, "noise") == 9014845384677934865


def test_derive_seed_tells_types_borders_and_order_apart() -> None:
    parts: list[tuple[int | str, ...]] = [
        (),
        (1,),
        ("1",),
        (-1,),
        (1, 2),
        (2, 1),
        (12,),
        ("a", "b"),
        ("ab",),
        ("ab", ""),
    ]
    seeds = [samplers.derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    many = [samplers.derive_seed(*part) for part in itertools.product(range(3), range(100), range(24))]
    assert len(set(many)) == len(many)
    assert min(many) >= 0
    assert max(many) < 2**63
    assert max(many) > 2**62


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_noise_is_the_same_for_any_chunk_size_and_order(size: int) -> None:
    seeds = [samplers.derive_seed(0, index) for index in range(12)]
    noise = samplers.sample_noise(seeds, (4, 8, 8))
    chunks = [samplers.sample_noise(seeds[start : start + size], (4, 8, 8)) for start in range(0, 12, size)]
    assert torch.equal(noise, torch.cat(chunks))
    assert torch.equal(noise.flip(0), samplers.sample_noise(seeds[::-1], (4, 8, 8)))


def test_noise_is_standard_normal_and_independent_between_samples() -> None:
    noise = samplers.sample_noise([samplers.derive_seed("test", index) for index in range(50)], (4, 32, 32)).flatten(1)
    assert noise.shape == (50, 4096)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    correlation = noise.corrcoef() - torch.eye(50)
    assert correlation.abs().max() < 0.1


def test_noise_leaves_torchs_own_generator_alone() -> None:
    state = torch.get_rng_state()
    samplers.sample_noise([1, 2], (3,))
    assert torch.equal(state, torch.get_rng_state())


def test_rollout_noise_is_what_the_step_adds() -> None:
    x, velocity, noise = draw(2, 4), draw(2, 4, seed=1), draw(2, 4, seed=2)
    sampler = CPS(eta=1.0)  # All noise is fresh: x_next = (1 - s) x_0 + s noise.
    x_next, _ = sampler.step(x, velocity, sampler.sigmas(), 3, True, noise)
    sigma, sigma_next = sampler.sigmas()[3:5]
    x_0 = x - sigma * velocity
    torch.testing.assert_close(x_next, interpolate(x_0, noise, sigma_next))
    torch.testing.assert_close(noise_from_velocity(interpolate(x_0, noise, sigma), noise - x_0, sigma), noise)
