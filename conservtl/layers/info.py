"""A layer and its parameters, as ``find_layers`` describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Layer", "ParameterInfo", "layer_of"]


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter, by its canonical name.

    The kind is `norm` for a parameter of a normalisation, otherwise `weight` for two axes or more and `bias` for one.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["weight", "bias", "norm"]
    aliases: tuple[str, ...] = ()
    """Other names of the same tensor, if it is tied."""
    head: str | None = field(default=None, compare=False)
    """Module of the model's head that holds it; None for a parameter of the body."""
    candidate: str | None = field(default=None, compare=False)
    """Module that holds it and may be the head, if several remain possible."""
    output: str | None = field(default=None, compare=False)
    """Module that holds it and computes one of several outputs, none of which is named as the scores."""


@dataclass(frozen=True)
class Layer:
    """A layer of a model: its parameters, and the outermost modules that contain them."""

    name: str
    parameters: tuple[ParameterInfo, ...]
    modules: tuple[str, ...]


def layer_of(layers: Sequence[Layer], module: str) -> Layer | None:
    """Return the layer that contains a module, by canonical name; None for a module that contains layers."""
    parts = {part: layer for layer in layers for part in layer.modules}
    while module not in parts and module:
        module = module.rpartition(".")[0]
    return parts.get(module)
