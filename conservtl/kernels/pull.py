"""The pull toward the source, on gradients or on weights, in as few passes over memory as it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conservtl.compat import (
    foreach_add_,
    foreach_addcmul_,
    foreach_clamp_max_,
    foreach_copy_,
    foreach_lerp_,
    foreach_mul,
    foreach_mul_,
    foreach_sub,
)
from conservtl.kernels.dtensor import local

__all__ = ["Pull", "Pulled", "chunk", "dense_gradient", "gather"]

_CHUNK = {"cpu": 1 << 18}
"""Elements that go through one buffer together, by device: what is subtracted stays in the cache until it is added."""
_CHUNK_ELSEWHERE = 1 << 22  # a launch costs more than a call, and the cache is larger


@dataclass(frozen=True)
class Pulled:
    """One parameter, what it is pulled to and how hard.

    Args:
        parameter: the trained tensor.
        anchor: where it is pulled to, of its shape; it may be of another type or on the CPU, and is then
            widened or sent at each step. None is zero.
        strength: alpha, or beta for a pull to zero.
        group: of the optimizer, its ``lr`` is the decoupled pull's rate; None for the coupled one.
        importance: weighs each element, of the parameter's shape; None: all alike.
    """

    parameter: Tensor
    anchor: Tensor | None
    strength: float
    group: dict[str, Any] | None = None
    importance: Tensor | None = None


def gather(pulled: Iterable[Pulled]) -> list[Pull]:
    """Put together what can be pulled together, ready for as many steps as its tensors stay where they are."""
    alike: dict[Any, list[Pulled]] = {}
    for item in pulled:
        kind = (item.anchor is None, item.importance is None, item.parameter.device, item.parameter.dtype)
        alike.setdefault((item.strength, id(item.group), *kind), []).append(item)
    rooms: dict[Any, Tensor] = {}
    return [Pull(items, rooms) for items in alike.values()]


class Pull:
    """Parameters that are pulled alike: same strength, group, device, type, kind of anchor and of weighing.

    On the CPU one tensor after the other goes through a small buffer that stays in cache, large ones stretch by
    stretch; that is as fast as flattening many small tensors into one, and nobody's memory is rearranged. Elsewhere
    many tensors share a launch.

    Args:
        items: at least one.
        rooms: buffers shared by all pulls, by type; filled as needed.
    """

    def __init__(self, items: Sequence[Pulled], rooms: dict[Any, Tensor]) -> None:
        self._strength, self._group = items[0].strength, items[0].group
        weight = items[0].parameter
        room = None
        if weight.device.type in _CHUNK and items[0].anchor is not None:
            if weight.dtype not in rooms:
                rooms[weight.dtype] = torch.empty(chunk(weight), dtype=weight.dtype)
            room = rooms[weight.dtype]
        whole = _Part(items, None, None)
        at_once = self._group is not None and items[0].importance is None and whole.ready  # needs no room at all
        self._parts = [whole] if at_once else list(_cut(items, room))

    @torch.no_grad()
    def add_gradients(self, factor: float = 1.0, scale: Tensor | None = None) -> None:
        """Add factor × scale × strength × (w - anchor) to each gradient, as the penalty in the loss would have.

        A parameter without a gradient gets one. The difference is formed first and scaled while it is
        added: alpha w - alpha w0 in two additions would cancel (relative error 1.7e-5 against 2e-8).

        Args:
            factor: of the annealing, negative if the optimizer maximises.
            scale: the factor the gradients carry, if a fused optimizer will divide it out; scalar tensor.
        """
        strength = factor * self._strength
        if not strength:
            return
        carried = None if scale is None else _sent(scale.reshape(()), self._parts[0].weights[0])
        for part in self._parts:
            gradients = part.gradients()
            differences = part.differences()
            if carried is not None:
                differences = list(foreach_mul(differences, carried))
            if part.importances is not None:
                foreach_addcmul_(gradients, differences, part.importances, value=strength)
            else:
                foreach_add_(gradients, differences, alpha=strength)

    @torch.no_grad()
    def move_weights(self, factor: float = 1.0, skip: Tensor | None = None) -> None:
        """Move each weight by rate × factor × strength × (anchor - w), before the gradient step.

        Args:
            factor: of the annealing.
            skip: scalar tensor, non-zero where the step will be skipped (a scaler's ``found_inf``); read
                on the device, so that nothing waits for it.
        """
        strength = factor * self._strength
        if self._group is None or not strength:
            return
        weight = self._parts[0].weights[0]
        amount: Any = self._group["lr"] * strength
        if skip is not None:
            amount = amount * (1 - skip.to(weight.device).clamp(max=1))
        if isinstance(amount, Tensor):
            amount = _sent(amount.reshape(()), weight)
        for part in self._parts:
            if part.anchors is None:
                foreach_mul_(part.weights, 1 - amount)
            elif part.importances is not None:
                shares = foreach_mul(part.importances, amount)
                foreach_clamp_max_(shares, 1)  # no element goes beyond the source
                foreach_addcmul_(part.weights, part.differences(), shares, value=-1)
            else:
                amounts = [amount] * len(part.weights) if isinstance(amount, Tensor) else amount
                foreach_lerp_(part.weights, part.placed(), amounts)


class _Part:
    """Tensors that are gone through together, or a stretch of a large one.

    Args:
        items: the parameters.
        stretch: elements of the only item, in the order of memory; None: all of each.
        room: where anchors are widened and differences formed; None: in memory of their own.
    """

    def __init__(self, items: Sequence[Pulled], stretch: slice | None, room: Tensor | None) -> None:
        self._owners = [item.parameter for item in items]
        self._stretch = stretch
        self._order = _order(local(self._owners[0]))
        self._plain = stretch is None and not any(hasattr(owner, "to_local") for owner in self._owners)
        self.weights = [self._of(item.parameter.detach()) for item in items]
        self.anchors = [self._of(item.anchor) for item in items if item.anchor is not None] or None
        self.importances = [self._of(item.importance) for item in items if item.importance is not None] or None
        self.ready = all(item.anchor is None or _like(item.anchor, item.parameter) for item in items)
        sizes = [weight.numel() for weight in self.weights]
        self._rooms = None
        if room is not None:
            rooms = torch.split(room[: sum(sizes)], sizes)
            self._rooms = [_laid_out(one, weight) for one, weight in zip(rooms, self.weights, strict=True)]

    def gradients(self) -> list[Tensor]:
        """Dense gradients, made where there are none."""
        found = []
        for owner in self._owners:
            gradient = dense_gradient(owner)
            if self._stretch is not None and not _flat(gradient, self._order):
                gradient = owner.grad = torch.empty_like(owner).copy_(gradient)
            found.append(gradient)
        return found if self._plain else [self._of(gradient) for gradient in found]

    def differences(self) -> list[Tensor]:
        """W - anchor."""
        if self.anchors is None:
            return self.weights
        if self._rooms is None:
            return list(foreach_sub(self.weights, self.placed()))
        for weight, anchor, room in zip(self.weights, self.placed(), self._rooms, strict=True):
            torch.sub(weight, anchor, out=room)
        return self._rooms

    def placed(self) -> list[Tensor]:
        """Anchors as their parameters are: those held in half precision or on the CPU are made so for the moment."""
        if self.anchors is None or self.ready:
            return self.anchors or []
        rooms = self._rooms or [torch.empty_like(weight) for weight in self.weights]
        foreach_copy_(rooms, self.anchors, non_blocking=True)
        return rooms

    def _of(self, tensor: Any) -> Tensor:
        found: Tensor = local(tensor)
        return found if self._stretch is None else found.permute(self._order).view(-1)[self._stretch]


def _cut(items: Sequence[Pulled], room: Tensor | None) -> Iterator[_Part]:
    """Runs of small tensors that fit into a chunk together; large ones in stretches of a chunk each."""
    run: list[Pulled] = []
    size = 0
    for item in items:
        weight = local(item.parameter)
        count, most = weight.numel(), chunk(weight)
        if count > most:
            order = _order(weight)
            if all(t is None or _flat(local(t), order) for t in (weight, item.anchor, item.importance)):
                yield from (_Part([item], slice(at, at + most), room) for at in range(0, count, most))
            else:
                yield _Part([item], None, None)
            continue
        if run and size + count > most:
            yield _Part(run, None, room)
            run, size = [], 0
        run.append(item)
        size += count
    if run:
        yield _Part(run, None, room)


def dense_gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, made dense if it is sparse and zero if there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def chunk(tensor: Tensor) -> int:
    """Elements that go through memory together on the tensor's device."""
    return _CHUNK.get(tensor.device.type, _CHUNK_ELSEWHERE)


def _order(tensor: Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _flat(tensor: Any, order: Sequence[int]) -> bool:
    """Whether a tensor lies in memory without gaps, its dimensions in this order."""
    return bool(local(tensor).permute(order).is_contiguous())


def _laid_out(room: Tensor, like: Tensor) -> Tensor:
    """A stretch of memory in a tensor's shape, with its order of dimensions in memory, so that loops over both fuse."""
    order = _order(like)
    back = sorted(range(like.ndim), key=order.__getitem__)
    return room.view([like.shape[dim] for dim in order]).permute(back)


def _like(tensor: Any, other: Any) -> bool:
    return bool(tensor.dtype == other.dtype and tensor.device == other.device)


def _sent(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in another's type and on its device; where it comes from the CPU, nothing waits for it."""
    return tensor.to(like.device, like.dtype, non_blocking=tensor.device.type == "cpu")
