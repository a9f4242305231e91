"""Copies of the model: trained with additions merged, or plain without this package; and at its starting values."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from conservtl.adaptation.bound_plan import BoundPlan
from conservtl.compat import hook_tables, load_hook_tables
from conservtl.errors import SpecError
from conservtl.kernels.dtensor import sharded
from conservtl.layers import canonical, named_parameters, unwrap
from conservtl.layers.copying import deep_copy
from conservtl.layers.extended import extended_modules
from conservtl.layers.plain import replace_module
from conservtl.runtime.extending import apply_extensions
from conservtl.runtime.freezing import thaw

__all__ = ["at_start", "export", "merged"]

_PACKAGE = __name__.partition(".")[0]


def merged(bound: BoundPlan) -> nn.Module:
    """Return a copy of the model in which each strategy has merged what it added, if that is exact."""
    bound.endings.exported()
    bound.restore_weights()
    model = deep_copy(unwrap(bound.model))
    for strategy in sorted(bound.origin.strategies, key=lambda strategy: not strategy.merges_first):
        strategy.merge(model)
    return model


@torch.no_grad()
def at_start(bound: BoundPlan) -> nn.Module:
    """Return a copy of the model with its starting values, in eval mode; see ``Adaptation.at_start``."""
    parameters = bound.parameters()
    if cut := next((name for name, parameter in parameters.items() if sharded(parameter)), None):
        raise SpecError(
            f"at_start copies whole weights; {cut!r} is sharded over processes. Evaluate before you shard the model, "
            "or export the trained weights and evaluate them in one process."
        )
    bound.restore_weights()
    model: nn.Module = deep_copy(unwrap(bound.model))
    apply_extensions(model, bound.origin.extensions, bound.layers)
    anchors = bound.anchors
    start = {**anchors.buffers, **anchors.added, **anchors.start(bound.model, bound.plan)}
    buffers = {canonical(name): buffer for name, buffer in model.named_buffers()}
    for name, tensor in {**named_parameters(model), **buffers}.items():
        if name in start and start[name].shape == tensor.shape:
            tensor.copy_(start[name])
    return model.eval()


@torch.no_grad()
def export(bound: BoundPlan) -> nn.Module:
    """Return a plain copy of the model in eval mode; see ``Adaptation.export``."""
    model: nn.Module = merged(bound)
    for strategy in bound.origin.inherited:
        strategy.merge(model)
    unload: Any = getattr(model, "merge_and_unload", None)  # an adapter's model
    if callable(unload):
        model = unload()
    for strategy in (*bound.origin.strategies, *bound.origin.inherited):
        model = strategy.plain(model)
    while extended := extended_modules(model):
        first = next(iter(extended.values()))
        model = replace_module(model, first, first.plain())
    thaw(model)
    for module in model.modules():
        _strip(module)
    return unwrap(model).eval()


def _strip(module: nn.Module) -> None:
    """Remove hooks and replaced methods of this package from a module."""
    tables = [*hook_tables(module), *load_hook_tables(module)]
    ours = {key for table in tables for key, hook in table.items() if _is_ours(hook)}
    for table in tables:
        for key in ours.intersection(table):
            if _is_ours(table[key]) or isinstance(table[key], bool):
                del table[key]
    for name in [name for name, value in vars(module).items() if _is_ours(value)]:
        del vars(module)[name]


def _is_ours(value: Any) -> bool:
    """Whether an object, or what it wraps, is of this package."""
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__self__", getattr(value, "hook", value))
    if isinstance(value, (nn.Module, type)):
        return False
    where = getattr(value, "__module__", None) or type(value).__module__
    return str(where).partition(".")[0] == _PACKAGE
