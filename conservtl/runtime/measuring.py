"""Measurements before training, with the model in eval mode and restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.batches import check_batches, to_device
from conservtl.errors import DataError, SpecError
from conservtl.functions import Forward, Loss
from conservtl.labels import labels_for_loss, takes_labels
from conservtl.layers import named_parameters
from conservtl.layers.names import named_modules
from conservtl.plan.decision import Measure, MeasureContext
from conservtl.plan.plan import Plan
from conservtl.runtime.preserve import eval_mode, preserve_buffers, preserve_gradients

__all__ = ["Placed", "check_importance", "measure"]


def measure(
    measurement: Measure,
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, str],
    forward: Forward,
    loss: Loss,
    autocast: Callable[[], AbstractContextManager[Any]],
    left_out: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """Return one measurement, tensors by name on the CPU; modes, gradients, buffers and generators are restored.

    Raises:
        DataError: there are no batches, a single one, or an iterator.
    """
    check_batches(batches, measurement.by)
    if next(iter(batches), None) is None:
        raise DataError(
            f"{measurement.by}: there are no batches to measure on. Pass a non-empty collection of batches."
        )
    parameters = named_parameters(model)
    device = next(iter(parameters.values())).device
    modules = named_modules(model)
    tapped = {layer: modules[name] for layer, name in layers.items() if name in modules}
    context = MeasureContext(model, Placed(batches, device), forward, loss, tapped, parameters, autocast, left_out)
    with (
        eval_mode(model),
        preserve_buffers(model),
        preserve_gradients(parameters.values()),
        torch.random.fork_rng(),
    ):
        if takes_labels(model):
            with torch.no_grad(), autocast():
                labels_for_loss(model, next(iter(context.batches)), forward, loss)
        return {name: _agreed(tensor.detach(), device) for name, tensor in measurement.compute(context).items()}


def _agreed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the CPU; with many processes that of the first, so that rounding does not separate them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        tensor = tensor.to(device).contiguous()
        torch.distributed.broadcast(tensor, 0)
    return tensor.cpu()


def check_importance(plan: Plan, measured: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise unless the measurements that penalties read fit their parameters."""
    read = [
        (name, plan[row])
        for penalty in plan.penalties
        for name in penalty.reads
        if name in measured
        for row in penalty.names
    ]
    for measure, row in read:
        weights = measured[measure].get(row.name)
        if weights is None or tuple(weights.shape) != row.shape:
            received = "nothing" if weights is None else f"shape {tuple(weights.shape)}"
            raise SpecError(
                f"{measure!r} must weigh each element of {row.name!r}, of shape {row.shape}; it has {received} for "
                "it. Measure it on this model."
            )
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise SpecError(
                f"{measure!r} must be finite and at least 0; for {row.name!r} it reaches from "
                f"{float(weights.min()):g} to {float(weights.max()):g}. Measure it again."
            )


class Placed:
    """Iterable over batches that moves each to a device when it is reached."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __iter__(self) -> Iterator[Any]:
        return (to_device(batch, self._device) for batch in self._batches)
