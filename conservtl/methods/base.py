"""What a strategy is: a frozen spec and one pure function from plan to plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, ClassVar

from torch import nn

from conservtl.layers import Layer
from conservtl.plan.plan import Plan
from conservtl.spec_model import FrozenModel

__all__ = ["Order", "Strategy"]


class Order(IntEnum):
    """When a strategy is applied, whatever its place in the list: later ones read what earlier ones decide."""

    ORIGIN = 0
    """Decides what comes from the source and what is frozen."""
    HEAD = 1
    """Reads what others made fresh; decides the head and what is frozen below it."""
    STRENGTH = 2
    """Reads the origins; decides rates and pulls."""
    TIME = 3
    """Reads all of it; decides phases."""


class Strategy(FrozenModel, ABC):
    """Base of all strategies, a user's own included.

    A subclass has a ``kind``, fields with bounds in their types, an ``order`` and ``apply``, which
    touches no tensor and does no input or output. One that adds parameters to the model, or puts another head on
    it, says so by ``extends``. ``conservtl.testing.check_strategy`` holds it to the contract.
    """

    kind: str
    order: ClassVar[Order] = Order.STRENGTH

    @property
    def extends(self) -> bool:
        """Whether it adds parameters to the model, or puts another head on it, in ``extend``."""
        return False

    @abstractmethod
    def apply(self, plan: Plan) -> Plan:
        """The plan with this strategy's decisions filled in."""

    def concerns(self, model: nn.Module) -> bool:  # noqa: ARG002
        """Whether it has anything to do with a model, unwrapped; one that has not is left out of the plan."""
        return True

    def extend(self, model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, str]:
        """Add parameters to the model in place, such that it computes what it did, or put another head on it.

        That is done before the plan is drawn up.

        Args:
            model: wrapped or not.
            layers: its layers, input side first.
            example: an input, where the caller gave one.

        Returns:
            Name of each added parameter -> what it is, as the plan's reason for a fresh one; none for another head of
            the same name.
        """
        raise NotImplementedError(f"{self.label} sets extends, so it needs extend().")

    def retract(self, model: nn.Module) -> None:
        """Take away what ``extend`` added, whatever its values; nothing where there is nothing."""

    def merge(self, model: nn.Module) -> bool:  # noqa: ARG002
        """Move what ``extend`` added into the model's own weights, where that is exact; whether nothing is left."""
        return not self.extends

    @property
    def label(self) -> str:
        """How messages name it."""
        return type(self).__name__
