"""The law of a penalty: its gradient and its kernels are those of its value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conservtl.kernels.gradient import GradientKernel, as_handed
from conservtl.layers import named_parameters
from conservtl.plan.penalty import Penalty
from conservtl.plan.update import Moving
from conservtl.runtime.parameter_index import penalised
from conservtl.testing.law_case import LawCase, close, largest

__all__ = ["penalty_gradient"]

_RATE = 1e-3
_PIECES = 8  # a tensor is cut into this many pieces at most


def penalty_gradient(case: LawCase) -> str | None:
    """A penalty's gradient and its kernels are those of its value, also for each of the parts it is a sum over."""
    adaptation = case.make()
    parameters = named_parameters(adaptation.model)
    for acting in adaptation.plan.penalties:
        penalty = acting.model_copy(update={"every": 1})  # the law is about one step
        rows = [adaptation.plan[name] for name in penalty.names if name not in adaptation.frozen]
        moving = [penalised(penalty, adaptation.bound, row, parameters[row.name], {"lr": _RATE}) for row in rows]
        if not moving:
            continue
        expected = Penalty.gradient(penalty, [as_handed(item) for item in moving])
        size = max(map(largest, expected))
        for computed, gradients in _gradients(penalty, moving):
            for item, gradient, wanted in zip(moving, gradients, expected, strict=True):
                if not close(wanted, gradient, size):
                    return f"{computed} of {penalty.by} is not the gradient of value() for {item.name!r}"
        if penalty.mode == "decoupled" and (name := _wrong_step(penalty, moving, expected, size)):
            return f"the kernel's step of {penalty.by} is not rate × the gradient of value() for {name!r}"
    return None


def _gradients(penalty: Penalty, moving: Sequence[Moving]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the penalty's gradient in all ways in which it is computed."""
    handed = [as_handed(item) for item in moving]
    yield "gradient()", penalty.gradient(handed)
    if penalty.sums_over != "all":
        yield "gradient() of one parameter at a time", [penalty.gradient([item])[0] for item in handed]
    if penalty.sums_over in ("rows", "elements"):
        yield "gradient() of some rows at a time", [_in_pieces(penalty, item) for item in handed]
    if penalty.sums_over == "elements":
        flat = [_in_pieces(penalty, _changed(item, _flattened)) for item in handed]
        restored = [gradient.view_as(item.parameter) for gradient, item in zip(flat, handed, strict=True)]
        yield "gradient() of some elements at a time", restored
    for item in moving:
        item.parameter.grad = None
    with torch.no_grad():
        for kernel in penalty.kernels(moving) or (GradientKernel(penalty, moving),):
            kernel.add_gradients(1.0, None)
    weights = [item.parameter for item in moving]
    yield "the kernel", [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]


@torch.no_grad()
def _wrong_step(penalty: Penalty, moving: Sequence[Moving], gradients: Sequence[Tensor], size: float) -> str | None:
    """Return a parameter that the kernels move by another step, or in a step that is skipped."""
    before = [item.parameter.clone() for item in moving]
    kernels = penalty.kernels(moving) or (GradientKernel(penalty, moving),)
    for skip in (torch.ones((), device=before[0].device), None):
        for kernel in kernels:
            kernel.move_weights(1.0, skip)
        for item, weight, gradient in zip(moving, before, gradients, strict=True):
            wanted = weight if skip is not None else weight - _RATE * gradient
            if not close(wanted, item.parameter, _RATE * size):
                return item.name
    return None


def _in_pieces(penalty: Penalty, item: Moving) -> Tensor:
    """Return the gradient of a penalty that receives a few rows at a time."""
    count = min(_PIECES, len(item.parameter)) if item.parameter.ndim else 0
    if not count:
        return penalty.gradient([item])[0]

    def piece(at: int) -> Moving:
        return _changed(item, lambda tensor: tensor.tensor_split(count)[at])

    return torch.cat([penalty.gradient([piece(at)])[0] for at in range(count)])


def _flattened(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def _changed(item: Moving, change: Callable[[Tensor], Tensor]) -> Moving:
    """Return a parameter with its tensors changed."""
    anchor = None if item.anchor is None else change(item.anchor)
    measured = {name: change(tensor) for name, tensor in item.measured.items()}
    return replace(item, parameter=change(item.parameter), anchor=anchor, measured=measured)
