"""Current, old, reference and averaged weights of one policy, without a copy of what does not change.

With LoRA (peft) every version is an adapter on one frozen base, and the reference is the base itself until it is
reset. With full training every version but the current one is a frozen copy of the transformer. Either way a version
is used by ``with weights.use("reference"):`` and an algorithm need not know which it is.

With ``is_sharded`` the networks are cut up over processes (see ``agents.policies.sharding``): every version of full
weights, the frozen base under adapters. Adapters are small, and every process keeps them whole.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from agents.policies.adapters import Adapters
from agents.policies.averaging import average_into
from agents.policies.base import FlowPolicy
from agents.policies.sharding import cut_like, shard

Version = Literal["current", "old", "reference", "ema"]
VERSIONS: tuple[Version, ...] = ("current", "old", "reference", "ema")
LORA_NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters. Flow-GRPO (arXiv:2505.05470) and UniPic 2.0 (arXiv:2509.04548): rank 32, alpha 64.

    Attributes:
        rank: r.
        alpha: the update is scaled by alpha / rank.
        target_modules: ends of the names of the adapted linear layers; the policy's own ``lora_targets`` where None,
            which are Flow-GRPO's for SD3.
    """

    rank: int = 32
    alpha: int = 64
    target_modules: tuple[str, ...] | None = None


