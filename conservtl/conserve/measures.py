"""Measuring before training: the model in eval mode, everything afterwards as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from conservtl.decision import Measure, Probe
from conservtl.errors import DataError
from conservtl.functions import Forward, Loss
from conservtl.layers import canonical, named_parameters, unwrap

__all__ = ["measure"]


def measure(
    one: Measure,
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, str],
    forward: Forward,
    loss: Loss,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Tensor]:
    """Carry out one measurement; modes, gradients, buffers and random generators are left as found.

    Args:
        one: what to measure.
        model: on its device.
        batches: to be gone through more than once; moved to the model's device one by one.
        layers: layer -> name of its module.
        forward: (model, batch) -> outputs.
        loss: (outputs, batch) -> scalar, the mean over the batch.
        autocast: makes the context of each forward pass.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        DataError: there are no batches.
    """
    if next(iter(batches), None) is None:
        raise DataError(f"{one.by}: there are no batches to measure on. Give some, to be gone through more than once.")
    parameters = named_parameters(model)
    device = next(iter(parameters.values())).device
    modules = {canonical(name): module for name, module in unwrap(model).named_modules()}
    found = {layer: modules[name] for layer, name in layers.items() if name in modules}
    probe = Probe(model, _Placed(batches, device), forward, loss, found, parameters, autocast)
    with _as_found(model, parameters), torch.random.fork_rng():
        return {name: tensor.detach().cpu() for name, tensor in one.compute(probe).items()}


class _Placed:
    """Batches on a device, each moved when it is asked for."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __iter__(self) -> Iterator[Any]:
        return (_moved(batch, self._device) for batch in self._batches)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(value, device) for value in batch) if isinstance(batch, (tuple, list)) else batch


@contextmanager
def _as_found(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, parameter in parameters.items():
            parameter.requires_grad_(trained[name])
            parameter.grad = gradients[name]
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
