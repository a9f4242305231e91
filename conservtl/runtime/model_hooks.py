"""Hooks of a model: before each forward pass, and before its state dict is made."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from conservtl.compat import outside_graphs

if TYPE_CHECKING:
    from conservtl.runtime.bound_plan import BoundPlan

__all__ = ["ForwardEnded", "ForwardHook", "StateDictHook", "hooked", "remove_hooks"]


class ForwardEnded(Exception):  # noqa: N818 - not an error
    """Raised in a hook that has what it needs, to skip the rest of a forward pass; whoever runs the pass catches it."""


def remove_hooks(handles: list[RemovableHandle]) -> None:
    """Remove hooks and empty the list of their handles."""
    for handle in handles:
        handle.remove()
    handles.clear()


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks after the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ForwardHook:
    """Forward pre-hook that calls its listener, held by a weak reference. A copy, in a copied model, does nothing."""

    def __init__(self, listener: BoundPlan | None) -> None:
        self._listener = None if listener is None else weakref.ref(listener)
        # Outside the graph of a compiled model, which would hold the weights of one pass and a generator's first draw.
        self._call = self._announce if listener is None else outside_graphs(self._announce)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Call the listener if it still exists."""
        self._call(module)

    def _announce(self, module: nn.Module) -> None:
        listener = self._listener() if self._listener is not None else None
        if listener is not None:
            self.act(listener, module)

    def act(self, listener: BoundPlan, module: nn.Module) -> None:
        """Announce a forward pass."""
        listener.before_forward(training=module.training and torch.is_grad_enabled())

    def __deepcopy__(self, _: Any) -> ForwardHook:
        return type(self)(None)

    def __reduce__(self) -> Any:
        return type(self), (None,)


class StateDictHook(ForwardHook):
    """Hook that calls its listener before the model's state dict is made."""

    def act(self, listener: BoundPlan, _: nn.Module) -> None:
        """Announce a read of the weights."""
        listener.restore_weights()
