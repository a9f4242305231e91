"""Choices of rows that several methods share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from conservtl.plan.plan import Plan

__all__ = ["Coverage", "freeze_all_but", "source_parameters"]

Coverage = Literal["weights", "all"]
"""weights: parameters of two dimensions or more that no norm owns. all: biases and norms too."""


def source_parameters(plan: Plan, on: Coverage) -> tuple[str, ...]:
    """Return the parameters from the source that are not frozen throughout."""
    rows = (row for row in plan.rows if row.origin == "source" and not row.frozen)
    return tuple(row.name for row in rows if on == "all" or row.kind == "weight")


def freeze_all_but(plan: Plan, by: str, free: Collection[str]) -> Plan:
    """Return the plan with everything frozen except these parameters; one that has no gradient stays frozen."""
    rows = [row for row in plan.rows if "frozen" in row.chosen or not row.frozen]
    return plan.choose(by, "frozen", {row.name: {"frozen": row.name not in free} for row in rows}, explicit=False)
