"""Minibatches of rollouts: every sample once, every task in its share, the same for chunks of any size."""

from __future__ import annotations

import pytest
import torch

from agents.types import Chunk, Condition, Rollout, Trajectory, minibatches


def rollout(num_samples: int, chunk_size: int, seed: int) -> Rollout:
    """A rollout whose samples are told apart by their x_0: 100 seed + index."""
    numbers = 100.0 * seed + torch.arange(num_samples)
    trajectories = tuple(
        Trajectory(Condition({}), part.view(-1, 1, 1, 1), torch.tensor([1.0, 0.0]), (), part, part, part)
        for part in numbers.split(chunk_size)
    )
    zeros = torch.zeros(num_samples)
    return Rollout(trajectories, zeros, {}, torch.arange(num_samples) // 4, zeros, seed)


def samples(chunks: list[Chunk]) -> list[int]:
    return sorted(int(number) for chunk in chunks for number in chunk.trajectory.x_0.flatten())


def dealt(rollouts: list[Rollout], num_minibatches: int, seed: int = 0) -> list[list[int]]:
    return [samples(run) for run in minibatches(rollouts, num_minibatches, torch.Generator().manual_seed(seed))]


def test_every_sample_once_and_each_step_sees_both_tasks_in_their_share() -> None:
    runs = dealt([rollout(24, 4, 1), rollout(8, 4, 2)], 2)
    assert sorted(n for run in runs for n in run) == [*range(100, 124), *range(200, 208)]
    assert [(sum(n < 200 for n in run), sum(n >= 200 for n in run)) for run in runs] == [(12, 4), (12, 4)]


@pytest.mark.parametrize("num_minibatches", [1, 2, 4])
def test_chunks_of_any_size_meet_the_same_samples(num_minibatches: int) -> None:
    found = [dealt([rollout(16, size, 1), rollout(16, size, 2)], num_minibatches) for size in (1, 2, 4)]
    assert found[0] == found[1] == found[2]
    assert [len(run) for run in found[0]] == [32 // num_minibatches] * num_minibatches


def test_tasks_with_fewer_chunks_than_steps_leave_no_step_empty() -> None:
    assert all(len(run) == 4 for run in dealt([rollout(8, 4, 1), rollout(8, 4, 2)], 4))


def test_the_order_is_the_generators() -> None:
    orders = {tuple(map(tuple, dealt([rollout(16, 4, 1)], 4, seed))) for seed in range(8)}
    assert len(orders) > 1
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_more_steps_than_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_minibatches=3 exceeds the rollout's 2 chunks"):
        dealt([rollout(8, 4, 1)], 3)
