"""What a strategy is: a frozen spec and one pure function from plan to plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from conservtl.plan import Plan

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


class Strategy(BaseModel, ABC):
    """Base of all strategies, a user's own included.

    A subclass has a ``kind``, fields with bounds in their types, an ``order`` and ``apply``. It
    touches no tensor and does no input or output; ``conservtl.testing.check_strategy`` holds it to
    the contract.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)

    kind: str
    order: ClassVar[Order] = Order.STRENGTH

    @abstractmethod
    def apply(self, plan: Plan) -> Plan:
        """The plan with this strategy's decisions filled in."""

    @property
    def label(self) -> str:
        """How messages name it."""
        return type(self).__name__
