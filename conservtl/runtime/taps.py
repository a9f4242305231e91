"""Taps: record the outputs of layers and the inputs of modules in a forward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import SelectorError, SpecError
from conservtl.layers import canonical, unwrap

__all__ = ["Taps", "tensor_of"]


class _Tap:
    """Forward hook that records the last output, or pre-hook that records the last input.

    A copy, in a copied model, records nothing.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.live = True
        self.output: Tensor | None = None

    def __call__(self, _: nn.Module, inputs: Any, output: Any = None) -> None:
        if self.live and torch.is_grad_enabled():
            # A copy: the next module may write into it, as ReLU(inplace=True) does.
            self.output = tensor_of(inputs if output is None else output, self.layer).clone()

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "live": False, "output": None}


class Taps:
    """Records outputs of layers and inputs of modules in forward passes with gradients.

    Args:
        model: hooks are registered on its modules.
        layers: layer -> name of the module whose output is the layer's.
        enters: names of the modules whose inputs to record.

    Raises:
        SelectorError: the model has no such module.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, str], enters: Collection[str] = ()) -> None:
        modules = {canonical(name): module for name, module in unwrap(model).named_modules()}
        if unknown := [name for name in enters if name not in modules]:
            raise SelectorError(f"the model has no module {unknown[0]!r} whose input could be taken.")
        self._taps = {layer: _Tap(layer) for layer in layers}
        self._inputs = {name: _Tap(name) for name in enters}
        self._handles = [modules[layers[layer]].register_forward_hook(tap) for layer, tap in self._taps.items()]
        self._handles += [modules[name].register_forward_pre_hook(tap) for name, tap in self._inputs.items()]

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the records of the last forward pass, once: layer -> features, and module -> input.

        Raises:
            SpecError: there was no forward pass since the last call.
        """
        taps = [*self._taps.values(), *self._inputs.values()]
        if missing := [tap.layer for tap in taps if tap.output is None]:
            raise SpecError(
                f"the outputs of {missing} are not known: the model made no forward pass with gradients since the last "
                "loss. Call model(inputs) first, then adaptation.loss(...), once for each."
            )
        features = {layer: tap.output for layer, tap in self._taps.items() if tap.output is not None}
        entered = {name: tap.output for name, tap in self._inputs.items() if tap.output is not None}
        for tap in taps:
            tap.output = None
        return features, entered

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def tensor_of(output: Any, layer: str) -> Tensor:
    """Return a layer's output: a tensor, or the first part of a tuple, as of recurrent and transformer layers.

    Raises:
        SpecError: the output is no tensor.
    """
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise SpecError(f"layer {layer!r} returns a {type(output).__name__}, no tensor to compare. Tap another layer.")
    return output
