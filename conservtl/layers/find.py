"""The layers of a model: its units in order, each extra joined to a neighbour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from conservtl.errors import SelectorError, SpecError
from conservtl.layers.first_use import Trace, trace
from conservtl.layers.head import mark_head
from conservtl.layers.info import Layer, ParameterInfo, layer_of
from conservtl.layers.names import canonical, check_globs, matches, named_parameters, select, unwrap
from conservtl.layers.units import Node, Unit, is_norm, tree, units

__all__ = ["Layer", "ParameterInfo", "find_layers", "layer_of"]


def find_layers(
    model: nn.Module, example: Any = None, layers: Sequence[str] | None = None, head: Sequence[str] | None = None
) -> tuple[Layer, ...]:
    """Return the layers of a model, input side first; every parameter is in exactly one.

    Without an example, layers are in the order of registration, which is wrong for a model that registers its head
    first. With an example, they are in the order of first use in a forward pass of a copy; the model stays unchanged.

    Args:
        model: The model, wrapped or not.
        example: An input: a tensor, a tuple of arguments, a dictionary of keyword arguments, or a batch of
            (inputs, labels).
        layers: One glob for each layer, input side first, to divide the model yourself.
        head: Globs of the parameters or modules that are the head. None: the model is asked (``get_output_embeddings``
            and ``classifier`` of Hugging Face models, ``get_classifier`` of timm's), else the last weight used.

    Raises:
        SpecError: The model has no parameters, or cannot be called with the example.
        SelectorError: A glob matches nothing, or a parameter is matched by no glob or by two.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> [(layer.name, layer.modules) for layer in find_layers(model)]
        [('0', ('0', '1')), ('3', ('3',))]
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a torch.nn.Module; received {type(model).__name__}.")
    check_globs("layers", layers)
    check_globs("head", head)
    model = unwrap(model)
    infos = _describe(model)
    root = tree(model, {id(parameter): name for name, parameter in named_parameters(model).items()})
    if root is None or not infos:
        raise SpecError(f"model: must have parameters; received a {type(model).__name__} without any")
    record = _traced(model, example, needed=layers is None)
    if layers is not None:
        found = _layers_by_glob(layers, infos, root)
    else:
        ordered = units(root)
        registration = {unit.name: index for index, unit in enumerate(ordered)}
        if record is not None:
            ordered = _by_use(ordered, record.order)
        found = tuple(_layer(group, infos, registration) for group in _groups(ordered))
    return mark_head(model, found, record, head)


def _traced(model: nn.Module, example: Any, *, needed: bool) -> Trace | None:
    """Return a record of a forward pass; None without an example, or if it fails and is not needed."""
    if example is None:
        return None
    try:
        return trace(model, example)
    except SpecError:
        if needed:
            raise
        return None


def _describe(model: nn.Module) -> dict[str, ParameterInfo]:
    norms = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical(name))
    infos = {}
    for name, parameter in named_parameters(model).items():
        if is_lazy(parameter):
            raise SpecError(f"model: the shapes of its parameters must be known; {name!r} is lazy. Call the model once")
        kind: Literal["weight", "bias", "norm"] = "weight" if parameter.ndim >= 2 else "bias"
        infos[name] = ParameterInfo(
            name,
            tuple(parameter.shape),
            "norm" if id(parameter) in norms else kind,
            tuple(alias for alias in dict.fromkeys(names[id(parameter)]) if alias != name),
        )
    return infos


def _by_use(registered: list[Unit], used: dict[str, int]) -> list[Unit]:
    """Return the units in order of first use.

    An unused unit follows the unit registered before it, or precedes the next used one if that is nearer in the module
    tree: a token for masked frames precedes the first convolution of its encoder.
    """
    own = [min((used[name] for name in unit.tensors if name in used), default=None) for unit in registered]
    uses: list[int] = []
    for index, unit in enumerate(registered):
        use = own[index]
        if use is None:
            before = uses[-1] if uses else -1
            later = zip(own[index:], registered[index:], strict=True)
            rank, other = next(((rank, other) for rank, other in later if rank is not None), (before, unit))
            shared = _common(unit, registered[index - 1]) if index else 0
            use = rank if other is not unit and _common(unit, other) > shared else before
        uses.append(use)
    return [registered[index] for index in sorted(range(len(registered)), key=uses.__getitem__)]


