r"""A penalty on weights: quadratic near the source as L2-SP, linear far from it, so that a few weights may go far.

.. math:: \alpha \sum_j h(w_j - w^0_j), \quad h(d) = d^2 / 2 \text{ if } |d| \le \delta
    \text{ else } \delta (|d| - \delta / 2)

python examples/extend/huber_penalty.py
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import huber_loss

from conservtl import Plan, Strategy
from conservtl.plan import Moving, Penalty


class HuberPenalty(Penalty):
    """Huber loss of the distance to the source. Scaling, accumulation and skipped steps are conservtl's part."""

    kind: Literal["huber_sp"] = "huber_sp"
    alpha: float
    """Strength."""
    delta: float
    """Distance at which the penalty becomes linear."""
    sums_over: ClassVar[Literal["elements"]] = "elements"  # so parameters may be sharded over processes

    def describe(self) -> str:
        """Return a line for the plan's table."""
        return f"Huber penalty of {self.alpha:g} beyond {self.delta:g} on {len(self.names)} parameters"

    def value(self, moving: Sequence[Moving]) -> torch.Tensor:
        """Return the penalty; its gradient follows by automatic differentiation."""
        losses = [huber_loss(item.parameter, item.anchor, reduction="sum", delta=self.delta) for item in moving]
        return self.alpha * torch.stack(losses).sum()


class HuberSP(Strategy):
    """Pull the weights from the source back to it, far ones no harder than near ones."""

    kind: Literal["huber_sp"] = "huber_sp"
    alpha: float = Field(default=0.1, ge=0, description="Strength.")
    delta: float = Field(default=0.05, gt=0, description="Distance at which the penalty becomes linear.")

    def apply(self, plan: Plan) -> Plan:
        """Add the penalty to the plan."""
        weights = [row for row in plan.rows if row.kind == "weight" and row.origin == "source" and not row.frozen]
        names = tuple(row.name for row in weights)
        return plan.with_penalty(HuberPenalty(by=self.label, names=names, alpha=self.alpha, delta=self.delta))


if __name__ == "__main__":
    from conservtl.testing import check_strategy

    check_strategy(HuberSP())
    print("HuberSP keeps the contract of a strategy.")
