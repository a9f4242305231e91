"""Chunks of a pull: small tensors that go through one buffer together, large ones slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conservtl.compat import foreach_copy_, foreach_sub
from conservtl.kernels.dtensor import local

__all__ = ["Chunk", "Pulled", "buffer_for", "chunk", "cut", "dense_gradient"]

_CHUNK = {"cpu": 1 << 18}
"""Device -> elements that share one buffer: the difference stays in the cache until it is added."""
_CHUNK_ELSEWHERE = 1 << 26  # as many as there is memory to spare for: launches cost more than the cache saves


@dataclass(frozen=True)
class Pulled:
    """One parameter with the target and the strength of its pull.

    Args:
        parameter: the trained tensor.
        anchor: the target, of the parameter's shape. One of another type or on the CPU is converted or sent at each
            step. None: zero.
        strength: alpha, or beta for a pull to zero.
        group: group of the optimizer, whose ``lr`` is the rate of a decoupled pull; None for a coupled one.
        importance: weight of each element, of the parameter's shape; None: 1.
        every: number of steps from one pull to the next, whose strength it has.
    """

    parameter: Tensor
    anchor: Tensor | None
    strength: float
    group: dict[str, Any] | None = None
    importance: Tensor | None = None
    every: int = 1


class Chunk:
    """Tensors of a pull that share the buffer, or a slice of a large one.

    Args:
        items: the parameters.
        elements: elements of the only item, in the order of memory; None: all elements of each item.
        buffer: memory for converted anchors and for differences; None: memory is allocated.
    """

    def __init__(self, items: Sequence[Pulled], elements: slice | None, buffer: Tensor | None) -> None:
        self._owners = [item.parameter for item in items]
        self._elements = elements
        self._order = _order(local(self._owners[0]))
        self._plain = elements is None and not any(hasattr(owner, "to_local") for owner in self._owners)
        self.weights = [self._view(item.parameter.detach()) for item in items]
        self.anchors = [self._view(item.anchor) for item in items if item.anchor is not None] or None
        self.importances = [self._view(item.importance) for item in items if item.importance is not None] or None
        self.ready = all(item.anchor is None or _alike(item.anchor, item.parameter) for item in items)
        sizes = [weight.numel() for weight in self.weights]
        self._buffers = None
        if buffer is not None:
            pieces = torch.split(buffer[: sum(sizes)], sizes)
            self._buffers = [_laid_out(piece, weight) for piece, weight in zip(pieces, self.weights, strict=True)]

    def gradients(self) -> list[Tensor]:
        """Return dense gradients, zero if there were none."""
        gradients = []
        for owner in self._owners:
            gradient = dense_gradient(owner)
            if self._elements is not None and not _flat(gradient, self._order):
                gradient = owner.grad = torch.empty_like(owner, dtype=gradient.dtype).copy_(gradient)
            gradients.append(gradient)
        return gradients if self._plain else [self._view(gradient) for gradient in gradients]

    def differences(self) -> list[Tensor]:
        """Return w - anchor."""
        if self.anchors is None:
            return self.weights
        if self._buffers is None:
            return list(foreach_sub(self.weights, self.placed()))
        for weight, anchor, buffer in zip(self.weights, self.placed(), self._buffers, strict=True):
            torch.sub(weight, anchor, out=buffer)
        return self._buffers

    def placed(self) -> list[Tensor]:
        """Return anchors on the parameters' device and in their type, converted if they are stored otherwise."""
        if self.anchors is None or self.ready:
            return self.anchors or []
        buffers = self._buffers or [torch.empty_like(weight) for weight in self.weights]
        foreach_copy_(buffers, self.anchors, non_blocking=True)
        return buffers

    def _view(self, tensor: Any) -> Tensor:
        """Return this process's part of a tensor, or the slice of it."""
        part: Tensor = local(tensor)
        return part if self._elements is None else part.permute(self._order).view(-1)[self._elements]


def cut(items: Sequence[Pulled], buffer: Tensor | None) -> Iterator[Chunk]:
    """Yield runs of small tensors that fit into a chunk together, and chunks of large tensors."""
    run: list[Pulled] = []
    size = 0
    for item in items:
        weight = local(item.parameter)
        count, most = weight.numel(), chunk(weight)
        if count > most:
            order = _order(weight)
            if all(t is None or _flat(local(t), order) for t in (weight, item.anchor, item.importance)):
                yield from (Chunk([item], slice(at, at + most), buffer) for at in range(0, count, most))
            else:
                yield Chunk([item], None, None)
            continue
        if run and size + count > most:
            yield Chunk(run, None, buffer)
            run, size = [], 0
        run.append(item)
        size += count
    if run:
        yield Chunk(run, None, buffer)


def buffer_for(item: Pulled, buffers: dict[Any, Tensor]) -> Tensor | None:
    """Return the buffer of a parameter's type, made if there is none; None where memory is allocated instead."""
    weight = item.parameter
    if weight.device.type not in _CHUNK or item.anchor is None:
        return None
    if weight.dtype not in buffers:
        buffers[weight.dtype] = torch.empty(chunk(weight), dtype=weight.dtype)
    return buffers[weight.dtype]


def dense_gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, made dense if it is sparse and zero if there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
    elif parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def chunk(tensor: Tensor) -> int:
    """Return the number of elements that share a buffer on the tensor's device."""
    return _CHUNK.get(tensor.device.type, _CHUNK_ELSEWHERE)


def _order(tensor: Tensor) -> list[int]:
    """Return the dimensions from the largest stride to the smallest."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _flat(tensor: Any, order: Sequence[int]) -> bool:
    """Whether a tensor is dense in memory, with its dimensions in this order."""
    return bool(local(tensor).permute(order).is_contiguous())


def _laid_out(buffer: Tensor, like: Tensor) -> Tensor:
    """Return a buffer in a tensor's shape and with its order of dimensions in memory, so that loops over both fuse."""
    order = _order(like)
    back = sorted(range(like.ndim), key=order.__getitem__)
    return buffer.view([like.shape[dim] for dim in order]).permute(back)


def _alike(tensor: Any, other: Any) -> bool:
    """Whether two tensors have the same type and device."""
    return bool(tensor.dtype == other.dtype and tensor.device == other.device)
