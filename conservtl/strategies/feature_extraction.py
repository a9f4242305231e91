"""Feature extraction: the source model as it is, a new head on top."""

from __future__ import annotations

from typing import ClassVar, Literal

from conservtl.plan import Plan
from conservtl.strategies.base import Order, Strategy

__all__ = ["FeatureExtraction"]


class FeatureExtraction(Strategy):
    """Freeze everything and train a new head.

    The head is whatever is fresh (other labels, another shape), or else the last layer, which is
    then made fresh. The frozen body's features are computed once and reused by ``fit`` where nothing
    random stands before them (no augmentation, no active dropout).

    Reference:
        Donahue et al. 2014, "DeCAF"; Sharif Razavian et al. 2014, "CNN features off-the-shelf".
    """

    kind: Literal["feature_extraction"] = "feature_extraction"
    order: ClassVar[Order] = Order.HEAD

    def apply(self, plan: Plan) -> Plan:
        """Freeze the body; the head is fresh and trained."""
        head = plan.head
        inside = {row.name: row for row in plan.rows if row.layer in head}
        body = {row.name: {"frozen": True} for row in plan.rows if row.name not in inside}
        made = {name: {"origin": "fresh", "reason": "not asked for"} for name, row in inside.items() if not row.reason}
        plan = plan.choose(self.label, "frozen", body, explicit=False)
        plan = plan.choose(self.label, "frozen", {name: {"frozen": False} for name in inside})
        return plan.choose(self.label, "origin", made)
