"""The source model: frozen, run beside the adapted model on the same inputs; outputs where the labels differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.compat import version_of
from conservtl.errors import SourceError, SpecError, counted
from conservtl.layers import canonical, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.layers.names import named_modules
from conservtl.plan.decision import apply_extensions
from conservtl.plan.term import CLASS_AXIS, View, numbered
from conservtl.runtime.layer_features import all_tensors_of
from conservtl.runtime.model_hooks import hooked
from conservtl.runtime.padding_watch import PaddingWatch
from conservtl.runtime.preserve import eval_mode
from conservtl.source.read import Source
from conservtl.source.shared import SharedModel

__all__ = ["CommonLabels", "SourceHead", "SourceModelRunner", "build_source_model"]


class SourceHead:
    """The head of a source model."""

    def __init__(self, source: nn.Module, name: str) -> None:
        self.name = name
        self.module = named_modules(source)[name]
        self._copies: dict[torch.device, nn.Module] = {}

    def outputs(self, entering: Tensor) -> Any:
        """Return the head's outputs for the features that enter it, with gradient to them.

        Features in half precision come from a pass under autocast, which may be over: then the head runs under it too.
        """
        own = next(self.module.parameters(), entering)
        mixed = entering.dtype in (torch.bfloat16, torch.float16) and own.dtype != entering.dtype
        with torch.autocast(entering.device.type, entering.dtype) if mixed else nullcontext():
            return self.module(entering)

    @contextmanager
    def replacing(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put the source's head into the place of a model's own for a while; yields the model, unwrapped.

        The whole module is replaced, not its weights alone: the model's own head may be fed from other layers.
        """
        bare = unwrap(model)
        parent, _, key = self.name.rpartition(".")
        holder = bare.get_submodule(parent)
        head = holder.get_submodule(key)
        setattr(holder, key, self._on(next(bare.parameters()).device))
        try:
            yield bare
        finally:
            setattr(holder, key, head)

    def _on(self, device: torch.device) -> nn.Module:
        if device not in self._copies:
            self._copies[device] = deep_copy(self.module).to(device)
        return self._copies[device]


