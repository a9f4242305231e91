"""Modules whose outputs are hidden units, which an amplitude can scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from conservtl.compat import BatchNormBase
from conservtl.errors import SelectorError, SpecError
from conservtl.layers import Layer, layer_of, matches, unwrap
from conservtl.layers.attention import outside_attention
from conservtl.layers.extended import own_class
from conservtl.layers.first_use import first_use
from conservtl.layers.names import glob_hint
from conservtl.runtime.freezing import extendable
from conservtl.runtime.layer_features import output_size

__all__ = ["channel_dim", "find_hidden_units", "is_recurrent", "unit_count"]

_WEIGHTS: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}
_NORMS: dict[type[nn.Module], int] = {
    BatchNormBase: 1,
    nn.SyncBatchNorm: 1,
    nn.GroupNorm: 1,
    nn.LayerNorm: -1,
    nn.RMSNorm: -1,
}
_RECURRENT: dict[type[nn.Module], int] = {nn.RNN: -1, nn.LSTM: -1, nn.GRU: -1}


def find_hidden_units(
    model: nn.Module, layers: Sequence[Layer], on: Sequence[str] | None = None, example: object = None
) -> list[str]:
    """Return the names of the modules whose outputs are hidden units.

    By default each linear map, convolution and recurrent layer of every layer but the last, and of those with another
    head but the head itself; if a norm follows it, that norm instead, whose output the activation takes. Those that
    were handed in frozen are left out; if all were, another strategy may name some, or the plan trains nothing.

    ``example`` shows the order of modules; None: their order of registration.
    """
    scalable = {name: module for name, module in outside_attention(unwrap(model)) if unit_count(module) is not None}
    if example is not None:
        scalable = _by_use(scalable, first_use(unwrap(model), example))
    units = _units(scalable, layers)
    if on is None:
        modules = {one for layer in layers for info in layer.parameters for one in (info.head, info.candidate) if one}
        heads = {layer.name for one in modules if (layer := layer_of(layers, one)) is not None}
        last = layers[-1].name
        parallel = last in heads and len(heads) > 1
        hidden = [n for n, layer in units.items() if n not in modules and (parallel or layer != last)]
        if not hidden:
            raise SpecError(
                f"LHUC: {type(model).__name__} has no hidden linear map, convolution or recurrent layer whose units "
                "could be scaled, nothing but its head. Adapt it by another strategy."
            )
        return extendable(model, hidden, layers)
    chosen: dict[str, None] = {}
    for glob in on:
        inside = [name for name, layer in units.items() if matches(glob, layer)]
        inside = inside or [name for name in scalable if matches(glob, name)]
        if not inside:
            raise SelectorError(
                f"LHUC: {glob!r} must match a layer, or a linear, convolutional, recurrent or normalising module "
                f"whose output can be scaled; it matches none."
                f"{glob_hint(glob, [*dict.fromkeys(units.values()), *scalable])}"
            )
        chosen |= dict.fromkeys(inside)
    return list(chosen)


def unit_count(module: nn.Module) -> int | None:
    """Return the number of channels of a module's output; None if an amplitude cannot scale it."""
    if _dim(module, _WEIGHTS | _NORMS | _RECURRENT) is None:
        return None
    if len(getattr(module, "normalized_shape", (1,))) != 1:
        return None
    return output_size(module)


def channel_dim(module: nn.Module) -> int:
    """Return the dimension of the output that holds the channels."""
    return _dim(module, _WEIGHTS | _NORMS) or 0


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is a recurrent layer of torch's."""
    return _dim(module, _RECURRENT) is not None


def _dim(module: nn.Module, kinds: dict[type[nn.Module], int]) -> int | None:
    """Return the dimension of the channels; None for other kinds, and for classes with a forward of their own."""
    forward = getattr(own_class(module), "forward", None)  # a scripted module's class has none
    return next((dim for kind, dim in kinds.items() if forward is kind.forward), None)


def _by_use(modules: Mapping[str, nn.Module], used: Mapping[str, int]) -> dict[str, nn.Module]:
    """Sort modules by their first use; those that are not used come last."""
    places: dict[str, int] = {}
    for tensor, place in used.items():
        places.setdefault(tensor.rpartition(".")[0], place)
    return dict(sorted(modules.items(), key=lambda item: places.get(item[0], len(used))))


def _units(scalable: Mapping[str, nn.Module], layers: Sequence[Layer]) -> dict[str, str]:
    """Return the layer of each module whose output holds units: a weight, or the norm that follows it."""
    units: dict[str, str] = {}
    before: tuple[str, str, int | None] | None = None  # the last weight, its layer and size
    for name, module in scalable.items():
        layer = layer_of(layers, name)
        if layer is None:
            continue
        if _dim(module, _NORMS) is None:
            before = (name, layer.name, unit_count(module))
            units[name] = layer.name
        elif before is not None and before[1:] == (layer.name, unit_count(module)):
            del units[before[0]]
            units[name] = layer.name
            before = None
    return units
