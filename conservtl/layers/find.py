"""The layers of a model: units in order, with the extras joined to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from conservtl.errors import SelectorError, SpecError
from conservtl.layers.first_use import first_use
from conservtl.layers.names import canonical, matches, named_parameters, select, unwrap
from conservtl.layers.units import Node, Unit, is_norm, tree, units

__all__ = ["Layer", "ParameterInfo", "find_layers", "layer_of"]


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter by its canonical name.

    The kind is `norm` if a normalisation owns it, otherwise `weight` from two axes on and `bias` below.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["weight", "bias", "norm"]
    aliases: tuple[str, ...] = ()
    """Other names of the same tensor, where it is tied."""


@dataclass(frozen=True)
class Layer:
    """What a practitioner calls a layer; its modules are the outermost ones that make it up."""

    name: str
    parameters: tuple[ParameterInfo, ...]
    modules: tuple[str, ...]


def find_layers(model: nn.Module, example: Any = None, layers: Sequence[str] | None = None) -> tuple[Layer, ...]:
    """The layers of a model, input side first; every parameter is in exactly one.

    Without an example the order is that of registration, which is wrong for a model that registers its
    head first. With one, it is the order of first use in a forward pass of a copy; the model is left as
    found.

    Args:
        model: The model, wrapped or not.
        example: An input: a tensor, a tuple of arguments, a dictionary of keyword arguments, or a batch of
            (inputs, labels).
        layers: Globs, input side first, one a layer: your own cut instead of the one found here. Then the
            example is not needed.

    Raises:
        SpecError: The model has no parameters, or cannot be called with the example.
        SelectorError: A glob matches nothing, or a parameter is matched by none or by two.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [(layer.name, layer.modules) for layer in find_layers(model)]
        [('0', ('0', '1')), ('3', ('3',))]
    """
    model = unwrap(model)
    infos = _describe(model)
    root = tree(model, {id(parameter): name for name, parameter in named_parameters(model).items()})
    if root is None or not infos:
        raise SpecError(f"model: must have parameters, got a {type(model).__name__} with none")
    if layers is not None:
        return _chosen(layers, infos, root)
    found = units(root)
    place = {unit.name: index for index, unit in enumerate(found)}
    if example is not None:
        found = _by_use(found, first_use(model, example))
    return tuple(_layer(group, infos, place) for group in _groups(found))


def layer_of(layers: Sequence[Layer], module: str) -> Layer | None:
    """The layer that a module stands in, by canonical name; None for one that stands above layers."""
    parts = {part: layer for layer in layers for part in layer.modules}
    while module not in parts and module:
        module = module.rpartition(".")[0]
    return parts.get(module)


def _describe(model: nn.Module) -> dict[str, ParameterInfo]:
    norms = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical(name))
    infos = {}
    for name, parameter in named_parameters(model).items():
        if is_lazy(parameter):
            raise SpecError(f"model: its shapes must be known, {name!r} is lazy: call the model once")
        kind: Literal["weight", "bias", "norm"] = "weight" if parameter.ndim >= 2 else "bias"
        infos[name] = ParameterInfo(
            name,
            tuple(parameter.shape),
            "norm" if id(parameter) in norms else kind,
            tuple(alias for alias in dict.fromkeys(names[id(parameter)]) if alias != name),
        )
    return infos


def _by_use(found: list[Unit], used: dict[str, int]) -> list[Unit]:
    """Ordered by first use; a unit never used stays behind the one registered before it."""
    places = []
    place = -1
    for unit in found:
        place = min((used[name] for name in unit.tensors if name in used), default=place)
        places.append(place)
    return [found[index] for index in sorted(range(len(found)), key=places.__getitem__)]


def _groups(ordered: list[Unit]) -> list[list[Unit]]:
    """The units that make up each layer: every extra joins a neighbour that is none."""
    mains = [index for index, unit in enumerate(ordered) if unit.kind != "extra"]
    if not mains:
        return [ordered]
    groups = {index: [ordered[index]] for index in mains}
    for index, unit in enumerate(ordered):
        if unit.kind == "extra":
            before = max((main for main in mains if main < index), default=None)
            after = min((main for main in mains if main > index), default=None)
            groups[_host(unit, ordered, before, after)].append(unit)
    merged: list[list[Unit]] = []
    for index in mains:
        main = ordered[index]
        # Embeddings side by side (tokens, positions) are summed: one layer, not a sequence of them.
        if merged and main.embedding and merged[-1][0].embedding and merged[-1][0].parent == main.parent:
            merged[-1] += groups[index]
        else:
            merged.append(groups[index])
    return merged


def _host(unit: Unit, ordered: list[Unit], before: int | None, after: int | None) -> int:
    """The index of the layer an extra joins.

    A weight is preferred to a block, which is complete: positions join the patch projection before the
    first block, the final norm joins the head behind the last. Between two weights the one nearer in the
    tree wins, and the one before if they are equally near.
    """
    if after is None or before is None:
        nearest = before if after is None else after
        return nearest if nearest is not None else 0
    if ordered[before].kind != "weight":
        return after
    if ordered[after].kind != "weight":
        return before
    return after if _common(unit, ordered[after]) > _common(unit, ordered[before]) else before


def _common(unit: Unit, other: Unit) -> int:
    """How many containers they share."""
    pairs = zip(unit.parent.split("."), other.parent.split("."), strict=False)
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), min(map(_depth, (unit, other))))


def _depth(unit: Unit) -> int:
    return len(unit.parent.split("."))


def _layer(group: list[Unit], infos: dict[str, ParameterInfo], place: dict[str, int]) -> Layer:
    members = sorted(group, key=lambda unit: place[unit.name])
    return Layer(
        group[0].name,
        tuple(infos[name] for unit in members for name in unit.tensors if name in infos),
        tuple(module for unit in members for module in unit.modules),
    )


def _chosen(layers: Sequence[str], infos: dict[str, ParameterInfo], root: Node) -> tuple[Layer, ...]:
    chosen = select(layers, tuple(infos))
    for name in infos:
        hits = [pattern for pattern in layers if matches(pattern, name)]
        if len(hits) > 1:
            raise SelectorError(f"layers: no two may match one parameter, {hits} match {name!r}: make one narrower")
    missed = [name for name in infos if not any(matches(pattern, name) for pattern in layers)]
    if missed:
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        raise SelectorError(
            f"layers: must match every parameter, none of {list(layers)} matches "
            f"{', '.join(missed[:5])}{more}: add a glob for them"
        )
    owner = {name: pattern for pattern, names in chosen.items() for name in names}
    owner |= _statistics(root, owner, layers)
    return tuple(
        Layer(
            pattern,
            tuple(infos[name] for name in names),
            tuple(_outermost(root, {tensor for tensor, by in owner.items() if by == pattern})),
        )
        for pattern, names in chosen.items()
    )


def _statistics(root: Node, owner: dict[str, str], layers: Sequence[str]) -> dict[str, str]:
    """Running statistics without parameters -> the glob that matches them, or that of what stands before."""
    found: dict[str, str] = {}
    last = layers[0]
    for tensor in root.tensors:
        last = owner.get(tensor) or next((p for p in layers if matches(p, tensor)), last)
        if tensor not in owner:
            found[tensor] = last
    return found


def _outermost(node: Node, owned: set[str]) -> Iterator[str]:
    if owned.issuperset(node.tensors):
        yield node.name
    else:
        for child in node.children:
            yield from _outermost(child, owned)
