"""The plan: rows, phases, and what else is decided. Everything that will happen, readable before it does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from pydantic import Field

from conservtl.errors import PlanError
from conservtl.layers import Layer, matches, select
from conservtl.plan.after import After, Afters
from conservtl.plan.decision import Decision
from conservtl.plan.extension import Extension, Extensions
from conservtl.plan.measure import Measure, Measures
from conservtl.plan.penalty import Penalties, Penalty
from conservtl.plan.row import COLUMNS, Anneal, Choice, Phase, Row, changed, check_row
from conservtl.plan.search import Search, Searches
from conservtl.plan.term import Term, Terms
from conservtl.plan.update import Update, Updates
from conservtl.plan.upgrade import upgrade
from conservtl.spec_model import FrozenModel

__all__ = ["COLUMNS", "Anneal", "Choice", "Phase", "Plan", "Row"]


class Plan(FrozenModel):
    """All decisions about a model, before anything is trained. ``print(plan)`` is a table by layer.

    Raises:
        PlanError: an invariant does not hold (a parameter twice, layers out of order, a phase that
            names an unknown parameter or trains nothing, a pull on a fresh parameter, two decisions of
            one name, one that names an unknown parameter or layer, ...).
    """

    rows: tuple[Row, ...]
    """One a parameter."""
    phases: tuple[Phase, ...] = Field(default_factory=lambda: (Phase(),))  # made when asked for: imports stay quick
    """What changes over time."""
    extensions: Extensions = ()
    """Modules that compute otherwise than in the source."""
    terms: Terms = ()
    """What is added to the loss."""
    updates: Updates = ()
    """What is done to weights at each step beside the gradient."""
    penalties: Penalties = ()
    """Penalties on weights."""
    measures: Measures = ()
    """What must be measured before training."""
    searches: Searches = ()
    """What is chosen before training by trying candidates."""
    after: Afters = ()
    """What is done to the weights once training is over, in order."""
    facts: dict[str, str] = Field(default_factory=dict)
    """What was found out before training, for strategies to read."""
    notes: tuple[str, ...] = ()
    """Remarks on the source: what was taken from it under which names, what was resampled, what was not used. They
    decide nothing: plans are equal whatever their notes."""

    def __init__(self, **fields: Any) -> None:
        # Checked here, not in a validator: Pydantic would wrap a PlanError in an error of its own.
        super().__init__(**upgrade(fields))
        self._check()

    def _check(self) -> None:
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PlanError(f"plan: every parameter stands in exactly one row, but {twice} stand in several.")
        if len([layer for layer, _ in groupby(self.rows, lambda row: row.layer)]) != len(self.layers):
            raise PlanError("plan: the rows of a layer must stand together.")
        if any(a.depth > b.depth for a, b in zip(self.rows, self.rows[1:], strict=False)):
            raise PlanError("plan: rows must be ordered by depth, input side first.")
        for row in self.rows:
            check_row(row)
        if not self.phases or any(phase.epochs is None for phase in self.phases[:-1]):
            raise PlanError("plan: every phase but the last needs a number of epochs.")
        self._check_decisions(set(names))
        free = {row.name for row in self.rows if not row.frozen}
        for phase in self.phases:
            if unknown := sorted(set(phase.frozen) - set(names)):
                raise PlanError(f"plan: phase {phase.name!r} freezes {unknown}, which the plan does not have.")
            if free and not free - set(phase.frozen):
                raise PlanError(
                    f"plan: phase {phase.name!r} trains nothing: all that it would train is frozen throughout "
                    "by another strategy. Unfreeze it there, or leave the phase out."
                )

    def _check_decisions(self, names: set[str]) -> None:
        everything: tuple[tuple[Decision, ...], ...] = (
            self.extensions,
            self.terms,
            self.updates,
            self.penalties,
            self.measures,
            self.searches,
            self.after,
        )
        for decisions in everything:
            seen: dict[str, Decision] = {}
            for one in decisions:
                if one.name in seen:
                    raise PlanError(
                        f"{one.by} and {seen[one.name].by} both decide {one.name!r}. Leave one of the two out."
                    )
                seen[one.name] = one
        acting: tuple[Update | Penalty, ...] = (*self.updates, *self.penalties)
        for one in acting:
            if unknown := sorted(set(one.names) - names):
                raise PlanError(f"plan: {one.by} acts on {unknown}, which the plan does not have.")
        for term in self.terms:
            if unknown := sorted(set(term.taps) - set(self.layers)):
                raise PlanError(f"plan: {term.by} taps {unknown}, which are no layers of the plan.")
        measured = {measure.name for measure in self.measures}
        reading: tuple[Term | Penalty, ...] = (*self.terms, *self.penalties)
        for reader in reading:
            if unknown := sorted(set(reader.reads) - measured):
                raise PlanError(f"plan: {reader.by} reads {unknown}, which no measure gives.")
        for column in ("pull", "decay"):
            acts: dict[str, Penalty] = {}
            for penalty in self.penalties:
                for name in penalty.names if penalty.column == column else ():
                    if name in acts:
                        raise PlanError(
                            f"{penalty.by} and {acts[name].by} both choose the {column} of {name!r} (layer "
                            f"{self[name].layer!r}). Leave one strategy out."
                        )
                    acts[name] = penalty

    @classmethod
    def draw(
        cls,
        layers: Sequence[Layer],
        shapes: Mapping[str, tuple[int, ...]],
        fresh: Mapping[str, str],
        fixed: Collection[str] = (),
        added: Collection[str] = (),
    ) -> Plan:
        """The plan before any strategy: what fits is copied, everything is trained at the full rate.

        Args:
            layers: the model's layers, input side first.
            shapes: parameter name -> shape of its source tensor, where there is one.
            fresh: parameter name -> why it must not come from the source even where it would fit.
            fixed: parameters that have no gradient (integers), and so are frozen.
            added: parameters that a strategy added to the model.
        """
        rows = []
        for number, layer in enumerate(layers):
            for info in layer.parameters:
                theirs = shapes.get(info.name)
                reason = fresh.get(info.name)
                if reason is None and theirs is None:
                    reason = "missing in the source"
                elif reason is None and theirs != info.shape:
                    reason = f"shape differs: {info.shape} here, {theirs} in the source"
                rows.append(
                    Row(
                        name=info.name,
                        layer=layer.name,
                        depth=number / max(1, len(layers) - 1),
                        shape=info.shape,
                        kind=info.kind,
                        source_shape=theirs,
                        added=info.name in added,
                        origin="source" if reason is None else "fresh",
                        reason=reason,
                        frozen=info.name in fixed,
                    )
                )
        return cls(rows=tuple(rows))

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names, input side first."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def own_layers(self) -> tuple[str, ...]:
        """Names of the layers that the model had before a strategy added any, input side first."""
        return tuple(dict.fromkeys(row.layer for row in self.rows if not row.added))

    @property
    def head(self) -> tuple[str, ...]:
        """Parameters of the last weight's module: the classifier, without the norm that joined its layer."""
        last = [row for row in self.rows if row.layer == self.layers[-1]]
        weights = [row for row in last if row.kind == "weight"]
        owner = _module((weights or last)[-1].name)
        return tuple(row.name for row in last if _module(row.name) == owner)

    @property
    def head_module(self) -> str:
        """Name of the last weight's module."""
        return _module(self.head[0])

    @property
    def fresh(self) -> tuple[str, ...]:
        """Parameters that do not come from the source."""
        return tuple(row.name for row in self.rows if row.origin == "fresh")

    @property
    def new(self) -> tuple[str, ...]:
        """What has most to learn: whatever is fresh, or else the head."""
        return self.fresh or self.head

    @property
    def trained(self) -> tuple[str, ...]:
        """Parameters trained in some phase: what the optimizer's groups partition."""
        always = set.intersection(*(set(phase.frozen) for phase in self.phases))
        return tuple(row.name for row in self.rows if not row.frozen and row.name not in always)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every decision that is neither a column of a row nor a phase."""
        return (*self.extensions, *self.terms, *self.updates, *self.measures, *self.searches, *self.after)

    def __eq__(self, other: object) -> bool:
        fields = type(self).model_fields.keys() - {"notes"}
        return isinstance(other, Plan) and all(getattr(self, name) == getattr(other, name) for name in fields)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, name: str) -> Row:
        """The row of a parameter."""
        return self._rows_by_name[name]

    @cached_property
    def _rows_by_name(self) -> dict[str, Row]:
        return {row.name: row for row in self.rows}

    @property
    def covered(self) -> Mapping[str, str]:
        """Parameters that a penalty acts on -> the strategy it is by; the optimizer's weight decay is 0 on them."""
        return self._covered

    @cached_property
    def _covered(self) -> dict[str, str]:
        return {name: penalty.by for penalty in reversed(self.penalties) for name in penalty.names}

    def strength_of(self, name: str, mode: Literal["coupled", "decoupled"]) -> float:
        """Return the largest strength of the penalties of a mode on a parameter; 0 if there is none."""
        acting = [one for one in self.penalties if one.mode == mode and name in one.names]
        return max((one.strength_on(self[name]) or 0.0 for one in acting), default=0.0)

    def select(self, globs: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Glob -> the parameters it means: those of the layers it matches, or else parameters by name.

        Raises:
            SelectorError: a glob matches neither; the message names it and the nearest names.
        """
        layers = {glob: [name for name in self.layers if matches(glob, name)] for glob in globs}
        others = select([glob for glob in globs if not layers[glob]], [row.name for row in self.rows])
        return {
            glob: others.get(glob, tuple(row.name for row in self.rows if row.layer in layers[glob])) for glob in globs
        }

    def by_layer(self) -> Iterator[tuple[str, tuple[Row, ...]]]:
        """Layers with their rows, input side first."""
        for layer, rows in groupby(self.rows, lambda row: row.layer):
            yield layer, tuple(rows)

    def frozen_in(self, phase: int) -> frozenset[str]:
        """Names of the parameters that are not trained in this phase."""
        return frozenset(self.phases[phase].frozen) | {row.name for row in self.rows if row.frozen}

    def choose(self, by: str, column: str, values: dict[str, dict[str, Any]], *, explicit: bool = True) -> Plan:
        """A plan in which one strategy has filled in one column.

        An explicit choice (the strategy named the row) wins over one given to everything, whichever
        came first; two of the same standing for the same row and column are refused.

        Args:
            by: name of the strategy.
            column: the decision, one of ``COLUMNS``.
            values: parameter name -> fields of the row to set, all of that column; others of it return to
                their defaults.
            explicit: whether the strategy named these rows, or means everything.

        Raises:
            PlanError: another strategy has chosen this already, and both are named; or a value is none that
                a row can hold.
        """
        known = {row.name for row in self.rows}
        for name, fields in values.items():
            if name not in known or not fields.keys() <= set(COLUMNS.get(column, ())):
                raise PlanError(
                    f"{by} chooses the {column} of {name!r} as {fields}. It must name a parameter of the plan, a "
                    f"column of {tuple(COLUMNS)} and fields of that column {COLUMNS.get(column, ())}."
                )
        new = Choice(by=by, explicit=explicit)
        defaults: dict[str, Any] = {field: Row.model_fields[field].default for field in COLUMNS.get(column, ())}
        rows = []
        for row in self.rows:
            old = row.chosen.get(column)
            chosen = values.get(row.name)
            if chosen is None or (old is not None and old.explicit and not explicit):
                rows.append(row)
                continue
            if old is not None and old.explicit == explicit:
                same = all(getattr(row, field) == value for field, value in {**defaults, **chosen}.items())
                if explicit or not same:
                    raise PlanError(
                        f"{by} and {old.by} both choose the {column} of {row.name!r} (layer {row.layer!r}). "
                        f"{'Name each parameter in one of them only, or l' if explicit else 'L'}eave one strategy out."
                    )
            rows.append(changed(row, by, {**defaults, **chosen, "chosen": {**row.chosen, column: new}}))
        return self._with(rows=tuple(rows))

    def with_phases(self, by: str, phases: Sequence[Phase]) -> Plan:
        """The same rows in other phases.

        Raises:
            PlanError: another strategy has set phases already.
        """
        if self.phases != (Phase(),):
            raise PlanError(f"{by} sets phases, but another strategy has set {[p.name for p in self.phases]}.")
        return self._with(phases=tuple(phases))

    def with_extension(self, extension: Extension) -> Plan:
        """The plan with modules that compute otherwise.

        Raises:
            PlanError: there is one of its name.
        """
        return self._with(extensions=(*self.extensions, extension))

    def with_term(self, term: Term) -> Plan:
        """The plan with one more part of the loss.

        Raises:
            PlanError: there is one of its name, or it taps what is no layer.
        """
        return self._with(terms=(*self.terms, term))

    def with_update(self, update: Update) -> Plan:
        """The plan with one more update of the weights.

        Raises:
            PlanError: there is one of its name, or it names what is no parameter.
        """
        return self._with(updates=(*self.updates, update))

    def with_penalty(self, penalty: Penalty, *, replace: bool = False) -> Plan:
        """Return the plan with one more penalty on weights.

        Args:
            penalty: to add.
            replace: whether it takes the place of the one of its name.

        Raises:
            PlanError: there is one of its name, or of its column on the same rows; it names an unknown parameter, or
                reads a measurement that the plan does not make.
        """
        if replace:
            return self._with(penalties=tuple(penalty if one.name == penalty.name else one for one in self.penalties))
        return self._with(penalties=(*self.penalties, penalty))

    def with_measure(self, measure: Measure) -> Plan:
        """The plan with one more thing to measure before training.

        Raises:
            PlanError: there is one of its name.
        """
        return self._with(measures=(*self.measures, measure))

    def with_search(self, search: Search) -> Plan:
        """The plan with one more choice to make before training by trying candidates.

        Raises:
            PlanError: there is one of its name.
        """
        return self._with(searches=(*self.searches, search))

    def with_after(self, after: After) -> Plan:
        """The plan with one more thing to do once training is over.

        Raises:
            PlanError: there is one of its name.
        """
        return self._with(after=(*self.after, after))

    def with_facts(self, facts: Mapping[str, str]) -> Plan:
        """The plan with what was found out before training; a new fact replaces an old one of its name."""
        return self._with(facts={**self.facts, **facts})

    def with_notes(self, notes: Iterable[str]) -> Plan:
        """The plan with remarks on the source, in place of those it had."""
        return self._with(notes=tuple(notes))

    def _with(self, **changes: Any) -> Plan:
        """The same plan but for these fields, invariants checked."""
        return Plan(**{**dict(self), **changes})

    def totals(self) -> dict[str, int]:
        """Numbers of elements: all, trained, frozen, copied, fresh."""
        trained = set(self.trained)
        return {
            "all": sum(row.size for row in self.rows),
            "trained": sum(row.size for row in self.rows if row.name in trained),
            "frozen": sum(row.size for row in self.rows if row.name not in trained),
            "copied": sum(row.size for row in self.rows if row.origin == "source"),
            "fresh": sum(row.size for row in self.rows if row.origin == "fresh"),
        }

    def __str__(self) -> str:
        from conservtl.plan.table import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from conservtl.plan.table import as_rich

        return as_rich(self)


def _module(name: str) -> str:
    """The module that owns a parameter, also where it is parametrised."""
    return name.rpartition(".parametrizations.")[0] or name.rpartition(".")[0]
