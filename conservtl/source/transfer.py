"""Transfer of the source's values, as the plan's origins say; fresh parameters keep their values or get new ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from conservtl.compat import NormBase, reset_method
from conservtl.errors import counted
from conservtl.layers import Layer, canonical, layer_of, named_parameters, unwrap
from conservtl.layers.names import named_modules
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row
from conservtl.source.by_label import row_mask, rows_by_label
from conservtl.source.read import Source

__all__ = ["TransferReport", "transfer"]


@dataclass(frozen=True)
class TransferReport:
    """Report of a transfer: which tensors were copied, and which were not.

    Args:
        copied: names of the model's parameters and buffers that received a source value.
        fresh: name of each other parameter -> the reason.
        unused: names of source tensors that were not copied.
        notes: entries of the source that were unwrapped or ignored, and the prefix that was stripped.
        kept: names of the buffers of copied modules for which the source has no value of their shape.
    """

    copied: tuple[str, ...]
    fresh: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        out = [
            f"copied {counted(len(self.copied), 'tensor')}, fresh {len(self.fresh)}, unused {len(self.unused)}",
            *self.notes,
        ]
        out += [f"fresh  {name}: {reason}" for name, reason in self.fresh.items()]
        out += [f"unused {name}" for name in self.unused]
        return "\n".join(out)


@torch.no_grad()
def transfer(
    model: nn.Module, layers: tuple[Layer, ...], plan: Plan, values: Mapping[str, Tensor], source: Source
) -> TransferReport:
    """Copy the source's values into a model.

    A fresh parameter keeps the value it has in ``model``; if that is the source's value, it is initialised again.
    """
    parameters = named_parameters(model)
    kinds = {row.name: row.kind for row in plan.rows if row.fresh}
    _initialise(unwrap(model), {name: kinds[name] for name in _stale(plan, parameters, values)})
    copied = [row.name for row in plan.rows if row.origin == "source"]
    for name in copied:
        _copy(parameters[name], values[name], plan[name])
    buffers, kept = _copy_buffers(unwrap(model), layers, plan, source.tensors)
    copied += buffers
    taken = set(copied)
    spent = taken | {
        alias
        for layer in layers
        for info in layer.parameters
        for alias in info.aliases
        if info.name in taken and alias in source.tensors and _same(source.tensors[alias], values[info.name])
    }
    unused = tuple(name for name in source.tensors if name not in spent)
    reasons = {row.name: row.reason for row in plan.rows if row.reason is not None}
    return TransferReport(tuple(copied), reasons, unused, source.notes, tuple(kept))


def _copy(parameter: Tensor, value: Tensor, row: Row) -> None:
    """Copy a source tensor, or its rows by label."""
    if row.source_rows is not None:
        new = row_mask(row.shape, row.new_rows).to(parameter.device)
        value = torch.where(new, parameter, rows_by_label(value, row.source_rows).to(parameter))
    parameter.copy_(value)


def _stale(plan: Plan, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> list[str]:
    """Return the fresh parameters, and those with new rows, that hold the source's value.

    A constant, such as a bias of zeros, is no evidence if the weights of its module differ. Nothing would train the
    random values of a parameter that is frozen as found (a position table), so it keeps its own.
    """
    same = [
        row.name
        for row in plan.rows
        if row.fresh
        and not row.as_found
        and row.source_shape == row.shape
        and _same(parameters[row.name], values[row.name])
    ]
    other = {name.rpartition(".")[0] for name in plan.fresh if name not in same}
    return [name for name in same if name.rpartition(".")[0] not in other or not _constant(parameters[name])]


def _constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[:1]).all())


def _same(tensor: Tensor, source: Tensor) -> bool:
    return torch.equal(tensor, source.to(tensor.device, tensor.dtype))


def _copy_buffers(
    model: nn.Module, layers: tuple[Layer, ...], plan: Plan, tensors: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """Copy the buffers of copied modules; reset a fresh norm with the source's statistics.

    Returns:
        The names of the buffers that were copied, and of those that the source lacks; counts of batches left out.
    """
    origin = {row.name: row.origin for row in plan.rows if not row.added}
    modules = named_modules(model)
    copied, stale, kept = [], [], []
    for key, buffer in model.state_dict(keep_vars=True).items():
        name = canonical(key)
        if isinstance(buffer, nn.Parameter) or not isinstance(buffer, Tensor):
            continue
        lacking = name not in tensors or tensors[name].shape != buffer.shape
        owner = name.rpartition(".")[0]
        origins = [origin[n] for n in origin if n.rpartition(".")[0] == owner]
        if not origins:  # a module without parameters follows its layer
            layer = layer_of(layers, owner)
            origins = [origin[info.name] for info in layer.parameters if info.name in origin] if layer else []
        if lacking:
            kept += [name] if "fresh" not in origins and buffer.is_floating_point() else []
        elif "fresh" not in origins:
            buffer.copy_(tensors[name])
            copied.append(name)
        elif name.rpartition(".")[2] == "running_mean" and _same(buffer, tensors[name]):
            stale.append(modules.get(owner))
    for module in dict.fromkeys(stale):
        if isinstance(module, NormBase):
            type(module).reset_running_stats(module)  # of the class: an earlier adaptation may hold this norm
    return copied, kept


def _initialise(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Initialise these parameters again, each as its module does; all others keep their values."""
    modules = named_modules(model)
    parameters = named_parameters(model)
    owners = {owner: modules[owner] for owner in dict.fromkeys(name.rpartition(".")[0] for name in kinds)}
    chosen = {id(parameters[name]) for name in kinds}
    others: list[Tensor] = [p for module in owners.values() for p in module.parameters() if id(p) not in chosen]
    others += [b for module in owners.values() if isinstance(module, NormBase) for b in module.buffers()]
    saved = [(tensor, tensor.detach().clone()) for tensor in others]
    for owner, module in owners.items():
        reset = reset_method(module)
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            parent, _, tensor_name = owner.rpartition("parametrizations.")
            holder = modules[parent.rstrip(".")]
            new = torch.empty_like(getattr(holder, tensor_name))
            nn.init.kaiming_uniform_(new, a=math.sqrt(5))
            setattr(holder, tensor_name, new)
        elif reset is not None:
            reset()
        else:
            for name in (name for name in kinds if name.rpartition(".")[0] == owner):
                _initialise_by_kind(parameters[name], kinds[name], name)
    for tensor, value in saved:
        tensor.copy_(value)


def _initialise_by_kind(parameter: nn.Parameter, kind: str, name: str) -> None:
    """Initialise a parameter of a module without a reset method: tokens as in ViT, gains as in RMSNorm."""
    if parameter.ndim >= 2:
        nn.init.trunc_normal_(torch.view_as_real(parameter) if parameter.is_complex() else parameter, std=0.02)
    elif kind == "norm" and "bias" not in name:
        nn.init.ones_(parameter)
    else:
        nn.init.zeros_(parameter)
