"""Taps: record the outputs of layers and the inputs of modules in a forward pass."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.compat import guard_hooks, hooks_are_guarded
from conservtl.errors import SelectorError, SpecError
from conservtl.layers import canonical, unwrap
from conservtl.plan.term import numbered
from conservtl.runtime.channels import Channels
from conservtl.runtime.layer_outputs import all_tensors_of, tensor_of
from conservtl.runtime.model_hooks import remove_hooks
from conservtl.runtime.recomputing import is_recomputing

__all__ = ["Taken", "Taps"]

_PASSES = 4
"""Forward passes to remember until the first loss shows how many make a batch."""


@dataclass
class _Passes:
    """Forward passes of the whole model since the last loss."""

    count: int = 0
    """Passes with gradients."""
    running: bool = False
    """Whether one is being made."""
    keep: int = _PASSES


class _Start:
    """Forward pre-hook of the whole model. A copy, in a copied model, does nothing."""

    def __init__(self, passes: _Passes, taps: Iterable[_Tap]) -> None:
        self.passes, self.taps, self.live = passes, list(taps), True

    def __call__(self, *_: Any) -> None:
        if self.live and torch.is_grad_enabled():
            if not torch.compiler.is_compiling() and not hooks_are_guarded():
                guard_hooks()  # the compiler was loaded after the taps were registered
            self.passes.count += 1
            self.passes.running = True
            first = max(1, self.passes.count - self.passes.keep + 1)
            for tap in self.taps:
                tap.records = [record for record in tap.records if record[0] >= first]

    def __getstate__(self) -> dict[str, Any]:
        return {"passes": _Passes(), "taps": [], "live": False}


class _End:
    """Forward hook of the whole model; runs after an error, too."""

    def __init__(self, passes: _Passes) -> None:
        self.passes = passes

    def __call__(self, *_: Any) -> None:
        self.passes.running = False

    def __getstate__(self) -> dict[str, Any]:
        return {"passes": _Passes()}


class _Tap:
    """Forward hook that records outputs, or pre-hook that records inputs, with the number of the forward pass.

    A copy, in a copied model, records nothing.
    """

    def __init__(self, layer: str, passes: _Passes) -> None:
        self.layer, self.passes = layer, passes
        self.live = True
        self.records: list[tuple[int, list[Tensor]]] = []
        self.checkpointed = False

    def output(self, module: nn.Module, _: Any, output: Any) -> None:
        """Record an output, as a forward hook."""
        if self._wanted():
            self._record(all_tensors_of(output, self.layer, module))

    def input(self, _: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Record an input, as a forward pre-hook."""
        if self._wanted():
            self._record([tensor_of(inputs or tuple(keywords.values()), self.layer)])

    def _wanted(self) -> bool:
        if not self.live:
            return False
        if torch.is_grad_enabled():  # what a checkpoint computes again is no further pass
            return torch.compiler.is_compiling() or not is_recomputing()
        if not self.passes.running or torch.compiler.is_compiling():
            return False
        # Without gradients inside a pass that has them: a part that the model does not train, or a checkpoint.
        self.checkpointed = self.checkpointed or _in_checkpoint()
        return not self.checkpointed

    def _record(self, tensors: list[Tensor]) -> None:
        if not self.passes.running:
            self.records = []  # called by itself, outside the whole model: the last call counts
        # A copy: the next module may write into it, as ReLU(inplace=True) does.
        self.records.append((self.passes.count, [tensor.clone() for tensor in tensors]))

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "passes": _Passes(), "live": False, "records": [], "checkpointed": False}


