"""A source model without weights of its own: the model to adapt, while a part of it is off."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import nn

__all__ = ["SharedModel"]


class SharedModel(ABC):
    """The model to adapt, which can compute the source's function."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def as_source(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes the source's function; it leaves ``requires_grad`` as it was."""