def _groups(ordered: list[Unit]) -> list[list[Unit]]:
    """Return the units of each layer: every extra joins the nearest weight or block."""
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
    """Return the index of the layer that an extra joins.

    A weight is preferred to a block, which is complete: positions join the patch projection before the first block,
    the final norm joins the head behind the last. Between two weights, and between two towers of blocks (an encoder and
    a decoder), the extra joins the one nearer in the module tree: the encoder's final norm belongs to the encoder. If
    both are equally near, weights win, and then the preceding one.
    """
    if after is None or before is None:
        neighbour = before if after is None else after
        return neighbour if neighbour is not None else 0
    nearer = _common(unit, ordered[after]) - _common(unit, ordered[before])
    inner = any(one.kind == "block" for one in ordered[: before + 1]) and any(
        one.kind == "block" for one in ordered[after:]
    )
    if inner and nearer:
        return after if nearer > 0 else before
    if ordered[before].kind != "weight":
        return after
    if ordered[after].kind != "weight":
        return before
    return after if nearer > 0 else before


def _common(unit: Unit, other: Unit) -> int:
    """Return how many containers two units share."""
    pairs = zip(unit.parent.split("."), other.parent.split("."), strict=False)
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), min(map(_depth, (unit, other))))


def _depth(unit: Unit) -> int:
    return len(unit.parent.split("."))


def _layer(group: list[Unit], infos: dict[str, ParameterInfo], registration: dict[str, int]) -> Layer:
    members = sorted(group, key=lambda unit: registration[unit.name])
    return Layer(
        group[0].name,
        tuple(infos[name] for unit in members for name in unit.tensors if name in infos),
        tuple(module for unit in members for module in unit.modules),
    )


def _layers_by_glob(layers: Sequence[str], infos: dict[str, ParameterInfo], root: Node) -> tuple[Layer, ...]:
    aliases = {name: info.aliases for name, info in infos.items()}
    chosen = select(layers, tuple(infos), aliases=aliases)
    for name in infos:
        hits = [pattern for pattern in layers if name in chosen[pattern]]
        if len(hits) > 1:
            raise SelectorError(
                f"layers: two globs must not match one parameter; {hits} match {name!r}. Narrow one of them"
            )
    unmatched = [name for name in infos if not any(name in names for names in chosen.values())]
    if unmatched:
        more = f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else ""
        raise SelectorError(
            f"layers: must match every parameter; none of {list(layers)} matches "
            f"{', '.join(unmatched[:5])}{more}. Add a glob for them"
        )
    owner = {name: pattern for pattern, names in chosen.items() for name in names}
    owner |= _statistics(root, owner, layers)
    return tuple(
        Layer(
            pattern,
            tuple(infos[name] for name in names),
            tuple(_outermost(root, {tensor for tensor, glob in owner.items() if glob == pattern})),
        )
        for pattern, names in chosen.items()
    )


def _statistics(root: Node, owner: dict[str, str], layers: Sequence[str]) -> dict[str, str]:
    """Return running statistics without parameters -> the glob that matches them, or the preceding tensor's."""
    globs: dict[str, str] = {}
    last = layers[0]
    for tensor in root.tensors:
        last = owner.get(tensor) or next((p for p in layers if matches(p, tensor)), last)
        if tensor not in owner:
            globs[tensor] = last
    return globs


def _outermost(node: Node, owned: set[str]) -> Iterator[str]:
    if owned.issuperset(node.tensors):
        yield node.name
    else:
        for child in node.children:
            yield from _outermost(child, owned)