@dataclass(frozen=True)
class Taken:
    """Records of a forward pass.

    Args:
        features: layer -> its output; further outputs and calls are numbered as in ``View``.
        entering: module -> its input, likewise.
        axes: for each entry of ``features``, its channel axis.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    entering: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)


class Taps:
    """Records outputs of layers and inputs of modules in forward passes with gradients, as long as the taps exist.

    Args:
        model: hooks are registered on it and its modules.
        layers: layer -> name of the module whose output is the layer's.
        enters: names of the modules whose inputs to record.

    Raises:
        SelectorError: the model has no such module.
        SpecError: a module takes no hooks.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, str], enters: Collection[str] = ()) -> None:
        model = unwrap(model)
        modules = {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}
        if unknown := [name for name in enters if name not in modules]:
            raise SelectorError(f"the model has no module {unknown[0]!r} whose input could be taken.")
        self._passes = _Passes()
        self._taps = {layer: _Tap(layer, self._passes) for layer in layers}
        self._inputs = {name: _Tap(name, self._passes) for name in enters}
        self._channels = {layer: Channels(modules[name]) for layer, name in layers.items()}
        for name in (*layers.values(), *enters):
            if isinstance(modules[name], torch.jit.ScriptModule):
                raise SpecError(
                    f"the features or inputs of {name!r} are compared, and a scripted module takes no hooks. Compare "
                    "other layers, or script the model after training."
                )
        self._tapped = {name: modules[name] for name in (*layers.values(), *enters)}
        start = _Start(self._passes, (*self._taps.values(), *self._inputs.values()))
        self._handles = [
            model.register_forward_pre_hook(start, prepend=True),
            model.register_forward_hook(_End(self._passes), always_call=True),
        ]
        self._handles += [modules[layers[layer]].register_forward_hook(tap.output) for layer, tap in self._taps.items()]
        self._handles += [
            modules[name].register_forward_pre_hook(tap.input, with_kwargs=True) for name, tap in self._inputs.items()
        ]

        weakref.finalize(self, remove_hooks, self._handles)

    def take(self, passes: int = 1) -> Taken:
        """Return the records of the last forward passes, once. A layer that ran in none of them has no entry.

        Args:
            passes: forward passes of the whole model for one loss.

        Raises:
            SpecError: there was no forward pass since the last call, or a layer ran in a reentrant checkpoint.
        """
        taps = [*self._taps.values(), *self._inputs.values()]
        if checkpointed := [tap.layer for tap in taps if tap.checkpointed]:
            for tap in taps:
                tap.checkpointed = False
            raise SpecError(
                f"the output of {checkpointed[0]!r} has no gradient: the layer runs in a reentrant activation "
                "checkpoint, which computes it without gradients. Use use_reentrant=False (of Hugging Face models: "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}))."
            )
        if not self._passes.count and not any(tap.records for tap in taps):
            raise SpecError(
                f"the outputs of {[tap.layer for tap in taps]} are not known: the model made no forward pass with "
                "gradients since the last loss. Call model(inputs) first, then adaptation.loss(...), once for each."
            )
        first = self._passes.count - passes + 1 if self._passes.count else 0
        features = {layer: _since(first, tap.records) for layer, tap in self._taps.items()}
        entering = {name: _since(first, tap.records) for name, tap in self._inputs.items()}
        for tap in taps:
            tap.records = []
        self._passes.count, self._passes.keep = 0, passes
        return Taken(
            numbered(features),
            numbered(entering),
            numbered({layer: [self._channels[layer].axis(one) for one in ran] for layer, ran in features.items()}),
        )

    def replaced(self, model: nn.Module) -> list[str]:
        """Return the tapped modules whose place in a model, wrapped or not, another module has taken."""
        modules = {canonical(name): module for name, module in unwrap(model).named_modules(remove_duplicate=False)}
        return [name for name, module in self._tapped.items() if modules.get(name) is not module]

    def remove(self) -> None:
        """Remove the hooks."""
        remove_hooks(self._handles)


def _since(first: int, records: list[tuple[int, list[Tensor]]]) -> list[Tensor]:
    return [tensor for number, tensors in records if number >= first for tensor in tensors]


def _in_checkpoint() -> bool:
    """Whether a reentrant checkpoint is running: torch's, or a library's of the same name."""
    frame = inspect.currentframe()
    while frame is not None:
        if "CheckpointFunction" in frame.f_code.co_qualname:
            return True
        frame = frame.f_back
    return False
