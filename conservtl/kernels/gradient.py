"""The generic kernel of a penalty, which calls its ``gradient`` on runs of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from conservtl.errors import SpecError
from conservtl.kernels.chunks import dense_gradient
from conservtl.kernels.deviation import placed, runs
from conservtl.kernels.dtensor import local
from conservtl.plan.penalty import Penalty
from conservtl.plan.update import Moving, NamingFresh

__all__ = ["GradientKernel", "as_handed"]


class GradientKernel:
    """A ``PenaltyKernel`` for any penalty."""

    def __init__(self, penalty: Penalty, moving: Sequence[Moving]) -> None:
        self._penalty = penalty
        self._runs = [moving] if penalty.sums_over == "all" else list(runs(moving))

    @torch.no_grad()
    def add_gradients(self, factor: float, scale: Tensor | None) -> None:
        """Add factor × scale × the penalty's gradient to each parameter's gradient."""
        for item, gradient in self._gradients():
            if scale is not None:
                gradient.mul_(_on(scale, gradient))
            local(dense_gradient(item.parameter)).add_(gradient, alpha=factor * self._penalty.every)

    @torch.no_grad()
    def move_weights(self, factor: float, skip: Tensor | None) -> None:
        """Subtract rate × factor × the penalty's gradient from each parameter, nothing if the step is skipped."""
        for item, gradient in self._gradients():
            weight = local(item.parameter)
            step = gradient.mul_(item.group["lr"] * factor * self._penalty.every)
            weight.sub_(step if skip is None else torch.where(_on(skip, weight) == 0, step, 0))

    def _gradients(self) -> Iterator[tuple[Moving, Tensor]]:
        """Yield each parameter with a copy of its gradient; the gradients of a run are computed before the first."""
        for run in self._runs:
            handed = [as_handed(item) for item in run]
            with NamingFresh(self._penalty, handed):
                gradients = self._penalty.gradient(handed)
            self._check(handed, gradients)
            yield from ((item, gradient.clone()) for item, gradient in zip(run, gradients, strict=True))

    def _check(self, handed: Sequence[Moving], gradients: Any) -> None:
        shapes = [tuple(item.parameter.shape) for item in handed]
        received = [tuple(getattr(gradient, "shape", ())) for gradient in gradients]
        if received != shapes:
            raise SpecError(
                f"{self._penalty.by}: gradient() must return one tensor for each parameter, of its shape {shapes}; "
                f"received {received}."
            )


def _detached_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor without gradient."""
    part: Tensor = local(tensor).detach()
    return part


def as_handed(item: Moving, tensor_of: Callable[[Tensor], Tensor] = _detached_part) -> Moving:
    """Return a parameter as ``value`` and ``gradient`` receive it: plain tensors on one device, in one type."""
    parameter = tensor_of(item.parameter)
    anchor = None if item.anchor is None else placed(tensor_of(item.anchor), parameter)
    measured = {name: tensor_of(tensor) for name, tensor in item.measured.items()}
    return Moving(item.row, parameter, anchor, item.group, measured)


def _on(scalar: Tensor, like: Tensor) -> Tensor:
    """Return a scalar in a tensor's type and on its device."""
    return scalar.to(like.device, like.dtype, non_blocking=scalar.device.type == "cpu").reshape(())
