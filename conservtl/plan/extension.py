"""Extensions: modules that compute something else than in the source."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from pydantic import SerializeAsAny
from torch import nn

from conservtl.layers import Layer
from conservtl.plan.decision import Decision

__all__ = ["Extension", "Extensions"]


class Extension(Decision):
    """Modules that compute something else than in the source, from the same parameters and buffers.

    They do so in training and afterwards. An extension calls ``layers.extended.extend_module``, so that the next
    adaptation can undo it, and is saved with the model.
    """

    @abstractmethod
    def extend(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Extend modules in place; a second call changes nothing.

        Args:
            model: unwrapped.
            layers: its layers, input side first.
        """


Extensions = tuple[SerializeAsAny[Extension], ...]
