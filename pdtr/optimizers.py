"""Several optimisers as one: Muon for the matrices of a network's blocks, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_BLOCKS = ("blocks.", "layers.")


def muon_and_adamw(
    named: Iterable[tuple[str, nn.Parameter]], muon_learning_rate: float, **adamw: Any
) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon/) for two-dimensional weights in blocks, and AdamW.

    Muon's updates are scaled to AdamW's root mean square and decay no weights. Whichever has nothing to train is not
    there.

    Args:
        named: parameters by name; ``blocks.`` or ``layers.`` in a name says that it belongs to a block.
        muon_learning_rate: Muon's.
        adamw: settings of ``torch.optim.AdamW``.
    """
    import torch

    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        is_matrix = parameter.ndim == 2 and any(part in name for part in _BLOCKS)
        (matrices if is_matrix else others).append(parameter)
    made: list[torch.optim.Optimizer] = []
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=muon_learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_steps=4
        )
        made.append(muon)
    if others:
        made.append(torch.optim.AdamW(others, **adamw))
    return made


def step_all(optimizers: Sequence[torch.optim.Optimizer], peaks: Sequence[float], scale: float) -> None:
    """A step of each at ``scale`` times its peak learning rate; gradients are gone after it."""
    for optimizer, peak in zip(optimizers, peaks, strict=True):
        optimizer.param_groups[0]["lr"] = peak * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def optimizers_state(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Several optimisers' tensors, and what else their continuation needs, by ``optimizer0``, ``optimizer1``, ..."""
    from pdtr import checkpoint

    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for index, optimizer in enumerate(optimizers):
        state, meta[f"optimizer{index}"] = checkpoint.optimizer_state(optimizer)
        tensors |= {f"optimizer{index}.{name}": tensor for name, tensor in state.items()}
    return tensors, meta


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Put optimisers into the state that :func:`optimizers_state` took, whole; other entries are passed over.

    Moments of weights that are cut up over processes are cut up with them.

    Raises:
        ValueError: it is that of others.
    """
    from agents.policies.sharding import cut_optimizer_state
    from pdtr import checkpoint

    found = [meta[name] for index in range(len(meta)) if (name := f"optimizer{index}") in meta]
    if len(found) != len(optimizers):
        raise ValueError(
            f"checkpoint: expected the state of {len(optimizers)} optimisers, got that of {len(found)}; "
            "go on with the muon_learning_rate that the run began with"
        )
    for index, optimizer in enumerate(optimizers):
        prefix = f"optimizer{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        checkpoint.restore_optimizer(optimizer, cut_optimizer_state(own, parameters), found[index])
