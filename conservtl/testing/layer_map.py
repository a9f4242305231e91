"""The laws of a layer map: how a model's parameters are divided into ordered layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from conservtl.adaptation.prepare import adapt
from conservtl.layers import Layer, canonical, find_layers, layer_of, matches, named_parameters, select, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.layers.first_use import first_use
from conservtl.layers.names import owner
from conservtl.plan.plan import Plan
from conservtl.source.itself import itself

__all__ = ["check_layer_map", "violations"]


def check_layer_map(
    model: nn.Module, example: Any, *, layers: Sequence[str] | None = None, head: Sequence[str] | None = None
) -> tuple[Layer, ...]:
    """Hold the division of a model into layers to its laws; the model stays unchanged.

    - Each parameter is in exactly one layer; a tied or shared one is there once, and its other names are its aliases.
      A module that a layer lists holds no parameter of another, unless it is divided (recurrent layers, by level).
    - Layers are in the order of their first use in a forward pass of the example.
    - A layer's name selects that layer and nothing outside the module of that name; a glob of ``layers`` selects the
      parameters that it matches.
    - The head is found or named, and the forward pass uses it.
    - The plan has a row for each parameter, in its layer. Parameters that ask for no gradient are frozen as found, and
      no others are frozen.

    Args:
        model: the model, wrapped or not.
        example: an input: a tensor, a tuple of arguments, a dictionary of keyword arguments, or a batch of (inputs,
            labels).
        layers: as for ``adapt``: one glob for each layer, input side first. None: they are found.
        head: as for ``adapt``: globs of the head. None: it is found.

    Returns:
        The layers, input side first.

    Raises:
        AssertionError: the map breaks a law; the message names the layer or module and the law.
        InputError: a glob matches nothing or too much, or the model cannot be called with the example.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
        >>> [layer.modules for layer in check_layer_map(model, torch.zeros(1, 3))]
        [('0', '1'), ('3',)]
        >>> check_layer_map(model, torch.zeros(1, 3), layers=["3", "[01]"])
        Traceback (most recent call last):
        AssertionError: layer '[01]': must come before '3', because '0.weight' is used before '3.weight'.
    """
    found = find_layers(model, example, layers, head)
    used = first_use(unwrap(model), example)
    plan = adapt(deep_copy(model), itself(missing=[]), example=example, layers=layers, head=head).plan
    for broken in violations(model, found, used, plan, layers or ()):
        raise AssertionError(broken)
    return found


def violations(
    model: nn.Module, layers: Sequence[Layer], used: Mapping[str, int], plan: Plan, globs: Sequence[str] = ()
) -> Iterator[str]:
    """Yield a sentence for each law that a map breaks."""
    yield from _membership(model, layers)
    yield from _modules(layers)
    yield from _order(layers, used)
    yield from _selection(layers, plan, globs)
    yield from _head(layers, used)
    yield from _rows(model, layers, plan)


def _membership(model: nn.Module, layers: Sequence[Layer]) -> Iterator[str]:
    """Each parameter is in one layer, under its first name, with all others as aliases."""
    counts = Counter(info.name for layer in layers for info in layer.parameters)
    names: dict[int, list[str]] = {}
    for name, parameter in unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical(name))
    own = named_parameters(model)
    for name, parameter in own.items():
        if counts[name] != 1:
            yield f"parameter {name!r}: must be in exactly one layer; it is in {counts[name]}."
        others = {*names[id(parameter)]} - {name}
        for info in (info for layer in layers for info in layer.parameters if info.name == name):
            if {*info.aliases} != others:
                yield f"parameter {name!r}: its other names are {sorted(others)}; the map has {sorted(info.aliases)}."
            if info.shape != tuple(parameter.shape):
                yield f"parameter {name!r}: its shape is {tuple(parameter.shape)}; the map has {info.shape}."
    for name in counts.keys() - own.keys():
        yield f"parameter {name!r}: the model has none of this name, or has it under another name first."


def _modules(layers: Sequence[Layer]) -> Iterator[str]:
    """A module holds parameters of its own layer alone, unless it is divided, as recurrent layers are by level."""
    for layer in layers:
        for module in layer.modules:
            others = [one for one in layers if one is not layer and module in one.modules]
            if others and not any(owner(info.name) == module for info in layer.parameters):
                yield f"module {module!r}: layer {others[0].name!r} lists it; {layer.name!r} must not list it too."
            for other in layers:
                inside = [info.name for info in other.parameters if matches(module, info.name)] if module else []
                if inside and other is not layer and module not in other.modules:
                    yield f"module {module!r} of layer {layer.name!r}: holds {inside[0]!r} of layer {other.name!r}."
        for info in layer.parameters:
            module = owner(info.name)
            holder = layer_of(layers, module)
            if (
                holder is not None
                and holder is not layer
                and not (module in layer.modules and module in holder.modules)
            ):
                yield f"module {module!r} of layer {holder.name!r}: its {info.name!r} is in layer {layer.name!r}."


def _order(layers: Sequence[Layer], used: Mapping[str, int]) -> Iterator[str]:
    """A layer is used first before the next is."""
    firsts = []
    for layer in layers:
        names = [info.name for info in layer.parameters if info.name in used]
        if names:
            firsts.append((layer.name, min(names, key=used.__getitem__)))
    for (before, name), (after, other) in pairwise(firsts):
        if used[other] < used[name]:
            yield f"layer {after!r}: must come before {before!r}, because {other!r} is used before {name!r}."


def _selection(layers: Sequence[Layer], plan: Plan, globs: Sequence[str]) -> Iterator[str]:
    """Names are unique and select their layer; a glob selects what it matches."""
    for name, count in Counter(layer.name for layer in layers).items():
        if count > 1:
            yield f"layer {name!r}: names must be unique; {count} layers have this one."
    infos = {info.name: info.aliases for layer in layers for info in layer.parameters}
    for layer in layers:
        wanted = {
            info.name for one in layers if matches(layer.name, one.name) or one is layer for info in one.parameters
        }
        selected = set(plan.select([layer.name])[layer.name]) if layer.name in plan.layers else set()
        if selected != wanted:
            strange = min(selected ^ wanted)
            yield f"layer {layer.name!r}: its name must select its parameters and no others; {strange!r} is an error."
    for glob in globs:
        matched = set(select([glob], list(infos), aliases=infos)[glob])
        held = {info.name for layer in layers if layer.name == glob for info in layer.parameters}
        if matched != held:
            yield f"layer {glob!r}: must hold what its glob matches; {min(matched ^ held)!r} is an error."


def _head(layers: Sequence[Layer], used: Mapping[str, int]) -> Iterator[str]:
    """There is a head, and the forward pass uses it."""
    infos = [info for layer in layers for info in layer.parameters]
    heads = {info.head for info in infos} - {None}
    candidates = sorted({info.candidate for info in infos if info.candidate is not None})
    if not heads:
        several = f"any of {candidates} may be it" if candidates else "none is marked"
        yield f"head: must be found or named; {several}. Pass head=[...]."
    for head in sorted(map(str, heads)):
        if not any(info.head == head and info.name in used for info in infos):
            yield f"head {head!r}: must be used in the forward pass, and is not."


def _rows(model: nn.Module, layers: Sequence[Layer], plan: Plan) -> Iterator[str]:
    """Rows stand in the layers' order; what asks for no gradient is frozen as found, and nothing else is."""
    rows = {row.name: row for row in plan.rows}
    parameters = named_parameters(model)
    for layer in layers:
        for info in layer.parameters:
            row, parameter = rows.get(info.name), parameters.get(info.name)
            if row is None or row.layer != layer.name:
                where = "no row" if row is None else f"a row in layer {row.layer!r}"
                yield f"parameter {info.name!r}: must have a row in layer {layer.name!r}; the plan has {where}."
            elif parameter is not None and row.as_found is parameter.requires_grad:
                asks = "asks for a gradient" if parameter.requires_grad else "asks for no gradient"
                yield f"parameter {info.name!r}: {asks}, and the plan has it {'frozen' if row.frozen else 'trained'}."
