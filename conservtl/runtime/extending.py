"""Extensions of a plan on a model's modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from conservtl.layers import Layer
from conservtl.layers.extended import restore_module
from conservtl.plan.extension import Extension

__all__ = ["apply_extensions"]


def apply_extensions(model: nn.Module, extensions: Iterable[Extension], layers: Sequence[Layer]) -> None:
    """Extend the modules that these extensions name, and restore all others."""
    for module in model.modules():
        restore_module(module)
    for extension in extensions:
        extension.extend(model, layers)
