"""The factors of a LoRA of PEFT in a plan: each pair is recorded with the weight that it changes."""

from __future__ import annotations

from typing import ClassVar, Literal

from conservtl.methods.base import Strategy, TestFields
from conservtl.plan.plan import Plan
from conservtl.plan.row import LowRank

__all__ = ["AdapterFactors"]


class AdapterFactors(Strategy):
    """Record which weights the factors of an adapter change; ``conservtl.integrations.peft.adapt`` puts it in a plan.

    All strategies then take a factor as a part of its weight, and ``L2SP`` pulls the merged weights.
    """

    kind: Literal["adapter_factors"] = "adapter_factors"
    test_fields: ClassVar[TestFields] = ({"changes": {}},)
    changes: dict[str, LowRank]
    """Factor B -> the change that it is a part of."""

    def apply(self, plan: Plan) -> Plan:
        """Return the plan: the factors are recorded already."""
        return plan

    def record(self, plan: Plan) -> Plan:
        """Record the weight of each pair under the name that the plan has for it."""
        names = {name: row.name for row in plan.rows for name in (row.name, *row.aliases)}
        changes = {
            b: {"low_rank": {**dict(change), "weight": names[change.weight]}} for b, change in self.changes.items()
        }
        return plan.choose(self.label, "low_rank", changes)
