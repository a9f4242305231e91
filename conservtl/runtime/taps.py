"""Taps: record the outputs of layers and the inputs of modules in a forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from conservtl.errors import SelectorError, SpecError, counted
from conservtl.layers import unwrap
from conservtl.layers.names import named_modules
from conservtl.plan.term import numbered
from conservtl.runtime.layer_features import Channels
from conservtl.runtime.model_hooks import remove_hooks
from conservtl.runtime.tap_hooks import End, Passes, Start, Tap

__all__ = ["ChangedOutputError", "Taken", "Taps"]


class ChangedOutputError(SpecError):
    """An output was written into where none had been before, so it was not copied."""


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
        modules = named_modules(model)
        if unknown := [name for name in enters if name not in modules]:
            raise SelectorError(f"the model has no module {unknown[0]!r} whose input could be taken.")
        self._passes = Passes()
        self._taps = {layer: Tap(layer, self._passes) for layer in layers}
        self._inputs = {name: Tap(name, self._passes) for name in enters}
        self._channels = {layer: Channels(modules[name]) for layer, name in layers.items()}
        for name in (*layers.values(), *enters):
            if isinstance(modules[name], torch.jit.ScriptModule):
                raise SpecError(
                    f"the features or inputs of {name!r} are compared, and a scripted module takes no hooks. Compare "
                    "other layers, or script the model after training."
                )
        self._tapped = {name: modules[name] for name in (*layers.values(), *enters)}
        start = Start(model, self._passes, (*self._taps.values(), *self._inputs.values()))
        self._handles = [
            model.register_forward_pre_hook(start, prepend=True),
            model.register_forward_hook(End(self._passes), always_call=True),
        ]
        self._handles += [modules[layers[layer]].register_forward_hook(tap.output) for layer, tap in self._taps.items()]
        self._handles += [
            modules[name].register_forward_pre_hook(tap.input, with_kwargs=True) for name, tap in self._inputs.items()
        ]

        weakref.finalize(self, remove_hooks, self._handles)

    def take(self, passes: int = 1, loss: Iterable[Tensor] = (), outputs: Iterable[Tensor] = ()) -> Taken:
        """Return the records of the last forward passes, once. A layer that ran in none of them has no entry.

        Args:
            passes: forward passes of the whole model for one loss.
            loss: the task's loss: of the same passes, or of others alone if the outputs are of other inputs.
            outputs: those that the records are for.

        Raises:
            SpecError: there was no forward pass since the last call, outputs or loss were computed from an earlier one
                too, or a layer ran in a reentrant checkpoint.
            ChangedOutputError: an output was written into that never was before.
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
        count, ended = self._passes.count, self._passes.before
        first = count - passes + 1 if count else 0
        # A pass that the loss is not computed from (a look at the outputs, a batch left out) is none of its own.
        behind: set[int] = set()
        if first > 1:
            for tap in taps:
                tap.note_passes()
            behind, of_loss = self._passes.behind(outputs), self._passes.behind(loss)
            if not behind or behind & of_loss:  # else the loss is of other inputs
                behind |= of_loss
        self._passes.before, self._passes.count, self._passes.keep = ended + count, 0, passes
        taken = [tap.taken(first) for tap in taps]
        if earlier := [number for number in behind if 0 < number - ended < first]:
            raise SpecError(
                f"the loss or its outputs come from {counted(len(earlier) + passes, 'forward pass')} of the model, and "
                f"the features of {'the last' if passes == 1 else f'the last {passes}'} alone would be compared. Call "
                "adaptation.loss after each pass, with its outputs and inputs; or make one pass on all inputs together "
                "(torch.cat); or pass source=adaptation.source_view(batch, forward), where forward(model, batch) makes "
                "the same passes."
            )
        if lost := [tap.layer for tap, (_, is_lost) in zip(taps, taken, strict=True) if is_lost]:
            raise ChangedOutputError(
                f"the output of {lost[0]!r} was written into after the layer had run, which no pass before did. It "
                "will be copied from now on: call the model again, then adaptation.loss(...)."
            )
        features = {layer: tensors for layer, (tensors, _) in zip(self._taps, taken, strict=False)}
        entering = {name: tensors for name, (tensors, _) in zip(self._inputs, taken[len(features) :], strict=True)}
        return Taken(
            numbered(features),
            numbered(entering),
            numbered({layer: [self._channels[layer].axis(one) for one in ran] for layer, ran in features.items()}),
        )

    def replaced(self, model: nn.Module) -> list[str]:
        """Return the tapped modules whose place in a model, wrapped or not, another module has taken."""
        modules = named_modules(model)
        return [name for name, module in self._tapped.items() if modules.get(name) is not module]

    def remove(self) -> None:
        """Remove the hooks."""
        remove_hooks(self._handles)
