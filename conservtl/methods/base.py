"""The base of every method: a frozen spec with one pure function from plan to plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, get_args

from torch import nn

from conservtl.layers import Layer
from conservtl.plan.plan import Plan
from conservtl.spec_model import FrozenModel, check_describable, register

__all__ = ["Aliases", "Order", "Span", "Strategy", "TestFields"]

Aliases = Mapping[str, Mapping[str, Any]]
"""Short names that specs may use as ``kind`` -> the fields each presets; fields given beside a short name win."""
TestFields = Sequence[Mapping[str, Any]]
"""Alternative sets of fields that property tests draw: field -> a ``Span`` or ``range``, a list of choices, a tuple of
values, ``{str: values}`` for a dictionary by parameter, a type, or a constant."""


@dataclass(frozen=True)
class Span:
    """Range of floats from ``low`` to ``high``, both included, that property tests draw from."""

    low: float
    high: float


class Order(IntEnum):
    """Order in which strategies are applied, whatever their place in the list; later ones read earlier decisions."""

    ORIGIN = 0
    """Decides which parameters come from the source and which are frozen."""
    HEAD = 1
    """Reads which parameters are fresh; decides the head and what is frozen below it."""
    STRENGTH = 2
    """Reads the origins; decides rates, penalties and updates."""
    TIME = 3
    """Reads everything else; decides phases."""


class Strategy(FrozenModel, ABC):
    """Base class of all strategies, built-in or a user's own.

    A subclass has a constant ``kind``, fields with bounds in their types, an ``order`` and ``apply``. ``apply``
    touches no tensor and does no input or output. A subclass registers itself by its ``kind``, so that specs can name
    it. A strategy that adds parameters to the model or replaces its head implements ``extend``, ``retract`` and
    ``merge``. ``conservtl.testing.check_strategy`` checks the whole contract.
    """

    kind: str
    order: ClassVar[Order] = Order.STRENGTH
    """Order of application only; updates and penalties have a precedence of their own."""
    aliases: ClassVar[Aliases] = {}
    """Short names of its kind."""
    test_fields: ClassVar[TestFields] = ({},)
    """Fields that ``conservtl.testing.strategies`` draws, if their types allow too much."""

    replaces_head: ClassVar[bool] = False
    """Whether ``extend`` replaces the model's head, and so changes its outputs, instead of adding parameters."""

    merges_first: ClassVar[bool] = False
    """Whether ``merge`` adds to weights, and so comes before those that multiply them."""

    named: ClassVar[dict[str, type[Strategy]]] = {}
    """Every registered class by its kind and by each of its aliases."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        kind = cls.model_fields["kind"]
        if get_args(kind.annotation) == (kind.default,):
            check_describable(cls)
            register(Strategy.named, cls, kind.default, *cls.__dict__.get("aliases", ()))

    @property
    def extends(self) -> bool:
        """Whether ``extend`` adds parameters to the model or replaces its head: so it does where it is implemented."""
        return type(self).extend is not Strategy.extend

    @abstractmethod
    def apply(self, plan: Plan) -> Plan:
        """Return the plan with this strategy's decisions filled in."""

    def concerns(self, model: nn.Module) -> bool:  # noqa: ARG002
        """Return whether the strategy applies to the unwrapped model; if not, it is left out of the plan."""
        return True

    def extend(self, model: nn.Module, layers: Sequence[Layer], example: Any) -> dict[str, str]:
        """Add parameters to the model in place without changing its outputs, or replace its head.

        Called before the plan is drawn up.

        Args:
            model: wrapped or not.
            layers: its layers, input side first.
            example: an example input, or None.

        Returns:
            Name of each added parameter -> its description, shown in the plan as the reason why it is fresh. Empty if
            the head was replaced under the same names.
        """
        raise NotImplementedError(f"{self.label} adds nothing to a model: it has no extend().")

    def record(self, plan: Plan) -> Plan:
        """Return the plan with facts about what ``extend`` added, before any strategy is applied.

        A strategy whose parameters change weights by a product of low rank chooses the column ``low_rank`` here, so
        that all strategies take these parameters as parts of their weights (``plan.factors``).
        """
        return plan

    def retract(self, model: nn.Module) -> None:
        """Remove what ``extend`` added, whatever its values; do nothing if there is nothing to remove."""

    def merge(self, model: nn.Module) -> bool:  # noqa: ARG002
        """Fold what ``extend`` added into the model's own weights if that is exact.

        Returns:
            Whether nothing that ``extend`` added is left in the model.
        """
        return not self.extends

    def plain(self, model: nn.Module) -> nn.Module:
        """Return the model with what ``merge`` left of ``extend`` as modules of torch alone.

        Args:
            model: a copy, unwrapped; changed in place, or put into another module.
        """
        return model

    @property
    def label(self) -> str:
        """Name of the strategy in plans and messages."""
        return type(self).__name__
