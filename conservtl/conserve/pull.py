"""The pull toward the source, on gradients or on weights, in as few passes over memory as it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pulled", "add_to_gradients", "move_weights", "place_like", "whole"]

_CHUNK = 1 << 19  # elements; a buffer of this size stays in cache while it is subtracted and added


@dataclass(frozen=True)
class Pulled:
    """One parameter, what it is pulled to and how hard.

    Args:
        parameter: the trained tensor.
        anchor: where it is pulled to, of its shape and on its device; None is zero.
        strength: alpha, or beta for a pull to zero.
        rate: learning rate of its group; used by the decoupled pull alone.
        importance: weighs each element, of the parameter's shape; None: all alike.
    """

    parameter: Tensor
    anchor: Tensor | None
    strength: float
    rate: float | Tensor = 0.0
    importance: Tensor | None = None


@torch.no_grad()
def add_to_gradients(pulled: Sequence[Pulled], scale: Tensor | None = None, sign: float = 1.0) -> None:
    """Add strength (w - anchor) to each gradient, as the penalty in the loss would have.

    A parameter without a gradient gets one. The difference is formed first and scaled while it is
    added: alpha w - alpha w0 in two additions would cancel (relative error 1.7e-5 against 2e-8).

    Args:
        pulled: what to pull.
        scale: the factor the gradients carry, where a fused optimizer will divide it out; scalar tensor.
        sign: -1 for an optimizer that maximises.
    """
    for group in _alike(pulled):
        strength = sign * group[0].strength
        for item in group:
            if item.parameter.grad is None:
                item.parameter.grad = torch.zeros_like(item.parameter)
            elif item.parameter.grad.is_sparse:
                item.parameter.grad = item.parameter.grad.to_dense()
        for chunk in _chunks(group):
            gradients = [_local(item.parameter.grad) for item in chunk]
            weights = [_local(item.parameter) for item in chunk]
            if chunk[0].anchor is None:
                differences = list(weights)
            elif len(chunk) == 1 and weights[0].numel() > _CHUNK and chunk[0].importance is None:
                _add_large(gradients[0], weights[0], _local(chunk[0].anchor), strength, scale)
                continue
            else:
                differences = list(torch._foreach_sub(weights, _anchors(chunk)))  # noqa: SLF001
            if chunk[0].importance is not None:
                torch._foreach_mul_(differences, [_local(item.importance) for item in chunk])
            if scale is not None:
                differences = [difference * scale.to(difference.device) for difference in differences]
            torch._foreach_add_(gradients, differences, alpha=strength)


@torch.no_grad()
def move_weights(pulled: Sequence[Pulled], skip: Tensor | None = None) -> None:
    """Move each weight by rate * strength * (anchor - w), before the gradient step.

    Args:
        pulled: what to pull.
        skip: scalar tensor, non-zero where the step will be skipped (a scaler's ``found_inf``); read
            on the device, so that nothing waits for it.
    """
    for group in _alike(pulled):
        weights = [_local(item.parameter) for item in group]
        amount: Any = group[0].rate * group[0].strength
        if skip is not None:
            amount = amount * (1 - skip.to(weights[0].device).clamp(max=1))
        if isinstance(amount, Tensor):
            amount = amount.reshape(())
        if group[0].anchor is None:
            torch._foreach_mul_(weights, 1 - amount)
        elif group[0].importance is not None:
            for weight, anchor, item in zip(weights, _anchors(group), group, strict=True):
                share = (_local(item.importance) * amount).clamp_(max=1)  # no element goes beyond the source
                weight.addcmul_(anchor - weight, share)
        elif isinstance(amount, Tensor):
            for weight, anchor in zip(weights, _anchors(group), strict=True):
                weight.lerp_(anchor, amount.to(weight.dtype))
        else:
            torch._foreach_lerp_(weights, _anchors(group), amount)


def _alike(pulled: Sequence[Pulled]) -> Iterator[list[Pulled]]:
    """Groups that one fused call can take: same strength, rate, device, type, kind of anchor and of weighing."""
    groups: dict[Any, list[Pulled]] = {}
    for item in pulled:
        rate = item.rate if isinstance(item.rate, float) else id(item.rate)
        kind = (item.anchor is None, item.importance is None)
        key = (item.strength, rate, *kind, item.parameter.device, item.parameter.dtype)
        groups.setdefault(key, []).append(item)
    return iter(groups.values())


def _anchors(group: Sequence[Pulled]) -> list[Tensor]:
    """Anchors as their parameters are: one held in half precision is widened for the moment."""
    return [_local(item.anchor).to(item.parameter.dtype) for item in group]


def _chunks(group: Sequence[Pulled]) -> Iterator[list[Pulled]]:
    """Runs of small tensors that fit into one chunk together; a large tensor stands alone."""
    run: list[Pulled] = []
    size = 0
    for item in group:
        count = item.parameter.numel()
        if run and size + count > _CHUNK:
            yield run
            run, size = [], 0
        run.append(item)
        size += count
    if run:
        yield run


def _add_large(gradient: Tensor, weight: Tensor, anchor: Tensor, strength: float, scale: Tensor | None) -> None:
    """The same for one large tensor, slice by slice through one reused buffer."""
    factor = None if scale is None else scale.to(weight.device)
    if not (gradient.is_contiguous() and weight.is_contiguous() and anchor.is_contiguous()):
        difference = weight - anchor
        gradient.add_(difference if factor is None else difference * factor, alpha=strength)
        return
    buffer = torch.empty(_CHUNK, dtype=weight.dtype, device=weight.device)
    parts = zip(*(torch.split(t.view(-1), _CHUNK) for t in (gradient, weight, anchor)), strict=True)
    for g, w, a in parts:
        difference = torch.sub(w, a, out=buffer[: w.numel()])
        g.add_(difference if factor is None else difference.mul_(factor), alpha=strength)


def place_like(tensor: Tensor, parameter: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on the parameter's device, sharded as it is; every process holds the whole, so none sends."""
    tensor = tensor.to(parameter.device, dtype or parameter.dtype)
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(tensor: Any) -> Tensor:
    """The tensor itself, gathered from all processes where it is sharded, which all of them then must call."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def _local(tensor: Any) -> Any:
    """This process's shard of a sharded tensor; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
