"""Temporary changes of a model: modes, buffers and gradients restored at the end of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["eval_mode", "preserve_buffers", "preserve_gradients", "preserve_modes", "preserve_statistics"]


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training or eval mode of every module at the end of the block."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode  # set, not train(mode): that of a frozen norm does nothing


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Temporarily put a model in eval mode."""
    with preserve_modes(model):
        model.eval()
        yield


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the values of all buffers at the end of the block."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


@contextmanager
def preserve_statistics(model: nn.Module) -> Iterator[None]:
    """Let passes in training mode compute as always, but learn no running statistics inside the block.

    Others are put in their place meanwhile: the backward pass of an earlier forward pass may need the very tensors.
    """
    running = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if module.training and (name.startswith("running_") or name == "num_batches_tracked")
    ]
    for module, name, buffer in running:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in running:
            setattr(module, name, buffer)


@contextmanager
def preserve_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Restore ``requires_grad`` and ``grad`` of parameters at the end of the block."""
    states = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, requires_grad, gradient in states:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