class CommonLabels:
    """The outputs of labels that the adapted model and the source model both have.

    Args:
        numbers: for each output of the adapted model that of the source with its label, or None.
    """

    def __init__(self, numbers: Sequence[int | None]) -> None:
        self._size = len(numbers)
        pairs = [(place, number) for place, number in enumerate(numbers) if number is not None]
        self._adapted, self._source = (torch.tensor(one) for one in zip(*pairs, strict=True))

    def of(self, adapted: Tensor, source: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
        """Return both models' outputs for these labels, in one order."""
        axes = [axis, CLASS_AXIS.get(adapted.ndim), *range(1, adapted.ndim)]
        found = next((one for one in axes if one is not None and self._fits(adapted.shape, source.shape, one)), None)
        if found is None:
            raise SpecError(
                f"labels: outputs must have one axis of {counted(self._size, 'label')}, the target's, and be "
                "like the source's on "
                f"all others; received shape {tuple(adapted.shape)}, and {tuple(source.shape)} of the source."
            )
        places, numbers = (one.to(adapted.device) for one in (self._adapted, self._source))
        return adapted.index_select(found, places), source.to(adapted.device).index_select(found, numbers)

    def _fits(self, adapted: torch.Size, source: torch.Size, axis: int) -> bool:
        others = [[size for place, size in enumerate(shape) if place != axis] for shape in (adapted, source)]
        return axis < len(adapted) == len(source) and adapted[axis] == self._size and others[0] == others[1]


class SourceModelRunner:
    """The source model in eval mode, without gradients.

    Args:
        model: the source model; put into eval mode and frozen. A shared one is put into eval mode for each view.
        layers: layer -> name of its module, for the tapped layers.
        heads: names of the head's modules if the target has labels of its own; outputs are then theirs.

    Raises:
        SourceError: a tapped layer is missing in the source model.
    """

    def __init__(self, model: nn.Module | SharedModel, layers: Mapping[str, str], heads: Sequence[str] = ()) -> None:
        self.shared = model if isinstance(model, SharedModel) else None
        self.model = model.model if isinstance(model, SharedModel) else model.eval().requires_grad_(False)
        self._modules = named_modules(self.model)
        self._layers = dict(layers)
        self._heads = {name: SourceHead(self.model, name) for name in heads}
        self._watch = PaddingWatch(self.model)
        self._written: set[str] = set()  # layers whose outputs the model writes into, as ReLU(inplace=True) does
        if missing := [layer for layer, name in layers.items() if name not in self._modules]:
            raise SourceError(
                f"the source model has no layer {missing[0]!r} to compare with. Tap layers that both models have."
            )

    def move(self, device: torch.device) -> None:
        """Move the source model to a device."""
        first = next(self.model.parameters(), None)
        if self.shared is None and first is not None and first.device != device:
            self.model.to(device)

    def head(self, entered: Mapping[str, Sequence[Tensor]]) -> Any:
        """Return the source head's outputs for the inputs of its modules, with gradient; a list for several calls."""
        return _single([self._heads[name].outputs(one) for name, found in entered.items() for one in found])

    @torch.no_grad()
    def view(self, run: Callable[[nn.Module], Any]) -> View:
        """Return the source model's outputs and tapped features for a batch."""
        caught: dict[str, list[Any]] = {layer: [] for layer in self._layers}
        of_heads: dict[str, list[Any]] = {name: [] for name in self._heads}
        passes: list[None] = []
        watched: list[tuple[str, Tensor, int]] = []

        def catch(layer: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, _: Any, output: Any) -> None:
                for tensor in all_tensors_of(output, layer, module):
                    if layer in self._written or tensor.is_inference():
                        caught[layer].append(tensor.clone())
                    else:
                        caught[layer].append(tensor)
                        watched.append((layer, tensor, version_of(tensor)))

            return hook

        hooks = [self._modules[name].register_forward_hook(catch(layer)) for layer, name in self._layers.items()]
        hooks.append(self.model.register_forward_hook(lambda *_: passes.append(None)))
        for name, found in of_heads.items():
            hooks.append(self._modules[name].register_forward_hook(lambda _, __, y, found=found: found.append(y)))
        with hooked(hooks), self._as_source(), self._watch:
            outputs = run(self.model)
        if written := {layer for layer, tensor, before in watched if version_of(tensor) != before}:
            self._written |= written
            return self.view(run)
        if of_heads:
            outputs = _single([output for found in of_heads.values() for output in found])
        return View(outputs, numbered(caught), padding=self._watch.padding, passes=max(1, len(passes)))

    @contextmanager
    def _as_source(self) -> Iterator[None]:
        """Put the model into eval mode, and let a shared one compute the source's function."""
        if self.shared is None:
            self.model.eval()
            yield
            return
        with eval_mode(self.model), self.shared.as_source():
            yield


def _single(results: list[Any]) -> Any:
    """Return the only result of a module, or a list of those of all its calls."""
    return results[0] if len(results) == 1 else results


def build_source_model(model: nn.Module, source: Source, names: Sequence[str]) -> nn.Module | SharedModel:
    """Return a model that computes the source's function: a copy of the source, or of ``model`` with its values.

    ``names`` are the parameters that must have a value in the source. The model is not changed.

    Raises:
        SourceError: a parameter of the model has no value in the source.
    """
    if source.shared is not None:
        return source.shared
    if source.module is not None:
        return deep_copy(source.module)
    built = deep_copy(unwrap(model))
    apply_extensions(built, (), ())  # an earlier adaptation's
    if missing := [name for name in names if name not in source.tensors]:
        raise SourceError(
            f"{source.where} has no value for {missing[0]!r}, so the source model cannot be run to compare with. "
            "Pass the source as a model (source=nn.Module) instead of its weights."
        )
    owners = named_modules(built)
    state = {canonical(key): tensor for key, tensor in built.state_dict(keep_vars=True).items()}
    tied = {id(tensor): source.tensors[name] for name, tensor in state.items() if name in source.tensors}
    for name, tensor in state.items():
        if id(tensor) not in tied:
            continue
        value = source.tensors.get(name, tied[id(tensor)]).detach().to(tensor.device, tensor.dtype)
        if value.shape == tensor.shape:
            tensor.detach().copy_(value)
            continue
        owner, _, last = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):  # a head for other labels: linear and convolution take any number
            owners[owner].register_parameter(last, nn.Parameter(value.clone(), requires_grad=False))
        else:
            owners[owner].register_buffer(last, value.clone())
    return built
