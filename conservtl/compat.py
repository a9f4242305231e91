# ruff: noqa: SLF001 - this module is the one place that reads private attributes
"""Private names of torch and Accelerate, each with the reason no public name will do.

``tests/test_compat.py`` pins what each of them does, so that an upgrade that changes one fails there first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase  # one base of 1d, 2d, 3d and synchronised batch norm
from torch.nn.modules.batchnorm import _NormBase as NormBase  # one base of every norm that can track statistics
from torch.nn.modules.conv import _ConvNd as ConvBase  # one base of all convolutions
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNormBase  # one base of all instance norms
from torch.utils._pytree import tree_leaves, tree_map  # torch 2.11 has no public pytree yet

__all__ = [
    "ACCELERATE_ATTRIBUTES",
    "BatchNormBase",
    "ConvBase",
    "InstanceNormBase",
    "NormBase",
    "accelerate_states",
    "foreach_abs_",
    "foreach_add_",
    "foreach_addcmul_",
    "foreach_clamp_max_",
    "foreach_clamp_min_",
    "foreach_copy_",
    "foreach_div",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_mul_",
    "foreach_norm",
    "foreach_reciprocal_",
    "foreach_sub",
    "forward_hook_table",
    "forward_hooks",
    "forward_pre_hooks",
    "prepared_objects",
    "register_first",
    "remove_forward_hooks",
    "remove_forward_pre_hooks",
    "reset_method",
    "scaler_state",
    "tree_leaves",
    "tree_map",
]

# One kernel launch for many tensors: torch has no public multi-tensor arithmetic. Bound here without a wrapper, since
# they run in every step.
foreach_abs_ = torch._foreach_abs_
foreach_add_ = torch._foreach_add_
foreach_addcmul_ = torch._foreach_addcmul_
foreach_clamp_max_ = torch._foreach_clamp_max_
foreach_clamp_min_ = torch._foreach_clamp_min_
foreach_copy_ = torch._foreach_copy_
foreach_div = torch._foreach_div
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_reciprocal_ = torch._foreach_reciprocal_
foreach_sub = torch._foreach_sub


def forward_hooks(module: nn.Module) -> Collection[Callable[..., Any]]:
    """Return a module's forward hooks: torch registers hooks but does not list them."""
    return module._forward_hooks.values()


def forward_pre_hooks(module: nn.Module) -> Collection[Callable[..., Any]]:
    """Return a module's forward pre-hooks: torch registers hooks but does not list them."""
    return module._forward_pre_hooks.values()


def forward_hook_table(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return the dictionary that holds a module's forward hooks, for a copy that leaves hooks out."""
    return module._forward_hooks


def remove_forward_hooks(module: nn.Module, matches: Callable[[Any], bool]) -> None:
    """Remove the forward hooks that match: the handles of the original do not remove hooks of a copied model."""
    for key in [key for key, hook in module._forward_hooks.items() if matches(hook)]:
        for hooks in (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
            hooks.pop(key, None)


def remove_forward_pre_hooks(module: nn.Module, matches: Callable[[Any], bool]) -> None:
    """Remove the forward pre-hooks that match: the handles of the original do not remove hooks of a copied model."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if matches(hook)]:
        for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
            hooks.pop(key, None)


def register_first(model: nn.Module, name: str, module: nn.Module) -> None:
    """Register a child before all others: ``add_module`` appends only, and the order says what runs first."""
    children = dict(model._modules)
    model._modules.clear()
    model._modules.update({name: module, **children})


def reset_method(module: nn.Module) -> Callable[[], object] | None:
    """Return the method that initialises a module's parameters: attention and transformers have a private one only."""
    method = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return method if callable(method) else None


def scaler_state(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a gradient scaler's notes on the current step: whether gradients are unscaled has no public answer.

    The dictionary is a new object after each ``update()``; ``["stage"].name`` is READY, UNSCALED or STEPPED.
    """
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    return state


ACCELERATE_ATTRIBUTES = ("_original_forward", "_is_accelerate_prepared")
"""Attributes that ``Accelerator.prepare`` leaves on a model beside a replaced ``forward``."""


def accelerate_states(*, process: bool) -> list[dict[str, Any]]:
    """Return the dictionaries that all Accelerators of a process share: their public reset cannot be undone.

    Args:
        process: whether to include the state of the process group.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [kind._shared_state for kind in (AcceleratorState, GradientState, *([PartialState] if process else []))]


def prepared_objects(accelerator: Any) -> list[list[Any]]:
    """Return the lists of models and optimizers an Accelerator has prepared: it forgets all of them or none."""
    return [accelerator._models, accelerator._optimizers]
