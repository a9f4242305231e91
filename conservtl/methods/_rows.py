"""Choices of rows that several methods share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from conservtl.layers import matches
from conservtl.layers.names import owner
from conservtl.plan.plan import Plan
from conservtl.plan.row import Row

__all__ = [
    "Coverage",
    "changed_layers",
    "covered_rows",
    "freeze_all_but",
    "fresh_rows",
    "names_something",
    "source_parameters",
    "train_added",
    "train_named",
]

Coverage = Literal["weights", "all"]
"""weights: parameters of two dimensions or more that no norm owns. all: biases and norms too."""


def changed_layers(plan: Plan) -> frozenset[str]:
    """Return the layers that change by factors of low rank, while their weights from the source are frozen."""
    return frozenset(plan[name].layer for name in plan.factors)


def covered_rows(plan: Plan, on: Coverage) -> tuple[Row, ...]:
    """Return the rows that a coverage includes, whatever their origin, frozen or not."""
    return tuple(row for row in plan.rows if on == "all" or row.kind == "weight")


def fresh_rows(plan: Plan, on: Coverage) -> tuple[Row, ...]:
    """Return the covered rows of ``plan.fresh``: those with values that do not come from the source."""
    return tuple(row for row in covered_rows(plan, on) if row.fresh and row.name not in plan.factors)


def source_parameters(plan: Plan, on: Coverage) -> tuple[str, ...]:
    """Return the parameters from the source that are not frozen throughout."""
    return tuple(row.name for row in covered_rows(plan, on) if row.origin == "source" and not row.frozen)


def freeze_all_but(plan: Plan, by: str, free: Collection[str]) -> Plan:
    """Return the plan with everything frozen except these parameters; one that has no gradient stays frozen.

    Factors of low rank stay as they are: they are the way in which frozen weights change.
    """
    rows = [row for row in plan.rows if ("frozen" in row.chosen or not row.frozen) and row.name not in plan.factors]
    return plan.choose(by, "frozen", {row.name: {"frozen": row.name not in free} for row in rows}, explicit=False)


def names_something(glob: str) -> bool:
    """Return whether a glob names parameters or layers, and does not mean everything as ``*`` does."""
    return bool(glob.strip("*?."))


def train_added(plan: Plan, by: str, globs: Iterable[str] | None, names: Iterable[str]) -> Plan:
    """Return the plan in which parameters that a strategy added are trained where its globs name a frozen part."""
    telling = [glob for glob in globs or () if names_something(glob)]
    return train_named(
        plan,
        by,
        (
            name
            for name in names
            if any(matches(glob, one) for glob in telling for one in (plan[name].layer, owner(name)))
        ),
    )


def train_named(plan: Plan, by: str, names: Iterable[str]) -> Plan:
    """Return the plan in which these parameters are trained although they were frozen when the model was handed in.

    Those that another strategy decides about by name stay as they are, and so do parameters without a gradient, and
    weights of a layer with factors of low rank, which are trained in their place.
    """
    rows = [plan[name] for name in dict.fromkeys(names) if plan[name].found == "frozen"]
    by_factors = changed_layers(plan)
    free = [
        row.name
        for row in rows
        if (row.layer not in by_factors or row.name in plan.factors)
        and ("frozen" not in row.chosen or not row.chosen["frozen"].explicit)
    ]
    return plan.choose(by, "frozen", {name: {"frozen": False} for name in free})
