"""The fields of a plan, its rows by name, and the head of the planned model."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

from pydantic import Field

from conservtl.errors import SpecError
from conservtl.layers.names import owner
from conservtl.plan.decision import Afters, Extensions, Measures, Searches
from conservtl.plan.penalty import Penalties
from conservtl.plan.row import Phase, Row
from conservtl.plan.term import Terms
from conservtl.plan.update import Updates
from conservtl.spec_model import FrozenModel

__all__ = ["PlanFields"]


class PlanFields(FrozenModel):
    """All decisions about a model."""

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
    proxies: bool = False
    """Whether the terms that compare with the source see changed copies of the inputs in the place of the inputs. It
    belongs to the run, not to the strategies: plans are equal whatever it is."""
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

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names, input side first."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def own_layers(self) -> tuple[str, ...]:
        """Names of the layers that the model had before a strategy added any, input side first."""
        return tuple(dict.fromkeys(row.layer for row in self.rows if not row.added))

    @property
    def factors(self) -> dict[str, str]:
        """Factor A or B of a change of low rank, or the bias of B -> the weight from the source that it changes.

        A factor counts as a part of that weight, not as fresh: it takes the rate of its layer and of the source, is
        frozen with its layer, and no phase for new parameters trains it.
        """
        return self._changed_weights

    @cached_property
    def _changed_weights(self) -> dict[str, str]:
        changes = [(row.name, row.low_rank) for row in self.rows if row.low_rank is not None]
        return {
            name: change.weight
            for b, change in changes
            if change.weight in self and self[change.weight].origin == "source"
            for name in (change.a, b, change.bias)
            if name is not None
        }

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
                "If no example was given, adapt(..., example=...) may tell it."
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
        modules = self._possible_modules
        return frozenset(row.name for row in self.rows if modules & set(_owners(row)))

    @property
    def tied_head(self) -> tuple[str, ...]:
        """Parameters of modules that may be the head that another holds too: an embedding, of a language model."""
        modules = self._possible_modules
        return tuple(row.name for row in self.rows if modules & set(_owners(row)) and set(_owners(row)) - modules)

    def names_outside_head(self, name: str) -> tuple[str, ...]:
        """Return the names of a tied parameter in modules that cannot be the head."""
        names = (name, *self[name].aliases)
        return tuple(one for one in names if owner(one) not in self._possible_modules)

    @property
    def _possible_modules(self) -> set[str]:
        return set(self.head_candidates if not self.heads and self.head_candidates else self.head_modules)

    def __getitem__(self, name: str) -> Row:
        """Return the row of a parameter."""
        return self._rows_by_name[name]

    def __contains__(self, name: str) -> bool:
        """Whether the plan has a row for a parameter."""
        return name in self._rows_by_name

    @cached_property
    def _rows_by_name(self) -> dict[str, Row]:
        return {row.name: row for row in self.rows}

    def _with(self, **changes: Any) -> Self:
        """Return the plan with other fields, its invariants checked."""
        return type(self)(**{**dict(self), **changes})


def _owners(row: Row) -> list[str]:
    """Return the modules that hold a parameter; several for a tied one."""
    return [owner(name) for name in (row.name, *row.aliases)]
