import math

import pytest
import torch
from torch import Tensor

from agents import functional
from agents.functional import AdvantageStd, normalize_then_sum

NAN = float("nan")


class TestGroupAdvantages:
    rewards = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])

    @pytest.mark.parametrize(
        ("std", "expected"),
        [
            ("group", 1.2245949),  # 1 / (sqrt(2/3) + 1e-4)
            ("global", 0.6221323),  # 1 / (sqrt(15.5/6) + 1e-4)
            ("none", 1.0),
        ],
    )
    def test_by_hand(self, std: AdvantageStd, expected: float) -> None:
        advantages = functional.group_advantages(self.rewards, 3, std)
        torch.testing.assert_close(advantages, torch.tensor([-expected, 0, expected, 0, 0, 0]))

    def test_ids_in_any_order_equal_sizes(self) -> None:
        ids, order = torch.tensor([7, 7, 7, -2, -2, -2]), torch.tensor([3, 0, 4, 1, 5, 2])
        advantages = functional.group_advantages(self.rewards[order], ids[order])
        assert torch.equal(advantages, functional.group_advantages(self.rewards, 3)[order])

    def test_clip(self) -> None:
        rewards = torch.tensor([0.0] * 99 + [1.0])
        assert functional.group_advantages(rewards, 100).max() == 5
        assert functional.group_advantages(rewards, 100, clip=None).max() > 9
        assert functional.group_advantages(rewards, 100, std="none", clip=0.25).max() == 0.25

    @pytest.mark.parametrize("std", ["group", "global", "none"])
    def test_sum_to_zero_in_every_group(self, std: AdvantageStd) -> None:
        rewards = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
        rewards[1, 3] = NAN
        advantages = functional.group_advantages(rewards.flatten(), 16, std).view(6, 16)
        torch.testing.assert_close(advantages.sum(1), torch.zeros(6), atol=2e-5, rtol=0)
        assert advantages.abs().sum(1).min() > 1

    @pytest.mark.parametrize("std", ["group", "global", "none"])
    def test_a_masked_sample_changes_nothing_for_the_others(self, std: AdvantageStd) -> None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 5, (60,), generator=generator)
        rewards = torch.randn(60, generator=generator)
        is_masked = torch.rand(60, generator=generator) < 0.3
        masked = torch.where(is_masked, NAN, rewards)
        advantages = functional.group_advantages(masked, ids, std)
        assert (advantages[is_masked] == 0).all()
        without = functional.group_advantages(rewards[~is_masked], ids[~is_masked], std)
        assert torch.equal(advantages[~is_masked], without)

    def test_flat_groups_are_exactly_zero_where_rounding_is_not(self) -> None:
        rewards = torch.full((24,), 0.1)
        assert (rewards - rewards.sum() / 24).abs().max() > 0  # Or the test would prove nothing.
        for advantages in (
            functional.group_advantages(rewards, 24, eps=0.0),
            functional.group_advantages(rewards, 24, "none"),
            functional.leave_one_out_advantages(rewards, 24),
        ):
            assert (advantages == 0).all()

    @pytest.mark.parametrize("rewards", [[NAN] * 4, [NAN, NAN, NAN, 2.0], []])
    def test_nothing_to_compare_gives_zeros(self, rewards: list[float]) -> None:
        values = torch.tensor(rewards)
        for std in ("group", "global", "none"):
            assert torch.equal(functional.group_advantages(values, 4, std), torch.zeros(len(rewards)))
        assert torch.equal(functional.leave_one_out_advantages(values, 4), torch.zeros(len(rewards)))

    def test_mistakes_are_named(self) -> None:
        with pytest.raises(
            ValueError, match="std: expected one of group, global, none, got 'gruop'; did you mean 'group'"
        ):
            functional.group_advantages(self.rewards, 3, "gruop")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="groups: expected a group size that divides the 6 rewards, got 4"):
            functional.group_advantages(self.rewards, 4)
        with pytest.raises(ValueError, match=r"groups: expected one id a reward, shape \[6\], got shape \[5\]"):
            functional.group_advantages(self.rewards, torch.zeros(5))
        with pytest.raises(ValueError, match="with 1 infinite"):
            functional.group_advantages(torch.tensor([1.0, math.inf]), 2)
        with pytest.raises(ValueError, match=r"got shape \[2, 3\]"):
            functional.group_advantages(self.rewards.view(2, 3), 3)


def test_leave_one_out_by_hand_and_with_a_mask() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0])
    assert functional.leave_one_out_advantages(rewards, 3).tolist() == [-1.5, 0.0, 1.5]
    masked = torch.tensor([1.0, NAN, 2.0, 3.0])
    assert functional.leave_one_out_advantages(masked, 4).tolist() == [-1.5, 0.0, 0.0, 1.5]


