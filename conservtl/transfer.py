"""Carrying out the plan's origins: source values copied, fresh layers as handed in or initialised anew."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from conservtl.layers import Layer, canonical, named_parameters, unwrap
from conservtl.plan import Plan
from conservtl.source import Source, TransferReport

__all__ = ["transfer"]


@torch.no_grad()
def transfer(
    model: nn.Module, layers: tuple[Layer, ...], plan: Plan, values: Mapping[str, Tensor], source: Source
) -> TransferReport:
    """Give the model its starting point.

    Fresh means what the layer held when the model was handed in; where that is the source's own
    value, it is initialised anew.

    Args:
        model: changed in place.
        layers: its layers.
        plan: whose origins are carried out.
        values: parameter name -> source tensor.
        source: where buffers come from too.
    """
    parameters = named_parameters(model)
    stale = {
        row.name
        for row in plan.rows
        if row.origin == "fresh" and row.source_shape == row.shape and _same(parameters[row.name], values[row.name])
    }
    _initialise(unwrap(model), stale)
    copied = [row.name for row in plan.rows if row.origin == "source"]
    for name in copied:
        parameters[name].copy_(values[name])
    copied += _copy_buffers(unwrap(model), layers, plan, source.tensors)
    spent = set(copied) | {
        name
        for layer in layers
        for info in layer.parameters
        if plan[info.name].origin == "source"
        for name in (info.name, *info.aliases)
        if name in source.tensors and _same(source.tensors[name], values[info.name])
    }
    unused = tuple(name for name in source.tensors if name not in spent)
    reasons = {row.name: row.reason for row in plan.rows if row.reason is not None}
    return TransferReport(tuple(copied), reasons, unused, source.notes)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours, theirs.to(ours.device, ours.dtype))


def _copy_buffers(model: nn.Module, layers: tuple[Layer, ...], plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
    """Copy the buffers of what came from the source; a fresh norm does not keep the source's statistics."""
    origin = {row.name: row.origin for row in plan.rows}
    parts = {module: layer for layer in layers for module in layer.modules}
    modules = {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}
    copied, stale = [], []
    for key, buffer in model.state_dict(keep_vars=True).items():
        name = canonical(key)
        if isinstance(buffer, nn.Parameter) or name not in tensors or tensors[name].shape != buffer.shape:
            continue
        owner = name.rpartition(".")[0]
        beside = [origin[n] for n in origin if n.rpartition(".")[0] == owner]
        if not beside:
            holder = _holder(owner, parts)
            beside = [origin[info.name] for info in holder.parameters] if holder else []
        if "fresh" not in beside:
            buffer.copy_(tensors[name])
            copied.append(name)
        elif name.rpartition(".")[2] == "running_mean" and _same(buffer, tensors[name]):
            stale.append(modules.get(owner))
    for module in dict.fromkeys(stale):
        if isinstance(module, _NormBase):
            module.reset_running_stats()
    return copied


def _holder(module: str, parts: Mapping[str, Layer]) -> Layer | None:
    """The layer that a module stands in."""
    while module and module not in parts:
        module = module.rpartition(".")[0]
    return parts.get(module)


def _initialise(model: nn.Module, names: Collection[str]) -> None:
    """Initialise these parameters anew, each as its module does, and leave all others as they are."""
    if not names:
        return
    modules = {canonical(name): module for name, module in model.named_modules()}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    keep: list[tuple[Tensor, Tensor]] = [
        (parameter, parameter.detach().clone())
        for name, parameter in named_parameters(model).items()
        if name not in names and any(name.startswith(f"{owner}.") or not owner for owner in owners)
    ]
    norms = [module for owner in owners if isinstance(module := modules[owner], _NormBase)]
    keep += [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    for owner in owners:
        module = modules[owner]
        own = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == owner}
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            parent, _, tensor = owner.partition(".parametrizations.")
            new = torch.empty_like(getattr(modules[parent], tensor))
            nn.init.kaiming_uniform_(new, a=math.sqrt(5))
            setattr(modules[parent], tensor, new)
        elif reset is not None:
            reset()
        else:
            for short in own:
                _initialise_loose(getattr(module, short))
    for kept, value in keep:
        kept.copy_(value)


def _initialise_loose(parameter: nn.Parameter) -> None:
    """A parameter whose module does not say how: tokens and positions as in ViT, vectors zero."""
    if parameter.ndim >= 2:
        nn.init.trunc_normal_(parameter, std=0.02)
    else:
        nn.init.zeros_(parameter)
