"""Deep copies of models and of objects that hold models, whatever a forward pass has left on the modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["deep_copy"]

_Copied = TypeVar("_Copied")
_DEPTH = 3
"""Attributes of attributes in which an object's models are looked for."""


def deep_copy(original: _Copied, memo: dict[int, Any] | None = None) -> _Copied:
    """Return a deep copy of a model, or of an object that holds models.

    ``copy.deepcopy`` refuses two things that modules may hold. Tensors with a graph, such as the weight that old-style
    ``weight_norm`` computes before each forward pass, or activations kept by a hook, are copied without their graph.
    Attributes and hooks that cannot be copied (locks, files, generators) are shared with the original.

    Args:
        original: the model or object; not changed.
        memo: id of an object -> the object to use in place of its copy; filled with the copies made.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.last = layer.weight * 2  # has a graph: copy.deepcopy(layer) raises
        >>> bool((deep_copy(layer).last == layer.weight * 2).all())
        True
    """
    memo = {} if memo is None else memo
    start = dict(memo)
    with _WithoutGraph():
        try:
            return _with_leaves(original, copy.deepcopy(original, memo))
        except Exception:
            shared = {id(value): value for module in _modules(original) for value in _uncopyable(module, start)}
            if not shared:
                raise
            memo.clear()
            memo.update(start | shared)
            return _with_leaves(original, copy.deepcopy(original, memo))


class _WithoutGraph(TorchFunctionMode):
    """Copies tensors that have a graph as tensors without one; ``copy.deepcopy`` refuses them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _with_leaves(original: _Copied, copied: _Copied) -> _Copied:
    """Make parameters of a copy's scripted modules leaves: TorchScript copies them with a graph."""
    for old, new in zip(_modules(original), _modules(copied), strict=False):
        if isinstance(new, torch.jit.ScriptModule):
            for parameter, own in zip(old.parameters(), new.parameters(), strict=True):
                if not own.is_leaf:
                    own.detach_().requires_grad_(parameter.requires_grad)
    return copied


def _modules(original: Any, depth: int = _DEPTH) -> Iterator[nn.Module]:
    """Yield the modules of a model, or of the models in an object's attributes."""
    if isinstance(original, nn.Module):
        yield from original.modules()
    elif depth:
        for value in getattr(original, "__dict__", {}).values():
            yield from _modules(value, depth - 1)


def _uncopyable(module: nn.Module, memo: dict[int, Any]) -> Iterator[Any]:
    """Yield the attributes and hooks of a module that cannot be copied; parameters, buffers and children can."""
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        hooks = name.endswith("_hooks") and isinstance(value, dict)
        for one in list(value.values()) if hooks else [value]:
            try:
                copy.deepcopy(one, dict(memo))
            except Exception:  # noqa: BLE001 - as above
                yield one
