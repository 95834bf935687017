"""LoRA adapters in a network, several by name, one of them active: peft's layers and their tensors, found once.

peft's own ``set_adapter`` walks all modules of the network at each call, which takes longer than a tenth of a second in
a big one, and an algorithm switches twice a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional


class Projection(nn.Linear):
    """Half of an adapter: weights in float32, which an optimiser needs, and products in the input's dtype.

    peft casts inputs to the weights' dtype instead: under a bfloat16 network every adapted layer then keeps a copy of
    its input of twice the size for the backward pass, and multiplies in float32. In a float32 network nothing is cast.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> Projection:
        """The same map with the same parameter; adapters have no bias."""
        projection = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        projection.weight = linear.weight
        return projection

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in x's dtype."""
        return functional.linear(x, self.weight.to(x.dtype))


@final
class Adapters:
    """Adapters of a network's linear layers; the first one is active.

    Args:
        network: it gets the adapters in its layers' places, and is frozen but for them.
        config: peft's ``LoraConfig``.
        names: of the adapters.
    """

    def __init__(self, network: nn.Module, config: Any, names: Sequence[str]) -> None:
        from peft import get_peft_model
        from peft.tuners.lora import LoraLayer

        self._network = network
        self._model: Any = get_peft_model(cast(Any, network.requires_grad_(False)), config, names[0])
        for name in names[1:]:
            self._model.add_adapter(name, config)
        self._layers: dict[str, Any] = {p: m for p, m in network.named_modules() if isinstance(m, LoraLayer)}
        for layer in self._layers.values():
            _compute_in_input_dtype(layer)
        # Where each tensor is, not the tensor: a move to another device may put a new one in its place.
        self._places = {name: _places(self._model, name) for name in names}

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's tensors, by names in which the adapter's own is left out."""
        return {key: own[attribute] for key, (own, attribute) in self._places[name].items()}

    def activate(self, name: str, learns: bool) -> None:
        """The network computes with an adapter from now on; it has gradients where it learns, the others have none.

        What peft's ``set_adapter`` leaves behind, on the layers that were found at the start. They have adapters of
        linear maps only, no ``modules_to_save``, and no variant of LoRA that freezes a part of an adapter.
        """
        self._model.active_adapter = self._model.base_model.active_adapter = name
        for layer in self._layers.values():
            if layer.merged:
                layer.unmerge()
            # Its own setter does this, and flips gradients adapter by adapter, at fifty times the cost.
            layer._active_adapter = [name]
        for other, places in self._places.items():
            has_gradients = learns and other == name
            for own, attribute in places.values():
                own[attribute].requires_grad_(has_gradients)

    def merge(self, name: str) -> None:
        """Add an adapter into the layers for good, one after the other, and take all adapters out of the network.

        In place, for the device may have no room for the network twice. The adapters' tensors stay as they are.
        """
        with torch.no_grad():
            for place, layer in self._layers.items():
                base = layer.get_base_layer()
                base.weight.data += layer.get_delta_weight(name)
                self._network.set_submodule(place, base)
        self._layers = {}


def _compute_in_input_dtype(layer: Any) -> None:
    for halves in (layer.lora_A, layer.lora_B):
        for name, half in list(halves.items()):
            halves[name] = Projection.of(half)
    layer.cast_input_dtype_enabled = False


def _places(model: nn.Module, adapter: str) -> dict[str, tuple[dict[str, Any], str]]:
    """The modules' own dictionaries in which an adapter's tensors are, with the tensors' keys there."""
    found = {}
    for name, _ in model.named_parameters():
        if f".{adapter}." in name and "lora_" in name:
            owner, _, attribute = name.rpartition(".")
            found[name.replace(f".{adapter}.", ".")] = model.get_submodule(owner)._parameters, attribute
    return found
