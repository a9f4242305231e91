"""The plan: rows, phases and all other decisions, readable before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from pydantic import Field

from conservtl.errors import PlanError, SpecError
from conservtl.layers import Layer, matches, select
from conservtl.layers.names import owner
from conservtl.plan.after import After, Afters
from conservtl.plan.decision import Decision
from conservtl.plan.extension import Extension, Extensions
from conservtl.plan.invariants import check_plan
from conservtl.plan.measure import Measure, Measures
from conservtl.plan.penalty import Penalties, Penalty
from conservtl.plan.row import COLUMNS, Anneal, Choice, Phase, Row, changed
from conservtl.plan.rows import draw_rows, fill_column
from conservtl.plan.search import Search, Searches
from conservtl.plan.term import Term, Terms
from conservtl.plan.update import Update, Updates
from conservtl.plan.upgrade import upgrade
from conservtl.spec_model import FrozenModel

__all__ = ["COLUMNS", "Anneal", "Choice", "Phase", "Plan", "Row"]


class Plan(FrozenModel):
    """All decisions about a model, before anything is trained. ``print(plan)`` is a table by layer.

    Raises:
        PlanError: an invariant does not hold: a parameter stands in two rows, layers are out of order, a phase names an
            unknown parameter or trains nothing, a fresh parameter has a pull, two decisions have the same name, a
            decision names an unknown parameter or layer, ...
    """

    rows: tuple[Row, ...]
    """One row a parameter."""
    phases: tuple[Phase, ...] = Field(default_factory=lambda: (Phase(),))  # built when needed: imports stay quick
    """Stretches of training, in order."""
    extensions: Extensions = ()
    """Modules that compute something else than in the source."""
    terms: Terms = ()
    """Parts added to the loss."""
    updates: Updates = ()
    """Changes of weights or gradients at each step."""
    penalties: Penalties = ()
    """Penalties on weights."""
    measures: Measures = ()
    """Measurements made before training."""
    searches: Searches = ()
    """Choices made before training by trying candidates."""
    after: Afters = ()
    """Changes of the weights once training is over, in order."""
    facts: dict[str, str] = Field(default_factory=dict)
    """Results found before training, for strategies to read."""
    notes: tuple[str, ...] = ()
    """Remarks on the source: names under which tensors were taken, tensors that were resampled or not used.
    Those on the data begin with ``data: ``. They decide nothing: plans are equal whatever their notes."""
    heads: tuple[str, ...] = ()
    """Modules of the head, if it was named, asked of the model or found by running it."""
    head_candidates: tuple[str, ...] = ()
    """Modules that may be the head, if several remain possible: what needs the head is then refused."""
    outputs: tuple[str, ...] = ()
    """Modules that compute the model's outputs, if there are several and none is named as the scores."""

    def __init__(self, **fields: Any) -> None:
        # Checked here, not in a validator: Pydantic would wrap a PlanError in an error of its own.
        super().__init__(**upgrade(fields))
        check_plan(self)

    @classmethod
    def draw(
        cls,
        layers: Sequence[Layer],
        shapes: Mapping[str, tuple[int, ...]],
        fresh: Mapping[str, str],
        fixed: Collection[str] = (),
        added: Collection[str] = (),
        frozen: Collection[str] = (),
    ) -> Plan:
        """Return the plan before any strategy: what fits is copied, everything is trained at the full rate.

        Args:
            layers: the model's layers, input side first.
            shapes: parameter name -> shape of its source tensor, if there is one.
            fresh: parameter name -> reason not to copy it even if it fits.
            fixed: parameters without a gradient (integers), which are frozen.
            added: parameters that a strategy added to the model.
            frozen: parameters that asked for no gradient when the model was handed in, and so are frozen.
        """
        infos = [info for layer in layers for info in layer.parameters]
        return cls(
            rows=draw_rows(layers, shapes, fresh, fixed, added, frozen),
            heads=tuple(dict.fromkeys(info.head for info in infos if info.head is not None)),
            head_candidates=tuple(dict.fromkeys(info.candidate for info in infos if info.candidate is not None)),
            outputs=tuple(dict.fromkeys(info.output for info in infos if info.output is not None)),
        )

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
        """Parameters of the head's modules: the classifier, without the norm that joined its layer.

        Raises:
            SpecError: several modules may be the head.
        """
        modules = set(self.head_modules)
        return tuple(row.name for row in self.rows if modules & set(_owners(row)))

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Names of the head's modules; of the last weight's module if the head was not told.

        Raises:
            SpecError: several modules may be the head.
        """
        if self.heads:
            return self.heads
        if self.head_candidates:
            raise SpecError(
                f"head: it must be known which module is the head; {list(self.head_candidates)} may be, each computing "
                f"an output. Name it (or them): adapt(..., head=[{self.head_candidates[0]!r}]), in a spec model.head. "
                "Without an example, adapt(..., example=...) may tell it."
            )
        last = [row for row in self.rows if row.layer == self.layers[-1]]
        weights = [row for row in last if row.kind == "weight"]
        return (owner((weights or last)[-1].name),)

    @property
    def source_rows(self) -> tuple[int | None, ...] | None:
        """For each output, that of the source with its label, if a head is copied by label; else None."""
        return next((row.source_rows for row in self.rows if row.source_rows is not None), None)

    @property
    def head_module(self) -> str:
        """Name of the head's module.

        Raises:
            SpecError: the head has several modules, or several may be the head.
        """
        if len(self.head_modules) > 1:
            raise SpecError(
                f"head: one module is needed here; the head is {list(self.head_modules)}. Name one of them."
            )
        return self.head_modules[0]

    @property
    def possible_head(self) -> frozenset[str]:
        """Parameters of all modules that may be the head."""
        modules = set(self.head_candidates if not self.heads and self.head_candidates else self.head_modules)
        return frozenset(row.name for row in self.rows if modules & set(_owners(row)))

    @property
    def tied_head(self) -> tuple[str, ...]:
        """Parameters of the head that a module outside it holds too: an embedding, of a language model."""
        modules = set(self.head_modules)
        return tuple(name for name in self.head if set(_owners(self[name])) - modules)

    @property
    def fresh(self) -> tuple[str, ...]:
        """Parameters that do not come from the source, or have rows that do not."""
        return tuple(row.name for row in self.rows if row.fresh)

    @property
    def new(self) -> tuple[str, ...]:
        """Parameters with most to learn: the fresh ones, but for those frozen as found, or else the head."""
        return tuple(name for name in self.fresh if not self[name].as_found) or self.head

    @property
    def trained(self) -> tuple[str, ...]:
        """Parameters trained in some phase; the optimizer's groups partition them."""
        always = set.intersection(*(set(phase.frozen) for phase in self.phases))
        return tuple(row.name for row in self.rows if not row.frozen and row.name not in always)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every decision that is neither a column of a row nor a phase."""
        return (
            *self.extensions,
            *self.terms,
            *self.updates,
            *self.penalties,
            *self.measures,
            *self.searches,
            *self.after,
        )

    def __eq__(self, other: object) -> bool:
        fields = type(self).model_fields.keys() - {"notes", "heads", "head_candidates", "outputs"}
        return isinstance(other, Plan) and all(getattr(self, name) == getattr(other, name) for name in fields)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, name: str) -> Row:
        """Return the row of a parameter."""
        return self._rows_by_name[name]

    def __contains__(self, name: str) -> bool:
        """Whether the plan has a row for a parameter."""
        return name in self._rows_by_name

    @cached_property
    def _rows_by_name(self) -> dict[str, Row]:
        return {row.name: row for row in self.rows}

    def penalties_on(self, name: str) -> tuple[Penalty, ...]:
        """Return the penalties that act on a parameter."""
        return self._penalties_by_name.get(name, ())

    @cached_property
    def _penalties_by_name(self) -> dict[str, tuple[Penalty, ...]]:
        by_name: dict[str, tuple[Penalty, ...]] = {}
        for penalty in self.penalties:
            for name in penalty.names:
                by_name[name] = (*by_name.get(name, ()), penalty)
        return by_name

    @property
    def covered(self) -> dict[str, str]:
        """Parameter on which penalties act -> the strategy of the first; the optimizer's weight decay is 0 on these."""
        return {name: penalties[0].by for name, penalties in self._penalties_by_name.items()}

    def strength_of(self, name: str, mode: Literal["coupled", "decoupled"]) -> float:
        """Return the largest strength of the penalties of a mode on a parameter; 0 if there is none."""
        acting = [penalty for penalty in self.penalties_on(name) if penalty.mode == mode]
        return max((penalty.strength_on(self[name]) or 0.0 for penalty in acting), default=0.0)

    def select(self, globs: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return glob -> parameters: those of the layers it matches, or else those whose names it matches.

        Raises:
            SelectorError: a glob matches neither; the message names it and the nearest names.
        """
        layers = {glob: [name for name in self.layers if matches(glob, name)] for glob in globs}
        aliases = {row.name: row.aliases for row in self.rows}
        others = select([glob for glob in globs if not layers[glob]], [row.name for row in self.rows], aliases=aliases)
        return {
            glob: others.get(glob, tuple(row.name for row in self.rows if row.layer in layers[glob])) for glob in globs
        }

    def select_layers(self, globs: Sequence[str], among: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
        """Return glob -> layers that it matches, or else those that hold a tied parameter of which it matches an alias.

        Args:
            globs: of layers.
            among: layers to select from; None: all.

        Raises:
            SelectorError: a glob matches no layer; the message names it and the nearest names.
        """
        names = self.layers if among is None else tuple(among)
        aliases: dict[str, tuple[str, ...]] = {}
        for row in self.rows:
            aliases[row.layer] = (*aliases.get(row.layer, ()), *row.aliases)
        direct = [glob for glob in globs if any(matches(glob, name) for name in names)]
        chosen = select(direct, names, "layer") | select(
            [glob for glob in globs if glob not in direct], names, "layer", aliases
        )
        return {glob: chosen[glob] for glob in globs}

    def by_layer(self) -> Iterator[tuple[str, tuple[Row, ...]]]:
        """Yield layers with their rows, input side first."""
        for layer, rows in groupby(self.rows, lambda row: row.layer):
            yield layer, tuple(rows)

    def frozen_in(self, phase: int) -> frozenset[str]:
        """Return the parameters that a phase does not train."""
        return frozenset(self.phases[phase].frozen) | {row.name for row in self.rows if row.frozen}

    def choose(self, by: str, column: str, values: dict[str, dict[str, Any]], *, explicit: bool = True) -> Plan:
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
        return self._with(rows=fill_column(self.rows, by, column, values, explicit=explicit))

    def with_source_rows(self, numbers: Mapping[str, Sequence[int | None]]) -> Plan:
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

    def with_phases(self, by: str, phases: Sequence[Phase]) -> Plan:
        """Return the plan with phases.

        Raises:
            PlanError: another strategy has set phases already.
        """
        if self.phases != (Phase(),):
            raise PlanError(f"{by} sets phases, but another strategy has set {[p.name for p in self.phases]}.")
        return self._with(phases=tuple(phases))

    def with_extension(self, extension: Extension) -> Plan:
        """Return the plan with one more extension of its modules.

        Raises:
            PlanError: the plan has an extension of its name.
        """
        return self._with(extensions=(*self.extensions, extension))

    def with_term(self, term: Term) -> Plan:
        """Return the plan with one more part of the loss.

        Raises:
            PlanError: the plan has a term of its name, or lacks a layer that it taps.
        """
        return self._with(terms=(*self.terms, term))

    def with_update(self, update: Update) -> Plan:
        """Return the plan with one more update of the weights.

        Raises:
            PlanError: the plan has an update of its name, or lacks a parameter that it names.
        """
        return self._with(updates=(*self.updates, update))

    def with_penalty(self, penalty: Penalty, *, replace: bool = False) -> Plan:
        """Return the plan with one more penalty on weights.

        Args:
            penalty: to add.
            replace: whether it replaces the penalty of its name.

        Raises:
            PlanError: the plan has a penalty of its name, or one of its column on the same rows; or it lacks a
                parameter that the penalty names or a measurement that the penalty reads.
        """
        if replace:
            return self._with(penalties=tuple(penalty if one.name == penalty.name else one for one in self.penalties))
        return self._with(penalties=(*self.penalties, penalty))

    def with_measure(self, measure: Measure) -> Plan:
        """Return the plan with one more measurement before training.

        Raises:
            PlanError: the plan has a measurement of its name.
        """
        return self._with(measures=(*self.measures, measure))

    def with_search(self, search: Search) -> Plan:
        """Return the plan with one more choice to make before training by trying candidates.

        Raises:
            PlanError: the plan has a search of its name.
        """
        return self._with(searches=(*self.searches, search))

    def with_after(self, after: After) -> Plan:
        """Return the plan with one more change of the weights once training is over.

        Raises:
            PlanError: the plan has one of its name.
        """
        return self._with(after=(*self.after, after))

    def with_facts(self, facts: Mapping[str, str]) -> Plan:
        """Return the plan with results found before training; a new fact replaces an old one of its name."""
        return self._with(facts={**self.facts, **facts})

    def with_notes(self, notes: Iterable[str]) -> Plan:
        """Return the plan with these remarks on the source instead of those it had."""
        return self._with(notes=tuple(notes))

    def _with(self, **changes: Any) -> Plan:
        """Return the plan with other fields, its invariants checked."""
        return Plan(**{**dict(self), **changes})

    def totals(self) -> dict[str, int]:
        """Return numbers of elements: all, trained, frozen, copied, fresh."""
        trained = set(self.trained)
        return {
            "all": sum(row.size for row in self.rows),
            "trained": sum(row.size for row in self.rows if row.name in trained),
            "frozen": sum(row.size for row in self.rows if row.name not in trained),
            "copied": sum(row.copied_size for row in self.rows),
            "fresh": sum(row.size - row.copied_size for row in self.rows),
        }

    def __str__(self) -> str:
        from conservtl.plan.table import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from conservtl.plan.table import as_rich

        return as_rich(self)


def _owners(row: Row) -> list[str]:
    """Return the modules that hold a parameter; several for a tied one."""
    return [owner(name) for name in (row.name, *row.aliases)]
