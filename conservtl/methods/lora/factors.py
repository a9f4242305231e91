"""Factors of low rank on a model: added beside weights, removed, and added to the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from conservtl.compat import convolved, forward_hooks, remove_forward_hooks
from conservtl.kernels.low_rank import dense_change
from conservtl.layers import unwrap
from conservtl.layers.names import named_modules

__all__ = ["FACTORS", "add_factors", "has_factors", "merge_factors", "remove_factors"]

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
