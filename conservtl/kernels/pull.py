"""The quadratic pull toward the source, on gradients or on weights, in as few passes over memory as possible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from conservtl.compat import (
    foreach_add_,
    foreach_addcmul_,
    foreach_clamp_max_,
    foreach_lerp_,
    foreach_mul,
    foreach_mul_,
)
from conservtl.kernels.backend import fused_on
from conservtl.kernels.chunks import Chunk, Pulled, buffer_for, cut
from conservtl.kernels.replayed import Replayed
from conservtl.plan.penalty import PenaltyKernel

__all__ = ["Pull", "Pulled", "gather", "kept"]


def gather(pulled: Iterable[Pulled]) -> list[PenaltyKernel]:
    """Return pulls for parameters, one for all that can be pulled together; valid as long as no tensor moves."""
    alike: dict[Any, list[Pulled]] = {}
    at_once: dict[Any, list[Pulled]] = {}
    for item in pulled:
        parameter = item.parameter
        kind = (item.anchor is None, item.importance is None, parameter.device, parameter.dtype, item.every)
        if fused_on(parameter.device) and _fits(item):
            types = [None if one is None else (one.dtype, one.device) for one in (item.anchor, item.importance)]
            at_once.setdefault((*types, *kind), []).append(item)
        else:
            alike.setdefault((item.strength, id(item.group), *kind), []).append(item)
    buffers: dict[Any, Tensor] = {}
    return [*map(_fused, at_once.values()), *(_by_torch(items, buffers) for items in alike.values())]


def _by_torch(items: Sequence[Pulled], buffers: dict[Any, Tensor]) -> PenaltyKernel:
    """Return a pull by torch's operations; replayed from a graph on CUDA without Triton."""
    device = items[0].parameter.device
    pull = Pull(items, buffers)
    return Replayed(pull, items) if device.type == "cuda" and not fused_on(device) else pull


def _fits(item: Pulled) -> bool:
    """Whether programs can pull a parameter together with others."""
    from conservtl.kernels.fused.members import fits
    from conservtl.kernels.fused.stream import streams

    return streams(item) or fits(item.parameter, item.anchor, item.importance)


def _fused(items: Sequence[Pulled]) -> PenaltyKernel:
    from conservtl.kernels.fused.pull import FusedPull

    return FusedPull(items)


class Pull:
    """Parameters that are pulled together: same strength, group, device, type, kind of anchor and of importance.

    On the CPU, one tensor after the other goes through a small buffer that stays in the cache; large tensors go
    through it slice by slice. That is as fast as flattening many small tensors into one, and leaves the caller's
    memory as it is. Elsewhere many tensors share a kernel launch. All pulls share ``buffers``, filled as needed.
    """

    def __init__(self, items: Sequence[Pulled], buffers: dict[Any, Tensor]) -> None:
        self._strength, self._group, self._every = items[0].strength, items[0].group, items[0].every
        whole = Chunk(items, None, None)
        unbuffered = self._group is not None and items[0].importance is None and whole.ready
        self._parts = [whole] if unbuffered else list(cut(items, buffer_for(items[0], buffers)))

    def add_gradients(self, factor: float = 1.0, scale: Tensor | None = None) -> None:
        """Add factor × scale × strength × (w - anchor) to each gradient, as the penalty in the loss would have.

        A parameter without a gradient gets one. The difference is computed first and scaled while it is added: alpha w
        and -alpha w0 in two additions would cancel (relative error 1.7e-5 instead of 2e-8).
        """
        strength = factor * self._every * self._strength
        if not strength:
            return
        carried = None if scale is None else _converted(scale.reshape(()), self._parts[0].weights[0])
        for part in self._parts:
            gradients = part.gradients()
            differences = part.differences()
            if carried is not None:
                differences = list(foreach_mul(differences, carried))
            if part.importances is not None:
                foreach_addcmul_(gradients, differences, part.importances, value=strength)
            else:
                foreach_add_(gradients, differences, alpha=strength)

    def move_weights(self, factor: float = 1.0, skip: Tensor | None = None) -> None:
        """Move each weight by rate × factor × strength × (anchor - w), before the gradient step."""
        strength = factor * self._strength
        if self._group is None or not strength:
            return
        weight = self._parts[0].weights[0]
        one_step: Any = self._group["lr"] * strength
        if skip is not None:
            one_step = one_step * (1 - skip.to(weight.device).clamp(max=1))
        if isinstance(one_step, Tensor):
            one_step = _converted(one_step.reshape(()), weight)
        amount = kept(one_step, self._every)
        for part in self._parts:
            if part.anchors is None:
                foreach_mul_(part.weights, 1 - amount)
            elif part.importances is not None:
                shares = foreach_mul(part.importances, one_step)
                foreach_clamp_max_(shares, 1)  # no element goes beyond the source
                shares = tuple(kept(share, self._every) for share in shares) if self._every > 1 else shares
                foreach_addcmul_(part.weights, part.differences(), shares, value=-1)
            else:
                amounts = [amount] * len(part.weights) if isinstance(amount, Tensor) else amount
                foreach_lerp_(part.weights, part.placed(), amounts)


def kept(share: Any, every: int) -> Any:
    r"""Return the share of ``every`` steps in one, :math:`1 - (1 - s)^k`.

    By squaring, s_2k = s_k (2 - s_k) and s_(a + b) = s_a + s_b - s_a s_b, so that small shares lose no digits.
    """
    result, power = None, share
    while every:
        if every % 2:
            result = power if result is None else result + power - result * power
        every //= 2
        power = power * (2 - power) if every else power
    return result


def _converted(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in another's type and on its device; a copy from the CPU does not block."""
    return tensor.to(like.device, like.dtype, non_blocking=tensor.device.type == "cpu")
