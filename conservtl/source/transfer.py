"""Carrying out the plan's origins: source values copied, fresh layers as handed in or initialised anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from conservtl.compat import NormBase, reset_method
from conservtl.layers import Layer, canonical, layer_of, named_parameters, unwrap
from conservtl.plan.plan import Plan
from conservtl.source.read import Source

__all__ = ["TransferReport", "transfer"]


@dataclass(frozen=True)
class TransferReport:
    """What became of the source's tensors.

    Args:
        copied: names of the model's parameters and buffers that took a source value.
        fresh: parameter name -> why it did not.
        unused: source tensors that went nowhere.
        notes: what was unwrapped, stripped or left aside while reading.
    """

    copied: tuple[str, ...]
    fresh: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        out = [f"copied {len(self.copied)} tensors, fresh {len(self.fresh)}, unused {len(self.unused)}", *self.notes]
        out += [f"fresh  {name}: {reason}" for name, reason in self.fresh.items()]
        out += [f"unused {name}" for name in self.unused]
        return "\n".join(out)


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
    kinds = {row.name: row.kind for row in plan.rows if row.origin == "fresh"}
    _initialise(unwrap(model), {name: kinds[name] for name in _stale(plan, parameters, values)})
    copied = [row.name for row in plan.rows if row.origin == "source"]
    for name in copied:
        parameters[name].copy_(values[name])
    copied += _copy_buffers(unwrap(model), layers, plan, source.tensors)
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
    return TransferReport(tuple(copied), reasons, unused, source.notes)


def _stale(plan: Plan, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> list[str]:
    """Fresh parameters that hold the source's own value.

    A constant (a bias of zeros) says nothing where its module's weights differ.
    """
    same = [
        row.name
        for row in plan.rows
        if row.origin == "fresh" and row.source_shape == row.shape and _same(parameters[row.name], values[row.name])
    ]
    other = {name.rpartition(".")[0] for name in plan.fresh if name not in same}
    return [name for name in same if name.rpartition(".")[0] not in other or not _constant(parameters[name])]


def _constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[:1]).all())


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours, theirs.to(ours.device, ours.dtype))


def _copy_buffers(model: nn.Module, layers: tuple[Layer, ...], plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
    """Copy the buffers of what came from the source; a fresh norm does not keep the source's statistics."""
    origin = {row.name: row.origin for row in plan.rows if not row.added}
    modules = {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}
    copied, stale = [], []
    for key, buffer in model.state_dict(keep_vars=True).items():
        name = canonical(key)
        if isinstance(buffer, nn.Parameter) or name not in tensors or tensors[name].shape != buffer.shape:
            continue
        owner = name.rpartition(".")[0]
        beside = [origin[n] for n in origin if n.rpartition(".")[0] == owner]
        if not beside:
            holder = layer_of(layers, owner)
            beside = [origin[info.name] for info in holder.parameters if info.name in origin] if holder else []
        if "fresh" not in beside:
            buffer.copy_(tensors[name])
            copied.append(name)
        elif name.rpartition(".")[2] == "running_mean" and _same(buffer, tensors[name]):
            stale.append(modules.get(owner))
    for module in dict.fromkeys(stale):
        if isinstance(module, NormBase):
            module.reset_running_stats()
    return copied


def _initialise(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Initialise these parameters anew, each as its module does, and leave all others as they are.

    Args:
        model: changed in place.
        kinds: parameter name -> its kind.
    """
    modules = {canonical(name): module for name, module in model.named_modules()}
    parameters = named_parameters(model)
    owners = {owner: modules[owner] for owner in dict.fromkeys(name.rpartition(".")[0] for name in kinds)}
    anew = {id(parameters[name]) for name in kinds}
    touched: list[Tensor] = [p for module in owners.values() for p in module.parameters() if id(p) not in anew]
    touched += [b for module in owners.values() if isinstance(module, NormBase) for b in module.buffers()]
    keep = [(tensor, tensor.detach().clone()) for tensor in touched]
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
                _initialise_loose(parameters[name], kinds[name], name)
    for tensor, value in keep:
        tensor.copy_(value)


def _initialise_loose(parameter: nn.Parameter, kind: str, name: str) -> None:
    """A parameter whose module does not say how: as in ViT for tokens and positions, in RMSNorm for gains."""
    if parameter.ndim >= 2:
        nn.init.trunc_normal_(parameter, std=0.02)
    elif kind == "norm" and "bias" not in name:
        nn.init.ones_(parameter)
    else:
        nn.init.zeros_(parameter)
