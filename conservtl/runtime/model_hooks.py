"""Hooks of a model that know who listens: before each forward pass, and before its state dict is made."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["ForwardHook", "Listener", "StateDictHook"]


class Listener(Protocol):
    """Who wants to know."""

    def before_forward(self, *, training: bool) -> None:
        """A forward pass begins; ``training``: in train mode and with gradients."""

    def restore_weights(self) -> None:
        """The weights are about to be read."""


class ForwardHook:
    """A forward pre-hook of the model that knows who listens. A copy of it, with a copied model, does nothing."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = None if listener is None else weakref.ref(listener)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Tell who listens, where there is someone left."""
        listener = self._listener() if self._listener is not None else None
        if listener is not None:
            self.act(listener, module)

    def act(self, listener: Listener, module: nn.Module) -> None:
        """Tell it."""
        listener.before_forward(training=module.training and torch.is_grad_enabled())

    def __deepcopy__(self, _: Any) -> ForwardHook:
        return type(self)(None)

    def __reduce__(self) -> Any:
        return type(self), (None,)


class StateDictHook(ForwardHook):
    """The same, before the model's state dict is made."""

    def act(self, listener: Listener, _: nn.Module) -> None:
        """Tell it."""
        listener.restore_weights()
