"""What one update pass of a published recipe holds, counted at the real size on torch's meta device: nothing is run.

Type ``python -m experiments.benchmarks.update_memory`` for the table of docs/recipes.md. A network is counted with a
few blocks of each kind, and what another block of a kind adds is counted once and multiplied. Attention is taken to be
a fused kernel's, which keeps its inputs, its output and a number a row.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from agents.policies.weights import VERSIONS
from experiments.benchmarks.entry import run_benchmark
from experiments.benchmarks.memory_networks import Network, network_of
from experiments.flags import Usage, parse
from experiments.recipes import find_recipe
from pdtr.config import TrainConfig

GIB = 2**30
USAGE = "python -m experiments.benchmarks.update_memory"
RECIPES = {
    "unipic2_pdtr": ("edit", "t2i"),
    "unipic2_metaquery_pdtr": ("edit", "t2i"),
    "flow_grpo_sd3_geneval": ("t2i",),
    "flow_grpo_sd3_ocr": ("t2i",),
    "flow_grpo_sd3_pickscore": ("t2i",),
    "diffusion_nft_sd3_geneval": ("t2i",),
    "flow_grpo_flux_kontext": ("edit",),
    "diffusion_nft_qwen_image_edit": ("edit",),
}
"""Published recipes, and the tasks that each learns."""


@dataclass(frozen=True)
class Options:
    """Count what one update pass of published recipes holds.

    Attributes:
        recipes: which.
        chunk_size: images at once; each recipe's own where it is 0.
        gradient_checkpointing: recompute activations where the recipe does not.
    """

    recipes: tuple[str, ...] = tuple(RECIPES)
    chunk_size: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.recipes) - set(RECIPES))
        if unknown or self.chunk_size < 0:
            raise ValueError(
                f"recipes, chunk_size: expected some of {', '.join(RECIPES)} and 0 or more, got "
                f"{', '.join(unknown or self.recipes)} and {self.chunk_size}"
            )

    def config(self, recipe: str) -> TrainConfig:
        """A recipe's configuration as it is counted."""
        config = find_recipe(recipe)()
        assert config.backbone is not None
        if self.gradient_checkpointing:
            config = replace(config, backbone=replace(config.backbone, gradient_checkpointing=True))
        return replace(config, chunk_size=self.chunk_size or config.chunk_size)


@dataclass(frozen=True)
class Update:
    """Bytes of one forward and one backward pass.

    Attributes:
        sequences: that go through the network at once: a chunk, twice where there is guidance.
        weights: the network and all versions of its adapters.
        saved: activations that the forward pass keeps for the backward pass.
        peak: the most that both passes hold at once beside the weights, gradients of the adapters included.
    """

    sequences: int
    weights: int
    saved: int
    peak: int


@dataclass(frozen=True)
class _Pass:
    """Bytes of a network with some of its blocks, see :class:`Update`; ``gradients`` are left by the backward pass."""

    weights: int
    saved: int
    peak: int
    gradients: int

    def plus(self, other: _Pass, less: _Pass, times: int) -> _Pass:
        """With what ``other`` has more than ``less``, so many times; what is held for a moment is not repeated."""
        names = ("weights", "saved", "gradients")
        weights, saved, gradients = (times * (getattr(other, name) - getattr(less, name)) for name in names)
        return _Pass(
            self.weights + weights,
            self.saved + saved,
            # At most: gradients come as activations go.
            self.peak + saved + gradients,
            self.gradients + gradients,
        )


def count_update(config: TrainConfig, task: str) -> Update:
    """Count one update pass of a recipe on a published model.

    Args:
        config: the recipe's; its ``base`` says which network, its chunk and settings how much of it.
        task: "t2i" or "edit".

    Raises:
        ValueError: the base is none that is known here, or nothing is adapted.
    """
    network = network_of(config, task)
    base = _count(network, network.few, config)
    total = base
    for kind, number in network.many.items():
        more = _count(network, {**network.few, kind: network.few[kind] + 1}, config)
        total = total.plus(more, base, number - network.few[kind])
    return Update(network.sequences, total.weights, total.saved, total.peak)


def _count(network: Network, blocks: Mapping[str, int], config: TrainConfig) -> _Pass:
    assert config.backbone is not None
    transformer, forward = network.build(blocks)
    if config.backbone.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    held = [*transformer.parameters(), *transformer.buffers()]
    adapters = sum(parameter.nbytes for parameter in transformer.parameters() if parameter.requires_grad)
    weights = sum(tensor.nbytes for tensor in held) + (len(VERSIONS) - 1) * adapters
    with _fused_attention(), _Live(held) as live:
        velocity = forward()
        saved = live.now
        velocity.float().square().mean().backward()  # type: ignore[no-untyped-call]
        del velocity
        gradients = live.now
    return _Pass(weights, saved, live.peak, gradients)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are alive, those that were there before left out."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        # By the storage's own address: views share it, and on the meta device there is no data to tell by.
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Attention(torch.autograd.Function):
    """The sizes of a fused attention: [B, H, T, D] in and out, log-sum-exp [B, H, T] kept in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch would take attention apart, into matrices of all pairs of tokens."""
    module: Any = functional
    before = module.scaled_dot_product_attention
    module.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        module.scaled_dot_product_attention = before


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    result: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return result


def table(rows: Sequence[tuple[str, str, Update]]) -> str:
    """The rows as Markdown, in GiB."""
    lines = ["| Recipe | Task | Sequences | Weights | Kept for backward | Most at once |", "|---|---|---|---|---|---|"]
    for name, task, update in rows:
        figures = " | ".join(
            f"{size / GIB:.1f}" for size in (update.weights, update.saved, update.weights + update.peak)
        )
        lines.append(f"| `{name}` | {task} | {update.sequences} | {figures} |")
    return "\n".join(lines)


def benchmark(arguments: Sequence[str]) -> int:
    """Count the recipes, print the table."""
    options = parse(Options(), Usage(USAGE), arguments)
    rows = [
        (name, task, count_update(options.config(name), task)) for name in options.recipes for task in RECIPES[name]
    ]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(benchmark))
