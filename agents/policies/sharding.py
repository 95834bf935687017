"""Weights cut up over processes (FSDP2): each holds a part of every tensor, and the whole of one block at a time.

``fully_shard`` hangs its hooks on a module's forward pass. Policies call a transformer's parts one by one, so the
root's would never run: :func:`as_forward` runs a policy's velocity as a forward pass of the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(transformer: nn.Module, replicated: Collection[nn.Parameter] = ()) -> None:
    """Cut a transformer's parameters up over all processes, block by block, on the device of the process.

    A block is gathered when it runs, forwards and backwards, and given up after. Gradients are summed over processes
    in fp32 at the end of every backward pass, so that nobody ever holds all of them, unless :func:`sum_after_backward`
    says otherwise. The network may be on the CPU
    still: its blocks come to the device one by one, so that one which fits on no device whole can be cut up.

    Args:
        transformer: its blocks are the elements of its module lists, as in diffusers' transformers.
        replicated: parameters that every process keeps whole, such as adapters.

    Raises:
        ValueError: it has no module list.
    """
    blocks = [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
    if not blocks:
        raise ValueError(
            f"sharding: expected a transformer with blocks in an nn.ModuleList, got {type(transformer).__name__} "
            "without any; train it with sharding 'none', or put its blocks into a list"
        )
    for module in (*blocks, transformer):
        cut = fully_shard(
            module,
            # The root too: its own parameters would stay whole between a rollout's forward passes.
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
            ignored_params=set(replicated),
        )
        # A sum, as in plain data parallelism: the learner has divided by the samples of all processes. By itself FSDP
        # would ask for a scaled sum, which gloo does not have.
        cut.set_gradient_divide_factor(1.0)
        cut.set_force_sum_reduction_for_comms(True)
    cast(Any, transformer).run_as_forward = _call
    register_fsdp_forward_method(transformer, "run_as_forward")


def sum_after_backward(transformer: nn.Module, is_summed: bool) -> None:
    """Whether the next backward passes sum gradients over processes; nothing where the transformer is not cut up.

    Of several passes of one optimiser step only the last has to, which saves as many messages. The price is memory:
    until then every process holds the whole gradient, as many bytes as there are of all weights (fp32, full training
    of SD3.5-Medium: 9 GB).
    """
    if isinstance(transformer, FSDPModule):
        transformer.set_requires_gradient_sync(is_summed)


def as_forward(transformer: nn.Module, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, which uses the transformer's parts; as its forward pass where it is sharded."""
    if not isinstance(transformer, FSDPModule):
        return function(*arguments)
    result: Tensor = cast(Any, transformer).run_as_forward(function, *arguments)
    return result


def _call(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    # A copy, for the hook that gathers the weights again hangs on it, and would be lost with a view.
    return function(*arguments).clone()


def is_cut(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be cut up; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """As ``clip_grad_norm_``, of parameters of which some may be cut up and some not; collective. -> the norm."""
    parts = [[p for p in parameters if is_cut(p) == kind] for kind in (False, True)]
    if not all(parts):
        return whole(nn.utils.clip_grad_norm_(parameters, max_norm))
    gradients = [[p.grad for p in part if p.grad is not None] for part in parts]
    norm = torch.stack([whole(nn.utils.get_total_norm(part)) for part in gradients]).square().sum().sqrt()
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return norm


def gathered(tensors: Mapping[str, Tensor], is_kept: bool) -> dict[str, Tensor]:
    """The whole of each tensor, one after the other; cut ones come to the CPU. Collective.

    Args:
        tensors: cut up or not.
        is_kept: whether this process wants them; the others only take part, and get nothing.
    """
    found = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if is_kept:
            found[name] = complete.cpu() if is_cut(tensor) else complete
    return found


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut up as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def cut_optimizer_state(tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The moments among an optimiser's tensors cut up as their parameters are; the rest as it is.

    Args:
        tensors: by the names ``state.INDEX.NAME`` that checkpoints give them.
        parameters: of the optimiser, in order.
    """
    found = {}
    for name, tensor in tensors.items():
        part, index, *_ = name.split(".")
        like = parameters[int(index)] if part == "state" else tensor
        found[name] = cut_like(tensor, like) if tensor.shape == like.shape else tensor
    return found
