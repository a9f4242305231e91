"""Feature extraction: the source model as it is, a new head on top."""

from __future__ import annotations

from typing import ClassVar, Literal

from conservtl.plan import Plan
from conservtl.strategies.base import Order, Strategy

__all__ = ["FeatureExtraction"]


class FeatureExtraction(Strategy):
    """Freeze everything and train a new head.

    The head is the classifier: fresh already where its labels or its shape differ, and made fresh
    where it would fit. Whatever else is fresh is trained with it; the norm before it stays the
    source's. The frozen body's features are computed once and reused by ``fit`` where nothing random
    stands before them (no augmentation, no active dropout).

    Reference:
        Donahue et al. 2014, "DeCAF"; Sharif Razavian et al. 2014, "CNN features off-the-shelf".
    """

    kind: Literal["feature_extraction"] = "feature_extraction"
    order: ClassVar[Order] = Order.HEAD

    def apply(self, plan: Plan) -> Plan:
        """Freeze the body; the head is fresh and trained."""
        made = [name for name in plan.head if name not in plan.fresh]
        plan = plan.choose(self.label, "origin", {n: {"origin": "fresh", "reason": "not asked for"} for n in made})
        body = {row.name: {"frozen": True} for row in plan.rows if row.origin == "source"}
        plan = plan.choose(self.label, "frozen", body, explicit=False)
        return plan.choose(self.label, "frozen", {name: {"frozen": False} for name in plan.fresh})
