"""A strategy for conservtl: normalisations train at a rate of their own."""

from typing import ClassVar, Literal

from conservtl import Plan, Strategy
from conservtl.bounds import Fraction
from conservtl.methods import Order

__all__ = ["SlowNorms"]


class SlowNorms(Strategy):
    """Multiply the learning rate of the scale and shift of every normalisation."""

    kind: Literal["slow_norms"] = "slow_norms"
    order: ClassVar[Order] = Order.STRENGTH
    factor: Fraction = 0.1
    """Rate of a norm's parameters, relative to the optimizer's."""

    def apply(self, plan: Plan) -> Plan:
        """Choose the scale of the rows of norms."""
        norms = [row.name for row in plan.rows if row.kind == "norm"]
        return plan.choose(self.label, "rate", {name: {"lr": None, "scale": self.factor} for name in norms})
