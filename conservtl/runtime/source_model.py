"""The source model: frozen, run beside the adapted model on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.errors import SourceError
from conservtl.layers import canonical, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.plan.term import View
from conservtl.runtime.extending import apply_extensions
from conservtl.runtime.padding_watch import PaddingWatch
from conservtl.runtime.source_head import SourceHead
from conservtl.runtime.taps import tensor_of
from conservtl.source.read import Source

__all__ = ["SourceModelRunner", "build_source_model"]


class SourceModelRunner:
    """The source model in eval mode, without gradients.

    Args:
        model: the source model; put into eval mode and frozen.
        layers: layer -> name of its module, for the tapped layers.
        head: name of the head's module if the target has labels of its own; outputs are then the head's.

    Raises:
        SourceError: a tapped layer is missing in the source model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, str], head: str | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._modules = {canonical(name): module for name, module in model.named_modules()}
        self._layers = dict(layers)
        self._head = None if head is None else SourceHead(model, head)
        self._watch = PaddingWatch(self.model)
        if missing := [layer for layer, name in layers.items() if name not in self._modules]:
            raise SourceError(
                f"the source model has no layer {missing[0]!r} to compare with. Tap layers that both models have."
            )

    def move(self, device: torch.device) -> None:
        """Move the source model to a device."""
        first = next(self.model.parameters(), None)
        if first is not None and first.device != device:
            self.model.to(device)

    def head(self, entered: Tensor) -> Any:
        """Return the source head's outputs for the adapted body's features, with gradient to the features."""
        if self._head is None:
            raise RuntimeError("the source's head is used only if the target has labels of its own")
        return self._head.outputs(entered)

    @torch.no_grad()
    def view(self, run: Callable[[nn.Module], Any]) -> View:
        """Return the source model's outputs and tapped features for a batch.

        Args:
            run: model -> outputs for the batch.
        """
        caught: dict[str, Tensor] = {}

        def catch(layer: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                # A copy: the next module may write into it, as ReLU(inplace=True) does.
                caught[layer] = tensor_of(output, layer).clone()

            return hook

        taps = dict(self._layers)
        if self._head is not None:
            taps[""] = self._head.name
        hooks = [self._modules[name].register_forward_hook(catch(layer)) for layer, name in taps.items()]
        self.model.eval()
        try:
            with self._watch:
                outputs = run(self.model)
        finally:
            for hook in hooks:
                hook.remove()
        of_head = caught.pop("", None)
        return View(outputs if self._head is None else of_head, caught, padding=self._watch.padding)


def build_source_model(model: nn.Module, source: Source, names: Sequence[str]) -> nn.Module:
    """Return a model that computes the source's function: a copy of the source, or of ``model`` with its values.

    Args:
        model: the model to adapt, before strategies add to it; not changed.
        source: the source, matched to the model's names.
        names: canonical names of the model's parameters that must have a source value.

    Raises:
        SourceError: a parameter of the model has no value in the source.
    """
    if source.module is not None:
        return deep_copy(source.module)
    built = deep_copy(unwrap(model))
    apply_extensions(built, (), ())  # an earlier adaptation's
    if missing := [name for name in names if name not in source.tensors]:
        raise SourceError(
            f"{source.where} has no value for {missing[0]!r}, so the source model cannot be run to compare with. "
            "Pass the source as a model (source=nn.Module) instead of its weights."
        )
    owners = {canonical(name): module for name, module in built.named_modules()}
    for key, tensor in built.state_dict(keep_vars=True).items():
        name = canonical(key)
        if name not in source.tensors:
            continue
        value = source.tensors[name].detach().to(tensor.device, tensor.dtype)
        if value.shape == tensor.shape:
            tensor.detach().copy_(value)
            continue
        owner, _, last = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):  # a head for other labels: linear and convolution take any number
            owners[owner].register_parameter(last, nn.Parameter(value.clone(), requires_grad=False))
        else:
            owners[owner].register_buffer(last, value.clone())
    return built
