"""A strategy that fills in a column of the plan: freeze every normalisation.

python examples/extend/hold_norms.py
"""

from typing import ClassVar, Literal

from conservtl import Plan, Strategy
from conservtl.methods import Order


class HoldNorms(Strategy):
    """Freeze the scale and shift of every normalisation."""

    kind: Literal["hold_norms"] = "hold_norms"
    order: ClassVar[Order] = Order.ORIGIN  # strategies that follow read which parameters are frozen

    def apply(self, plan: Plan) -> Plan:
        """Freeze the rows of norms."""
        norms = [row.name for row in plan.rows if row.kind == "norm"]
        return plan.choose(self.label, "frozen", {name: {"frozen": True} for name in norms})


if __name__ == "__main__":
    from conservtl.testing import check_strategy

    check_strategy(HoldNorms())  # raises an AssertionError that names the rule it breaks
    print("HoldNorms keeps the contract of a strategy.")
