import pytest
import torch

from agents import flow

X_0, NOISE, SIGMA = torch.tensor([[2.0]]), torch.tensor([[-1.0]]), 0.25
X, VELOCITY = torch.tensor([[1.25]]), torch.tensor([[-3.0]])  # .75 * 2 - .25 and -1 - 2


def test_identities_by_hand() -> None:
    assert torch.equal(flow.interpolate(X_0, NOISE, SIGMA), X)
    assert torch.equal(flow.velocity_target(X_0, NOISE), VELOCITY)
    assert torch.equal(flow.x_0_from_velocity(X, VELOCITY, SIGMA), X_0)
    assert torch.equal(flow.noise_from_velocity(X, VELOCITY, SIGMA), NOISE)
    assert torch.equal(flow.score_from_velocity(X, VELOCITY, SIGMA), torch.tensor([[4.0]]))  # -noise / sigma


def test_identities_invert_the_forward_process_with_a_sigma_for_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    sigma = torch.linspace(0.1, 1, 5)
    x, velocity = flow.interpolate(x_0, noise, sigma), flow.velocity_target(x_0, noise)
    torch.testing.assert_close(flow.x_0_from_velocity(x, velocity, sigma), x_0)
    torch.testing.assert_close(flow.noise_from_velocity(x, velocity, sigma), noise)
    assert torch.equal(x[-1], noise[-1])


def test_score_is_the_gradient_of_the_gaussian_log_density() -> None:
    """x_0 ~ N(0, 1): x_sigma ~ N(0, var), whose velocity field and score are known."""
    sigma, x = 0.3, torch.linspace(-2, 2, 9)[:, None]
    variance = (1 - sigma) ** 2 + sigma**2
    velocity = (sigma - (1 - sigma)) / variance * x
    torch.testing.assert_close(flow.score_from_velocity(x, velocity, sigma), -x / variance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_arithmetic_is_fp32_for_any_input(dtype: torch.dtype) -> None:
    x, velocity = torch.tensor([[1.0]], dtype=dtype), torch.tensor([[1.0]], dtype=dtype)
    sigma = torch.tensor(2.0**-12)
    x_0 = flow.x_0_from_velocity(x, velocity, sigma)
    assert x_0.dtype == torch.float32
    assert x_0.item() == 1 - 2.0**-12  # Not representable in half precision.


def test_broadcast_sigma_shapes() -> None:
    latents = torch.zeros(3, 4, 8, 8)
    assert flow.broadcast_sigma(0.5, latents).shape == ()
    assert flow.broadcast_sigma(torch.ones(3), latents).shape == (3, 1, 1, 1)
    assert flow.broadcast_sigma(torch.ones(3, 1, 1, 1), latents).shape == (3, 1, 1, 1)
    assert flow.broadcast_sigma(torch.ones(3), torch.zeros(3)).shape == (3,)


def test_broadcast_sigma_rejects_another_batch() -> None:
    with pytest.raises(ValueError, match=r"sigma: expected .* \[3\], got shape \[4\]"):
        flow.broadcast_sigma(torch.ones(4), torch.zeros(3, 4, 8, 8))


def test_linear_sigmas_by_hand() -> None:
    assert flow.linear_sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    torch.testing.assert_close(flow.linear_sigmas(4, shift=3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 3.1, 7.77])
@pytest.mark.parametrize("num_inference_steps", [1, 2, 7, 10, 40, 1000])
def test_linear_sigmas_fall_from_exactly_one_to_exactly_zero(num_inference_steps: int, shift: float) -> None:
    sigmas = flow.linear_sigmas(num_inference_steps, shift)
    assert sigmas.shape == (num_inference_steps + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_schedules_reject_what_cannot_be_run() -> None:
    with pytest.raises(ValueError, match="num_inference_steps: expected at least 1, got 0"):
        flow.linear_sigmas(0)
    for shift in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="shift: expected a positive number"):
            flow.linear_sigmas(4, shift)
    with pytest.raises(ValueError, match=r"std: expected a positive number, got 0\.0"):
        flow.logit_normal_sigmas(2, torch.Generator(), std=0.0)


def test_logit_normal_has_the_logit_it_says() -> None:
    sigmas = flow.logit_normal_sigmas(100_000, torch.Generator().manual_seed(0), mean=0.5, std=0.8)
    assert ((sigmas > 0) & (sigmas < 1)).all()
    logit = sigmas.double().logit()
    assert abs(logit.mean() - 0.5) < 0.01
    assert abs(logit.std() - 0.8) < 0.01


def test_uniform_is_uniform_and_never_zero() -> None:
    sigmas = flow.uniform_sigmas(100_000, torch.Generator().manual_seed(0))
    assert sigmas.min() > 0
    assert sigmas.max() <= 1
    quantiles = torch.quantile(sigmas, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.01, rtol=0)


def test_training_sigmas_come_from_their_generator_and_shift_like_the_schedule() -> None:
    for draw in (flow.uniform_sigmas, flow.logit_normal_sigmas):
        plain = draw(50, torch.Generator().manual_seed(3))
        assert torch.equal(plain, draw(50, torch.Generator().manual_seed(3)))
        assert not torch.equal(plain, draw(50, torch.Generator().manual_seed(4)))
        shifted = draw(50, torch.Generator().manual_seed(3), shift=3.0)
        torch.testing.assert_close(shifted, flow.shift_sigmas(plain, 3.0))
        assert (shifted >= plain).all()
