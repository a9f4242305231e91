"""Factors of low rank on a model: the weights that can have them; added, removed, and added to the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.compat import convolved, forward_hooks, remove_forward_hooks
from conservtl.errors import SelectorError, SpecError
from conservtl.kernels.low_rank import dense_change
from conservtl.layers import Layer, canonical, layer_of, matches, unwrap
from conservtl.layers.attention import outside_attention
from conservtl.layers.extended import own_class
from conservtl.layers.names import glob_hint, holder_counts, named_modules, own_parameters, owner
from conservtl.plan.plan import Plan
from conservtl.runtime.freezing import extendable

__all__ = ["FACTORS", "add_factors", "find_targets", "has_factors", "merge_factors", "remove_factors"]

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
        return extendable(bare, found, layers)
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


FACTORS = ("lora_A", "lora_B")
"""Names of the parameters on the module whose weight they change."""
_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def add_factors(model: nn.Module, names: Sequence[str], rank: int, scale: float, dropout: float) -> list[str]:
    """Add factors whose product is 0 to modules, and return the names of the new parameters.

    A is drawn as PEFT draws it, uniformly within 1 / sqrt(inputs).
    """
    modules = named_modules(model)
    for name in names:
        module: Any = modules[name]
        weight = module.weight
        a = weight.new_empty(rank, *weight.shape[1:])
        module.register_parameter(FACTORS[0], nn.Parameter(nn.init.kaiming_uniform_(a, a=5**0.5)))
        module.register_parameter(FACTORS[1], nn.Parameter(weight.new_zeros(len(weight), rank)))
        module.lora = {"scale": scale, "dropout": dropout}
        module.register_forward_hook(_add, prepend=True, with_kwargs=True)
    return [f"{name}.{factor}" if name else factor for name in names for factor in FACTORS]


def has_factors(model: nn.Module) -> bool:
    """Return whether a module has factors."""
    return bool(_changed_modules(model))


def remove_factors(model: nn.Module) -> None:
    """Remove all factors, whatever their values."""
    for module in _changed_modules(model):
        _remove(module)


@torch.no_grad()
def merge_factors(model: nn.Module) -> None:
    """Add s × B A to each weight, computed in double precision."""
    for module in _changed_modules(model):
        weight = module.weight
        change = dense_change(module.lora_A, module.lora_B, module.lora["scale"])
        weight.copy_(weight.to(change.dtype) + change)
        _remove(module)


def _add(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
    """Add s × B A x to a module's output: a forward hook, at module level so that copies and pickles keep it."""
    a, b, scale = module.lora_A, module.lora_B, module.lora["scale"]
    x = F.dropout(args[0] if args else kwargs["input"], module.lora["dropout"], module.training)
    if a.ndim == 2:
        change = F.linear(F.linear(x, a), b)
    else:
        change = _POINTWISE[a.ndim - 2](convolved(module, x, a), b.view(*b.shape, *[1] * (a.ndim - 2)))
    changed: Tensor = output + scale * change
    return changed


setattr(_add, "computes", True)  # noqa: B010 - the order of first use then shows whether the module is called


def _changed_modules(model: nn.Module) -> list[Any]:
    return [module for module in unwrap(model).modules() if _add in forward_hooks(module)]


def _remove(module: nn.Module) -> None:
    remove_forward_hooks(module, lambda hook: hook is _add)
    for name in (*FACTORS, "lora"):
        delattr(module, name)