def test_leave_one_out_is_reward_minus_the_mean_of_the_others() -> None:
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([rewards[i] - torch.cat([rewards[:i], rewards[i + 1 :]]).mean() for i in range(8)])
    torch.testing.assert_close(functional.leave_one_out_advantages(rewards, 8), expected)


def test_ratio_is_exactly_one_at_equal_log_probs_and_differentiates_one_side() -> None:
    log_prob = torch.tensor([-1.3, 0.7, 12.1], requires_grad=True)
    ratio = functional.ratio(log_prob, log_prob)
    assert (ratio == 1).all()
    assert torch.autograd.grad(ratio.sum(), log_prob)[0].tolist() == [1, 1, 1]
    torch.testing.assert_close(functional.ratio(torch.tensor([math.log(2)]), torch.zeros(1)), torch.tensor([2.0]))


def test_clipped_surrogate_by_hand() -> None:
    ratio, advantage = torch.tensor([1.3, 0.7, 1.3, 0.7]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = functional.clipped_surrogate(ratio, advantage, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, -0.7, 1.3, 0.8]))
    loss = functional.clipped_surrogate(ratio, advantage, (0.1, 0.5))
    torch.testing.assert_close(loss, torch.tensor([-1.3, -0.7, 1.3, 0.9]))


def test_clipped_surrogate_stops_only_the_gradient_that_would_go_further() -> None:
    ratio = torch.tensor([1.3, 0.7, 1.3, 0.7], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    gradient = torch.autograd.grad(functional.clipped_surrogate(ratio, advantage, 0.2).sum(), ratio)[0]
    assert gradient.tolist() == [0, -1, 1, 0]


def test_clip_fraction_by_hand() -> None:
    ratio = torch.tensor([0.85, 1.0, 1.15, 1.3])
    assert functional.clip_fraction(ratio, 0.2) == 0.25
    assert functional.clip_fraction(ratio, (0.1, 0.2)) == 0.5
    assert functional.clip_fraction(torch.ones(4), 1e-5) == 0


def test_approx_kl_by_hand() -> None:
    kl = functional.approx_kl(torch.tensor([math.log(2), 0.0]), torch.zeros(2))
    torch.testing.assert_close(kl, torch.tensor(0.15342641))  # (1 - ln 2) / 2
    assert functional.approx_kl(torch.tensor([3.0]), torch.tensor([3.0])) == 0


def test_gaussian_kl_by_hand_and_against_torch() -> None:
    kl = functional.gaussian_kl(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor(2.0))
    assert kl.tolist() == [0.625]  # (1 + 9) / 2 / 8
    mean, reference = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([[0.2], [0.5], [1.0]])
    normals = [torch.distributions.Normal(centre, std.expand(3, 4)) for centre in (mean, reference)]
    expected = torch.distributions.kl_divergence(*normals).mean(1)
    torch.testing.assert_close(functional.gaussian_kl(mean, reference, std), expected)


def test_velocity_mse_and_mean_dims_by_hand() -> None:
    velocity = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]], dtype=torch.bfloat16)
    mse = functional.velocity_mse(velocity, torch.zeros(2, 1, 2))
    assert mse.tolist() == [2.5, 0.0]
    assert mse.dtype == torch.float32
    assert functional.mean_dims(torch.tensor([1.0, 5.0])).tolist() == [1, 5]


def test_constants_get_no_gradient() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert not functional.velocity_mse(torch.zeros(2, 3), x).requires_grad
    assert not functional.gaussian_kl(torch.zeros(2, 3), x, torch.ones(())).requires_grad
    assert not functional.clipped_surrogate(torch.ones(2), x[:, 0], 0.2).requires_grad
    assert not functional.approx_kl(x[:, 0], x[:, 1]).requires_grad


