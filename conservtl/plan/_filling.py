"""Filling in a plan: each method returns the plan with one decision more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from conservtl.errors import PlanError, SpecError
from conservtl.plan._fields import PlanFields
from conservtl.plan.decision import After, Extension, Measure, Search
from conservtl.plan.penalty import Penalty
from conservtl.plan.row import COLUMNS, Choice, Phase, Row, changed
from conservtl.plan.term import Term
from conservtl.plan.update import Update

__all__ = ["FillablePlan"]


class FillablePlan(PlanFields):
    """A plan that strategies fill in.

    Each method returns a new plan and checks it: one with two decisions of a name, or with a decision that names what
    the plan lacks, raises ``PlanError``.
    """

    def choose(self, by: str, column: str, values: dict[str, dict[str, Any]], *, explicit: bool = True) -> Self:
        """Return the plan with one column filled in by a strategy.

        An explicit choice (the strategy names the row) wins over one for everything, whichever comes first. Two
        explicit choices for the same row and column are refused; two for everything must agree. Parameters that were
        frozen when the model was handed in are trained by an explicit choice alone.

        Args:
            by: name of the strategy.
            column: one of ``COLUMNS``.
            values: parameter name -> fields of that column to set; its other fields return to their defaults.
            explicit: whether the strategy names these rows, or means everything.

        Raises:
            PlanError: another strategy has chosen the column, and both are named; or a row cannot hold a value.
        """
        known = {row.name for row in self.rows}
        for name, fields in values.items():
            if name not in known or not fields.keys() <= set(COLUMNS.get(column, ())):
                raise PlanError(
                    f"{by} chooses the {column} of {name!r} as {dict(fields)}. It must name a parameter of the plan, a "
                    f"column of {tuple(COLUMNS)} and fields of that column {COLUMNS.get(column, ())}."
                )
        choice = Choice(by=by, explicit=explicit)
        defaults = {field: Row.model_fields[field].default for field in COLUMNS.get(column, ())}
        filled = []
        for row in self.rows:
            earlier, chosen = row.chosen.get(column), values.get(row.name)
            overruled = earlier is not None and earlier.explicit and not explicit
            if chosen is None or overruled or _stays_frozen(row, chosen, explicit=explicit):
                filled.append(row)
                continue
            fields = {**defaults, **chosen}
            if fields.get("origin") == "fresh":
                fields["source_rows"] = None
            if earlier is not None and earlier.explicit == explicit:
                agree = all(getattr(row, field) == value for field, value in fields.items())
                if explicit or not agree:
                    raise PlanError(
                        f"{by} and {earlier.by} both choose the {column} of {row.name!r} (layer {row.layer!r}). "
                        f"{'Name each parameter in one of them only, or l' if explicit else 'L'}eave one strategy out."
                    )
            filled.append(changed(row, by, {**fields, "chosen": {**row.chosen, column: choice}}))
        return self._with(rows=tuple(filled))

    def with_source_rows(self, numbers: Mapping[str, Sequence[int | None]]) -> Self:
        """Return the plan in which parameters are copied row by row, before any strategy.

        Args:
            numbers: parameter name -> its ``source_rows``.

        Raises:
            PlanError: they do not fit the shapes of a parameter and its source.
        """
        changes = {name: {"origin": "source", "reason": None, "source_rows": rows} for name, rows in numbers.items()}
        return self._with(
            rows=tuple(changed(row, "labels", changes[row.name]) if row.name in changes else row for row in self.rows)
        )

    def with_phases(self, by: str, phases: Sequence[Phase]) -> Self:
        """Return the plan with phases.

        Raises:
            PlanError: another strategy has set phases already.
        """
        if self.phases != (Phase(),):
            raise PlanError(f"{by} sets phases, but another strategy has set {[p.name for p in self.phases]}.")
        return self._with(phases=tuple(phases))

    def with_extension(self, extension: Extension) -> Self:
        """Return the plan with one more extension of its modules."""
        return self._with(extensions=(*self.extensions, extension))

    def with_term(self, term: Term) -> Self:
        """Return the plan with one more part of the loss."""
        return self._with(terms=(*self.terms, term))

    def with_update(self, update: Update) -> Self:
        """Return the plan with one more update of the weights."""
        return self._with(updates=(*self.updates, update))

    def with_penalty(self, penalty: Penalty, *, replace: bool = False) -> Self:
        """Return the plan with one more penalty on weights, or with ``replace`` this one for that of its name.

        Two penalties of one column on the same rows are refused.
        """
        if replace:
            return self._with(penalties=tuple(penalty if one.name == penalty.name else one for one in self.penalties))
        return self._with(penalties=(*self.penalties, penalty))

    def with_measure(self, measure: Measure) -> Self:
        """Return the plan with one more measurement before training."""
        return self._with(measures=(*self.measures, measure))

    def with_search(self, search: Search) -> Self:
        """Return the plan with one more choice to make before training by trying candidates."""
        return self._with(searches=(*self.searches, search))

    def with_after(self, after: After) -> Self:
        """Return the plan with one more change of the weights once training is over."""
        return self._with(after=(*self.after, after))

    def with_facts(self, facts: Mapping[str, str]) -> Self:
        """Return the plan with results found before training; a new fact replaces an old one of its name."""
        return self._with(facts={**self.facts, **facts})

    def with_proxies(self, proxies: bool) -> Self:
        """Return the plan of a run whose comparisons with the source are made on changed copies of the inputs, or not.

        Raises:
            SpecError: no term compares with the source.
        """
        if proxies and not any(term.source for term in self.terms):
            raise SpecError(
                "proxies are inputs on which strategies compare the model with the source, and no strategy here does. "
                "Add OutputConservation or FeatureConservation, or leave proxies out."
            )
        return self if proxies == self.proxies else self._with(proxies=proxies)

    def with_notes(self, notes: Iterable[str]) -> Self:
        """Return the plan with these remarks on the source instead of those it had."""
        return self._with(notes=tuple(notes))


def _stays_frozen(row: Row, chosen: Mapping[str, Any], *, explicit: bool) -> bool:
    """Return whether a row stays frozen, as it was found, although a strategy would train it."""
    trains = chosen.get("frozen", True) is False and row.frozen
    return trains and (row.found == "fixed" or (row.found == "frozen" and not explicit))
