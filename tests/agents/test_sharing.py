"""Who draws which chunk: each process as many of every minibatch, and every chunk by one of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from agents.policies.scenes import ScenesPolicy
from agents.processes import ALONE, BUCKET_SIZE, Processes, _buckets
from agents.rollout import Share
from agents.sharing import gather_rollouts, shares
from agents.types import Condition, Elsewhere, Rollout, Trajectory, minibatches


def rollout(num_chunks: int, share: Share, seed: int) -> Rollout:
    """Chunks of two samples, those of a share with their index as x_0."""
    trajectories: list[Trajectory | Elsewhere] = []
    for number in range(num_chunks):
        part = torch.tensor([2.0 * number, 2.0 * number + 1]).view(-1, 1, 1, 1)
        here = Trajectory(Condition({}), part, torch.tensor([1.0, 0.0]), (), part, part, part)
        trajectories.append(here if number in share.chunks else Elsewhere(2))
    zeros = torch.zeros(2 * num_chunks)
    return Rollout(tuple(trajectories), zeros, {}, torch.arange(2 * num_chunks) // 2, zeros, seed)


@pytest.mark.parametrize("num_chunks", [(8,), (6, 2), (5, 3), (1, 7), (3, 2, 3)])
@pytest.mark.parametrize(("num_minibatches", "count"), [(1, 2), (2, 2), (1, 4), (2, 4), (1, 8), (4, 2)])
def test_each_process_has_as_many_chunks_of_every_minibatch(
    num_chunks: tuple[int, ...], num_minibatches: int, count: int
) -> None:
    seen: list[tuple[int, ...]] = []
    alone = [tuple(chunk.seeds) for chunk in all_chunks(num_chunks, ALONE, num_minibatches)]  # type: ignore[union-attr]
    for rank in range(count):
        for run in dealt(num_chunks, Processes(rank, count), num_minibatches):
            own = [chunk for chunk in run if not isinstance(chunk, Elsewhere)]
            assert len(own) == len(run) // count
            seen += [tuple(chunk.seeds) for chunk in own]
    # A sample is learnt with the seed that a single process gives it, by one of them.
    assert sorted(seen) == sorted(alone)
    assert len(set(seen)) == sum(num_chunks)


def dealt(num_chunks: tuple[int, ...], processes: Processes, num_minibatches: int) -> list[list[object]]:
    mine = shares(num_chunks, processes)
    rollouts = [rollout(n, share, seed) for seed, (n, share) in enumerate(zip(num_chunks, mine, strict=True))]
    return list(minibatches(rollouts, num_minibatches, torch.Generator().manual_seed(0)))  # type: ignore[arg-type]


def all_chunks(num_chunks: tuple[int, ...], processes: Processes, num_minibatches: int) -> list[object]:
    return [chunk for run in dealt(num_chunks, processes, num_minibatches) for chunk in run]


def test_a_single_process_has_everything_and_stays_idle_never() -> None:
    assert shares([3, 1], Processes(is_sharded=True)) == [Share((0, 1, 2)), Share((0,))]


@pytest.mark.parametrize("num_chunks", [(1,), (5,), (3, 1)])
def test_with_sharded_weights_all_draw_equally_often(num_chunks: tuple[int, ...]) -> None:
    found = [shares(num_chunks, Processes(rank, 4, is_sharded=True)) for rank in range(4)]
    for parts in zip(*found, strict=True):
        assert len({len(share.chunks) + share.num_idle for share in parts}) == 1
    assert all(share.num_idle == 0 for share in shares(num_chunks, Processes(3, 4)))


def test_alone_nothing_is_copied(tiny_policy: ScenesPolicy) -> None:
    one = rollout(2, Share((0, 1)), 0)
    assert gather_rollouts([one], ALONE, 4)[0] is one
    assert ALONE.agree(lambda: [1, "a"]) == [1, "a"]
    assert ALONE.mean({"a": [1.0, 2.0]}) == {"a": 1.5}


def test_buckets_are_in_order_and_no_larger_than_they_may_be() -> None:
    sizes = [BUCKET_SIZE // 2, BUCKET_SIZE // 2, 1, 2 * BUCKET_SIZE, 3, 4]
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    found = list(_buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in found] == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:]]
    assert all(a[-1] is not b[0] for a, b in pairwise(found))