class TestNFT:
    def test_reward_weight_by_hand(self) -> None:
        advantage = torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0])
        assert functional.nft_reward_weight(advantage).tolist() == [0, 0, 0.5, 0.75, 1, 1]
        assert functional.nft_reward_weight(torch.tensor([1.0]), max_advantage=1.0).tolist() == [1]

    def test_loss_by_hand(self) -> None:
        """v+ = .5 and v- = -.5, so x_0 is .75 and 1.25; the weights are the same numbers."""
        one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        positive, negative = functional.nft_implicit_losses(one, zero, x_t=one, x_0=zero, sigma=0.5, beta=0.5)
        torch.testing.assert_close((positive, negative), (torch.tensor([0.75]), torch.tensor([1.25])))
        loss = functional.nft_loss(torch.tensor([0.75]), positive, negative, beta=0.5)
        assert loss.tolist() == [1.75]  # (.75 * .75 + .25 * 1.25) / .5

    def gradient(self, r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Gradient of the loss at v = v_old, and that of the plain regression with the same weight."""
        x_0, noise, start = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        sigma = torch.tensor([0.1, 0.4, 0.7, 1.0])
        x_t = (1 - sigma.view(-1, 1, 1, 1)) * x_0 + sigma.view(-1, 1, 1, 1) * noise
        velocity = start.clone().requires_grad_()
        positive, negative = functional.nft_implicit_losses(velocity, start, x_t, x_0, sigma, beta)
        nft = torch.autograd.grad(functional.nft_loss(r, positive, negative, beta).sum(), velocity)[0]
        error = x_t - sigma.view(-1, 1, 1, 1) * velocity - x_0
        weight = error.detach().abs().mean(dim=(1, 2, 3))
        plain = torch.autograd.grad((error.square().mean(dim=(1, 2, 3)) / weight).sum(), velocity)[0]
        return nft, plain

    @pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
    def test_gradient_identity_at_the_old_policy(self, beta: float) -> None:
        r = torch.tensor([0.0, 0.3, 0.9, 1.0])
        nft, plain = self.gradient(r, beta)
        torch.testing.assert_close(nft, (2 * r - 1).view(-1, 1, 1, 1) * plain, atol=1e-5, rtol=1e-4)
        assert nft.abs().flatten(1).amax(1).min() > 1e-3

    @pytest.mark.parametrize("beta", [0.1, 1.0])
    def test_an_average_sample_has_no_gradient(self, beta: float) -> None:
        nft, plain = self.gradient(torch.full((4,), 0.5), beta)
        assert nft.abs().max() < 1e-6 * plain.abs().max()

    def test_the_old_velocity_is_a_constant(self) -> None:
        old = torch.ones(1, 2, requires_grad=True)
        losses = functional.nft_implicit_losses(torch.zeros(1, 2), old, torch.ones(1, 2), torch.zeros(1, 2), 0.5, 1.0)
        assert not any(loss.requires_grad for loss in losses)

    def test_a_perfect_prediction_is_finite(self) -> None:
        zero = torch.zeros(1, 2)
        positive, negative = functional.nft_implicit_losses(zero, zero, zero, zero, 0.5, 1.0)
        assert positive.tolist() == negative.tolist() == [0]


def test_normalize_then_sum_by_hand() -> None:
    """Groups (1, 3) and (2, 2); (0, 10) and (10, 0): deviations 1, 0 and 5, 5."""
    rewards = {"a": torch.tensor([1.0, 3.0, 2.0, 2.0]), "b": torch.tensor([0.0, 10.0, 10.0, 0.0])}
    found = normalize_then_sum(rewards, {"a": 2.0, "b": 1.0}, 2)
    assert found.tolist() == [-3.0, 3.0, 1.0, -1.0]


def test_normalize_then_sum_does_not_amplify_what_hardly_differs() -> None:
    noise = {"a": torch.tensor([0.5, 0.501])}
    assert normalize_then_sum(noise, {"a": 1.0}, 2, std_floor=0.05).abs().max() == pytest.approx(0.01, rel=1e-3)
    assert normalize_then_sum(noise, {"a": 1.0}, 2, std_floor=1e-8).abs().max() == pytest.approx(1, rel=1e-3)


def test_normalize_then_sum_is_free_of_each_reward_s_offset_and_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = {name: torch.randn(12, generator=generator) for name in "ab"}
    moved = {"a": 7 * rewards["a"] + 3, "b": 0.5 * rewards["b"] - 1}
    weights = {"a": 1.0, "b": 2.0}
    torch.testing.assert_close(normalize_then_sum(rewards, weights, 4), normalize_then_sum(moved, weights, 4))


def test_normalize_then_sum_masks_what_is_not_available_and_nothing_else() -> None:
    rewards = {"a": torch.tensor([1.0, 3.0, math.nan]), "b": torch.tensor([math.nan, 0.0, 0.0])}
    found = normalize_then_sum(rewards, {"a": 1.0, "b": 0.0}, 3)
    assert found.isnan().tolist() == [False, False, True]
    assert found[:2].tolist() == [-1.0, 1.0]
    assert normalize_then_sum(rewards, {"a": 1.0, "b": 1.0}, 3).isnan().tolist() == [True, False, True]


def test_normalize_then_sum_refuses_a_floor_of_0() -> None:
    with pytest.raises(ValueError, match="std_floor: expected a number above 0"):
        normalize_then_sum({"a": torch.ones(2)}, {"a": 1.0}, 2, std_floor=0.0)
