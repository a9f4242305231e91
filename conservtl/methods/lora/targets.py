"""Modules whose weight a product of low rank can change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from conservtl.errors import SelectorError, SpecError
from conservtl.layers import Layer, canonical, layer_of, matches, unwrap
from conservtl.layers.attention import outside_attention
from conservtl.layers.extended import own_class
from conservtl.layers.names import glob_hint, holder_counts, named_modules, own_parameters, owner
from conservtl.plan.plan import Plan
from conservtl.runtime.freezing import found_frozen, handed_in_frozen

__all__ = ["find_targets"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_targets(model: nn.Module, layers: Sequence[Layer], on: Sequence[str] | None, rank: int) -> list[str]:
    """Return the names of the modules whose weight is changed.

    By default each linear map and convolution outside the head that has no fewer inputs and outputs than the rank and
    was not handed in frozen. If all were, these: another strategy may name some, or the plan trains nothing.

    Raises:
        SpecError: the model has none, or a module that a glob names cannot be changed so.
        SelectorError: a glob matches nothing.
    """
    bare = unwrap(model)
    faults = _faults(bare)
    if on is None:
        head = {owner(name) for name in Plan.draw(layers, {}, {}).possible_head}
        modules = named_modules(bare)
        found = [
            name
            for name, fault in faults.items()
            if fault is None and name not in head and _has_rank(modules[name], rank)
        ]
        if not found:
            raise SpecError(
                f"LoRA: {type(bare).__name__} must have, outside its head, a linear map or convolution with no fewer "
                f"inputs and outputs than rank, {rank}; it has none. Lower rank, name modules in on, or adapt it by "
                "another strategy."
            )
        frozen = found_frozen(bare)
        return [name for name in found if not handed_in_frozen(name, layers, frozen)] or found
    named: dict[str, None] = {}
    for glob in on:
        named |= dict.fromkeys(_matched(glob, faults, layers))
    return list(named)


def _matched(glob: str, faults: Mapping[str, str | None], layers: Sequence[Layer]) -> list[str]:
    """Return the modules that a glob names: themselves, or those of layers and modules around them."""
    places = {name: layer_of(layers, name) for name in faults}
    inside = [name for name, layer in places.items() if layer is not None and matches(glob, layer.name)]
    inside = inside or [name for name in faults if matches(glob, name)]
    if not inside:
        names = [layer.name for layer in layers]
        raise SelectorError(
            f"LoRA: {glob!r} must match a layer or a module with a weight; it matches none."
            f"{glob_hint(glob, [*names, *faults])}"
        )
    if found := [name for name in inside if faults[name] is None]:
        return found
    raise SpecError(
        f"LoRA: {glob!r} must match a linear map or convolution that can be changed by B A; {inside[0]!r} "
        f"{faults[inside[0]]}. Name others in on."
    )


def _faults(model: nn.Module) -> dict[str, str | None]:
    """Return name of each module with a weight -> why B A cannot change it; None: it can."""
    called = {id(module) for _, module in outside_attention(model)}
    holders = holder_counts(model)
    return {
        canonical(name): _fault(module, holders)
        if id(module) in called
        else "is inside torch's MultiheadAttention, which reads its weights without calling it"
        for name, module in model.named_modules()
        if "weight" in own_parameters(module) or hasattr(module, "parametrizations")
    }


def _fault(module: Any, holders: Mapping[int, int]) -> str | None:
    if not any(getattr(own_class(module), "forward", None) is kind.forward for kind in _KINDS):
        return f"is a {own_class(module).__name__}"
    weight = own_parameters(module).get("weight")
    if weight is None:
        return "has a parametrised weight"
    if getattr(module, "groups", 1) > 1:
        return "is a convolution in groups"
    if holders[id(weight)] > 1:
        return "shares its weight with another module"
    if not weight.is_floating_point():
        return f"has a weight of {str(weight.dtype).removeprefix('torch.')}"
    return None


def _has_rank(module: Any, rank: int) -> bool:
    """Return whether a weight has at least as many rows and columns as a product of this rank can use."""
    return rank <= min(int(module.weight.shape[0]), int(module.weight[0].numel()))
