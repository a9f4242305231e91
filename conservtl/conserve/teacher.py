"""The source model, frozen beside the one that is trained, and taps on what both compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.decision import View
from conservtl.errors import SelectorError, SourceError, SpecError
from conservtl.layers import canonical, unwrap
from conservtl.source import Source

__all__ = ["Taps", "Teacher", "source_model", "tensor_of"]


class _Tap:
    """A forward hook that keeps the last output, or a pre-hook that keeps the last input.

    A copy of it, with a copied model, keeps nothing.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.live = True
        self.output: Tensor | None = None

    def __call__(self, _: nn.Module, inputs: Any, output: Any = None) -> None:
        if self.live and torch.is_grad_enabled():
            # A copy: what comes next may write into it, as ReLU(inplace=True) does.
            self.output = tensor_of(inputs if output is None else output, self.layer).clone()

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "live": False, "output": None}


class Taps:
    """Outputs of some layers, and inputs of some modules, caught as the model computes them.

    Args:
        model: hooks are put on its modules; its forward passes with gradients are listened to.
        layers: layer -> name of the module whose output is the layer's.
        enters: names of the modules whose inputs are wanted.
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
        """What was caught in the last forward pass, once: features by layer, and inputs by module.

        Raises:
            SpecError: there was none.
        """
        wanted = [*self._taps.values(), *self._inputs.values()]
        if missing := [tap.layer for tap in wanted if tap.output is None]:
            raise SpecError(
                f"the outputs of {missing} are not known: the model made no forward pass with gradients since the last "
                "loss. Call model(inputs) first, then adaptation.loss(...), once for each."
            )
        found = {layer: tap.output for layer, tap in self._taps.items() if tap.output is not None}
        entered = {name: tap.output for name, tap in self._inputs.items() if tap.output is not None}
        for tap in wanted:
            tap.output = None
        return found, entered

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class Teacher:
    """The source model in eval mode, without gradients.

    Args:
        model: the source model; put into eval mode and frozen.
        layers: layer -> name of its module, for the layers that are tapped.
        head: name of the head's module where the target has labels of its own, so that outputs are the head's.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, str], head: str | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._modules = {canonical(name): module for name, module in model.named_modules()}
        self._layers = dict(layers)
        self._head = head
        if lost := [layer for layer, name in layers.items() if name not in self._modules]:
            raise SourceError(f"the source model has no layer {lost[0]!r} to compare with. Tap layers that both have.")

    def move(self, device: torch.device) -> None:
        """Follow the adapted model to its device."""
        first = next(self.model.parameters(), None)
        if first is not None and first.device != device:
            self.model.to(device)

    def head(self, entered: Tensor) -> Any:
        """Outputs of the source's own head for the adapted body's features, with gradient to them."""
        return self._modules[self._head or ""](entered)

    @torch.no_grad()
    def view(self, run: Callable[[nn.Module], Any]) -> View:
        """What the source model makes of a batch.

        Args:
            run: calls a model with the batch.
        """
        caught: dict[str, Tensor] = {}

        def catch(layer: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                # A copy: what comes next may write into it, as ReLU(inplace=True) does.
                caught[layer] = tensor_of(output, layer).clone()

            return hook

        taps = dict(self._layers)
        if self._head is not None:
            taps[""] = self._head
        hooks = [self._modules[name].register_forward_hook(catch(layer)) for layer, name in taps.items()]
        self.model.eval()
        try:
            outputs = run(self.model)
        finally:
            for hook in hooks:
                hook.remove()
        own = caught.pop("", None)
        return View(outputs if self._head is None else own, caught)


def source_model(model: nn.Module, source: Source, names: Sequence[str]) -> nn.Module:
    """A model that computes what the source computed: a copy of the source, or of this one with its values.

    Args:
        model: the model to adapt, not changed; as it is before anything is added to it.
        source: matched to the model's names.
        names: the model's parameters and buffers by canonical name, those that must have a source value.

    Raises:
        SourceError: a parameter of the model has no value in the source, so it cannot be run.
    """
    if source.module is not None:
        return copy.deepcopy(source.module)
    found = copy.deepcopy(unwrap(model))
    if missing := [name for name in names if name not in source.tensors]:
        raise SourceError(
            f"{source.where} has no value for {missing[0]!r}, so the source model cannot be run to compare with. "
            "Pass the source as a model (source=nn.Module) instead of its weights."
        )
    owners = {canonical(name): module for name, module in found.named_modules()}
    for key, tensor in found.state_dict(keep_vars=True).items():
        name = canonical(key)
        if name not in source.tensors:
            continue
        value = source.tensors[name].detach().to(tensor.device, tensor.dtype)
        if value.shape == tensor.shape:
            tensor.detach().copy_(value)
            continue
        owner, _, own = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):  # a head for other labels: linear and convolution take any number
            owners[owner].register_parameter(own, nn.Parameter(value.clone(), requires_grad=False))
        else:
            owners[owner].register_buffer(own, value.clone())
    return found


def tensor_of(output: Any, layer: str) -> Tensor:
    """A layer's output: a tensor, or the first of what a recurrent or a transformer layer gives."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise SpecError(f"layer {layer!r} gives a {type(output).__name__}, no tensor to compare. Tap another layer.")
    return output
