"""Invariants of a plan: a plan that breaks one cannot be made."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from conservtl.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conservtl.plan.decision import Decision
    from conservtl.plan.penalty import Penalty
    from conservtl.plan.plan import Plan
    from conservtl.plan.row import Row
    from conservtl.plan.term import Term
    from conservtl.plan.update import Update

__all__ = ["check_plan"]


def check_plan(plan: Plan) -> None:
    """Raise a ``PlanError`` unless the rows, phases and decisions of a plan go together."""
    _check_rows(plan)
    _check_phases(plan)
    groups: tuple[Sequence[Decision], ...] = (
        plan.extensions,
        plan.terms,
        plan.updates,
        plan.penalties,
        plan.measures,
        plan.searches,
        plan.after,
    )
    for decisions in groups:
        _check_names(decisions)
    _check_references(plan)
    for column in ("pull", "decay"):
        _check_column(plan, column)


def _check_rows(plan: Plan) -> None:
    names = [row.name for row in plan.rows]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise PlanError(f"plan: every parameter stands in exactly one row, but {twice} stand in several.")
    if len([layer for layer, _ in groupby(plan.rows, lambda row: row.layer)]) != len(plan.layers):
        raise PlanError("plan: the rows of a layer must stand together.")
    if any(a.depth > b.depth for a, b in zip(plan.rows, plan.rows[1:], strict=False)):
        raise PlanError("plan: rows must be ordered by depth, input side first.")
    for row in plan.rows:
        _check_row(row)


def _check_row(row: Row) -> None:
    if (row.origin == "fresh") != (row.reason is not None):
        raise PlanError(f"plan: {row.name!r} is {row.origin} with reason {row.reason!r}; only fresh rows have one.")
    if row.origin == "fresh" and row.pull is not None:
        raise PlanError(f"plan: {row.name!r} is fresh, so there is no source value to pull it to.")
    if not row.fresh and row.decay is not None:
        raise PlanError(f"plan: {row.name!r} comes from the source; beta acts on fresh parameters only.")
    if row.source_rows is not None:
        _check_source_rows(row)
    elif row.origin == "source" and row.source_shape != row.shape:
        raise PlanError(f"plan: {row.name!r} has shape {row.shape}, its source {row.source_shape}.")


def _check_source_rows(row: Row) -> None:
    rows, source = row.source_rows or (), row.source_shape or ()
    known = [place for place in rows if place is not None]
    if row.origin != "source" or not known:
        raise PlanError(f"plan: {row.name!r} is {row.origin}, and {len(known)} of its rows are copied from the source.")
    if (
        (len(rows), *source[1:]) != row.shape
        or len(set(known)) != len(known)
        or not set(known) <= set(range(source[0]))
    ):
        raise PlanError(
            f"plan: {row.name!r} of shape {row.shape} must copy each row from one of its source of shape {source}; "
            f"received {rows}."
        )


def _check_phases(plan: Plan) -> None:
    if not plan.phases or any(phase.epochs is None for phase in plan.phases[:-1]):
        raise PlanError("plan: every phase but the last needs a number of epochs.")
    free = {row.name for row in plan.rows if not row.frozen}
    for phase in plan.phases:
        if unknown := sorted(set(phase.frozen) - {row.name for row in plan.rows}):
            raise PlanError(f"plan: phase {phase.name!r} freezes {unknown}, which the plan does not have.")
        if free and not free - set(phase.frozen):
            raise PlanError(
                f"plan: phase {phase.name!r} trains nothing: another strategy freezes throughout what this phase would "
                "train, or it was frozen when the model was handed in. Unfreeze it there, or leave the phase out."
            )


def _check_names(decisions: Sequence[Decision]) -> None:
    """Raise if two decisions of one kind have the same name."""
    seen: dict[str, Decision] = {}
    for decision in decisions:
        if decision.name in seen:
            first = seen[decision.name].by
            raise PlanError(f"{decision.by} and {first} both decide {decision.name!r}. Leave one of the two out.")
        seen[decision.name] = decision


def _check_references(plan: Plan) -> None:
    """Raise if a decision names a parameter, layer or measurement that the plan does not have."""
    names = {row.name for row in plan.rows}
    acting: tuple[Update | Penalty, ...] = (*plan.updates, *plan.penalties)
    for actor in acting:
        if unknown := sorted(set(actor.names) - names):
            raise PlanError(f"plan: {actor.by} acts on {unknown}, which the plan does not have.")
    for term in plan.terms:
        if unknown := sorted(set(term.taps) - set(plan.layers)):
            raise PlanError(f"plan: {term.by} taps {unknown}, which are no layers of the plan.")
    measured = {measure.name for measure in plan.measures}
    reading: tuple[Term | Penalty, ...] = (*plan.terms, *plan.penalties)
    for reader in reading:
        if unknown := sorted(set(reader.reads) - measured):
            raise PlanError(f"plan: {reader.by} reads {unknown}, which no measure gives.")


def _check_column(plan: Plan, column: str) -> None:
    """Raise if two penalties take their strength on a row from one column."""
    acting: dict[str, Penalty] = {}
    for penalty in plan.penalties:
        for name in penalty.names if penalty.column == column else ():
            if name in acting:
                raise PlanError(
                    f"{penalty.by} and {acting[name].by} both choose the {column} of {name!r} (layer "
                    f"{plan[name].layer!r}). Leave one strategy out."
                )
            acting[name] = penalty
