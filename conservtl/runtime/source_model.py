"""The source model, frozen beside the one that is trained, and taps on what both compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import SourceError
from conservtl.layers import canonical, unwrap
from conservtl.plan.decision import View
from conservtl.runtime.extending import apply_extensions
from conservtl.runtime.source_head import SourceHead
from conservtl.runtime.taps import tensor_of
from conservtl.source.read import Source

__all__ = ["SourceModelRunner", "build_source_model"]


class SourceModelRunner:
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
        self._head = None if head is None else SourceHead(model, head)
        if lost := [layer for layer, name in layers.items() if name not in self._modules]:
            raise SourceError(f"the source model has no layer {lost[0]!r} to compare with. Tap layers that both have.")

    def move(self, device: torch.device) -> None:
        """Follow the adapted model to its device."""
        first = next(self.model.parameters(), None)
        if first is not None and first.device != device:
            self.model.to(device)

    def head(self, entered: Tensor) -> Any:
        """Outputs of the source's own head for the adapted body's features, with gradient to them."""
        if self._head is None:
            raise RuntimeError("the outputs are compared as they are: the target has the source's labels")
        return self._head.outputs(entered)

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
            taps[""] = self._head.name
        hooks = [self._modules[name].register_forward_hook(catch(layer)) for layer, name in taps.items()]
        self.model.eval()
        try:
            outputs = run(self.model)
        finally:
            for hook in hooks:
                hook.remove()
        own = caught.pop("", None)
        return View(outputs if self._head is None else own, caught)


def build_source_model(model: nn.Module, source: Source, names: Sequence[str]) -> nn.Module:
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
    apply_extensions(found, (), ())  # an earlier adaptation's
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