class PolicyWeights(ABC):
    """The versions of a policy's weights. ``current`` is the one that learns and is in use by default."""

    @abstractmethod
    def use(self, version: Version) -> Any:
        """A context in which the policy acts with ``version``; gradients only for ``current``."""

    @abstractmethod
    def blend(self, target: Version, decay: float) -> None:
        """``target <- decay target + (1 - decay) current``; 0 copies."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Every version's tensors by ``version.name``, for a checkpoint; cut up where they are sharded."""

    @abstractmethod
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore :meth:`state`, bit for bit, from whole tensors."""


@final
class FullWeights(PolicyWeights):
    """Every parameter learns; the other versions are frozen copies, made only for ``versions``.

    Raises:
        ValueError: the parameters are not float32: an update is some 1e-4 of a weight, which bfloat16 rounds away.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        versions: Sequence[Version] = ("old", "reference", "ema"),
        is_sharded: bool = False,
    ) -> None:
        dtypes = {parameter.dtype for parameter in policy.transformer.parameters()}
        if dtypes != {torch.float32}:
            raise ValueError(
                f"weights: expected float32 parameters to train in full, got {', '.join(sorted(map(str, dtypes)))}; "
                "set float32_weights in the backbone's settings, or train adapters"
            )
        self._policy = policy
        self._modules: dict[Version, nn.Module] = {"current": policy.transformer.requires_grad_(True)}
        for version in versions:
            self._modules[version] = copy.deepcopy(policy.transformer).requires_grad_(False)
            # At once, and the original last: only one copy is whole at a time.
            if is_sharded:
                shard(self._modules[version])
        if is_sharded:
            shard(policy.transformer)

    @contextmanager
    def use(self, version: Version) -> Iterator[None]:
        """Put a version's module in the policy's place for the context."""
        before = self._policy.transformer
        self._policy.transformer = self._module(version)
        try:
            yield
        finally:
            self._policy.transformer = before

    def blend(self, target: Version, decay: float) -> None:
        """See :meth:`PolicyWeights.blend`."""
        average_into(self._module(target), self._module("current"), decay)

    def parameters(self) -> list[nn.Parameter]:
        """All of the current transformer's."""
        return list(self._module("current").parameters())

    def state(self) -> dict[str, Tensor]:
        """See :meth:`PolicyWeights.state`."""
        return {f"{v}.{name}": t for v, module in self._modules.items() for name, t in module.state_dict().items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See :meth:`PolicyWeights.load_state`."""
        for version, module in self._modules.items():
            prefix = f"{version}."
            part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            own = module.state_dict()
            module.load_state_dict({name: cut_like(t, own.get(name, t)) for name, t in part.items()})

    def _module(self, version: Version) -> nn.Module:
        if version not in self._modules:
            raise ValueError(f"weights: expected one of {sorted(self._modules)}, got {version!r}; keep that version")
        return self._modules[version]


@final
class LoraWeights(PolicyWeights):
    """Adapters on a frozen base: ``current`` learns; ``old``, ``ema`` and, once reset, ``reference`` are adapters too.

    Adapters start as the zero update, so that every version begins as the base. They are float32 whatever the base is.

    Differs: an adapter computes in the dtype of what its layer gets, as under the published code's autocast; peft would
    compute in float32.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        settings: LoraSettings,
        versions: Sequence[Version] = ("old", "reference", "ema"),
        seed: int = 0,
        is_sharded: bool = False,
    ) -> None:
        from peft import LoraConfig

        targets = policy.lora_targets if settings.target_modules is None else settings.target_modules
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            init_lora_weights="gaussian",
            target_modules=rf".*\.({'|'.join(name.replace('.', '[.]') for name in targets)})",
        )
        self._scale = settings.alpha / settings.rank
        self._versions: tuple[Version, ...] = ("current", *versions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._adapters = Adapters(policy.transformer, config, self._versions)
        self._active: Version = "current"
        self._activate("current")
        for version in versions:
            self.blend(version, 0.0)
        if is_sharded:
            adapters = [t for version in self._versions for t in self._adapters.tensors(version).values()]
            shard(policy.transformer, replicated=adapters)

    @contextmanager
    def use(self, version: Version) -> Iterator[None]:
        """Make a version's adapter the active one for the context."""
        before = self._active
        self._activate(version)
        try:
            yield
        finally:
            self._activate(before)

    def blend(self, target: Version, decay: float) -> None:
        """See :meth:`PolicyWeights.blend`. Differs: factors are blended, not their product, as is usual for LoRA."""
        self._check(target)
        current = self._adapters.tensors("current")
        with torch.no_grad():
            for name, tensor in self._adapters.tensors(target).items():
                tensor.lerp_(current[name], 1 - decay)

    def parameters(self) -> list[nn.Parameter]:
        """The current adapter's."""
        return list(self._adapters.tensors("current").values())

    def state(self) -> dict[str, Tensor]:
        """See :meth:`PolicyWeights.state`."""
        return {f"{v}.{name}": t.detach() for v in self._versions for name, t in self._adapters.tensors(v).items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """See :meth:`PolicyWeights.load_state`."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(tensors[name])

    def save_lora(self, folder: Path, version: Version = "current") -> Path:
        """Write a version as the file that ``load_lora_weights`` of the backbone's diffusers pipeline reads.

        The scale alpha / rank is multiplied into B, so that a reader that takes alpha for the rank, as most do where a
        file says nothing of it, has the same update.

        Returns:
            The file's path, ``pytorch_lora_weights.safetensors`` in the folder.
        """
        self._check(version)
        tensors = {
            f"transformer.{name.removeprefix('base_model.model.')}": tensor.detach()
            * (self._scale if ".lora_B." in name else 1.0)
            for name, tensor in self._adapters.tensors(version).items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / LORA_NAME)
        return folder / LORA_NAME

    def merge(self, version: Version) -> None:
        """Add a version into the policy's transformer, in place, which is a plain one then; the end of these weights.

        Saved so, a policy trained with adapters loads as any other.
        """
        self._check(version)
        self._adapters.merge(version)
        self._versions = ()

    def _check(self, version: Version) -> None:
        if not self._versions:
            raise ValueError(f"weights: expected adapters, got {version!r} of merged ones; make LoraWeights again")
        if version not in self._versions:
            raise ValueError(f"weights: expected one of {list(self._versions)}, got {version!r}; keep that version")

    def _activate(self, version: Version) -> None:
        self._check(version)
        self._active = version
        self._adapters.activate(version, learns=version == "current")
