"""Record of a model's forward passes, for trainers that hold the training step themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from conservtl.layers import unwrap

__all__ = ["Pass", "outermost", "recording"]


class Pass:
    """One forward pass with gradients.

    Args:
        inputs: positional arguments as a tuple, or keyword arguments as a dictionary, positional ones under their
            names.
        outputs: what the model returned.
    """

    def __init__(self, inputs: tuple[Any, ...] | dict[str, Any], outputs: Any) -> None:
        self.inputs, self.outputs = inputs, outputs


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Pass]]:
    """Yield a list that receives the model's forward passes with gradients inside the block."""
    passes: list[Pass] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if torch.is_grad_enabled():
            passes.append(Pass(_together(model, args, kwargs), outputs))

    with model.register_forward_hook(record, with_kwargs=True):
        yield passes


def outermost(root: nn.Module, model: nn.Module) -> nn.Module | None:
    """Return the module of ``root`` that is ``model``, or the outermost wrapper of it; None: ``root`` has neither."""
    inner = unwrap(model)
    return next((module for module in root.modules() if unwrap(module) is inner), None)


def _together(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | dict[str, Any]:
    """Return arguments as ``Adaptation.loss`` takes them: all positional, or all by name."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    return dict(inspect.signature(unwrap(model).forward).bind(*args, **kwargs).arguments)
