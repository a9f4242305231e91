"""Memory format of a model's weights: channels last for a run, as they were found afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["channels_last", "follow_layout"]


@contextmanager
def channels_last(models: Iterable[nn.Module], *, active: bool = True) -> Iterator[None]:
    """Hold the weights of models in the layout (N, H, W, C) inside the block, if ``active``.

    Names, shapes and values stay; strides are restored at the end, because files and other programs expect them.
    """
    models = list(models) if active else []
    before = [{name: tensor.stride() for name, tensor in _images(model)} for model in models]
    try:
        for model in models:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        yield
    finally:
        for model, strides in zip(models, before, strict=True):
            for name, tensor in _images(model):
                if name in strides and tensor.stride() != strides[name]:
                    tensor.data = _strided(tensor.detach(), strides[name])


def follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay out an optimizer's state as its parameters are: fused steps take both as flat memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = _strided(value, parameter.stride())


def _images(model: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in tensors if tensor.ndim == 4]


def _strided(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
