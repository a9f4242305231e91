"""The plan: one row a parameter, and phases. Everything that will happen, readable before it does."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conservtl.errors import PlanError
from conservtl.layers import Layer, matches, select

__all__ = ["COLUMNS", "Choice", "Phase", "Plan", "Row"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "origin": ("origin", "reason"),
    "frozen": ("frozen",),
    "rate": ("lr", "scale"),
    "pull": ("pull", "mode"),
    "decay": ("decay", "mode"),
    "weight_decay": ("weight_decay",),
}
"""The decisions about a row, each with the fields that hold it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)


class Choice(_Frozen):
    """Which strategy filled in a column of a row, and whether it named the row or meant everything."""

    by: str
    explicit: bool


class Row(_Frozen):
    """What happens to one parameter."""

    name: str
    """Canonical parameter name: wrapper prefixes stripped, tied parameters under their first name."""
    layer: str
    """The layer it belongs to."""
    depth: Annotated[float, Field(ge=0, le=1)]
    """0 at the input side, 1 at the output side; counted over all layers, frozen ones included."""
    shape: tuple[int, ...]
    kind: Literal["weight", "bias", "norm"]
    """norm: owned by a normalisation; weight: any other with two dimensions or more; bias: the rest."""
    source_shape: tuple[int, ...] | None = None
    """Shape of the source tensor of this name, None where the source has none."""
    origin: Literal["source", "fresh"] = "source"
    reason: str | None = None
    """Why it is fresh; None for a row from the source."""
    frozen: bool = False
    """Frozen throughout; phases can freeze more for a while."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Absolute learning rate; None takes the optimizer's own, times ``scale``."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Ratio to the optimizer's own learning rate; used where ``lr`` is None."""
    pull: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """alpha: strength of the pull toward the source value; None: not covered."""
    decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """beta: strength of the pull of a fresh parameter toward zero; None: not covered."""
    mode: Literal["coupled", "decoupled"] = "coupled"
    """Whether pull and decay are part of the gradient or a step of their own before it."""
    weight_decay: bool = True
    """Whether the optimizer's own weight decay may act on it."""
    chosen: dict[str, Choice] = {}
    """Column -> the strategy that filled it in; a column not here holds its default."""

    @property
    def size(self) -> int:
        """Number of elements."""
        product = 1
        for length in self.shape:
            product *= length
        return product

    @property
    def covered(self) -> bool:
        """Whether alpha or beta acts on it, so that the optimizer's weight decay must not."""
        return self.pull is not None or self.decay is not None

    def rate(self, base: float) -> float:
        """Learning rate, given the optimizer's own ``base`` rate."""
        return self.lr if self.lr is not None else self.scale * base


class Phase(_Frozen):
    """A stretch of training: for how long, what is frozen meanwhile, and a scale on the rates."""

    name: str = "all"
    epochs: Annotated[int, Field(ge=1)] | None = None
    """How long; None: as long as training goes on (the last phase only)."""
    frozen: tuple[str, ...] = ()
    """Parameters frozen during this phase, beside those frozen throughout."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Multiplies every learning rate."""


class Plan(_Frozen):
    """All decisions about a model, before anything is trained. ``print(plan)`` is a table by layer.

    Raises:
        PlanError: an invariant does not hold (a parameter twice, layers out of order, a phase that
            names an unknown parameter or trains nothing, a pull on a fresh parameter, ...).
    """

    rows: tuple[Row, ...]
    phases: tuple[Phase, ...] = (Phase(),)

    def __init__(self, **fields: Any) -> None:
        # Checked here, not in a validator: Pydantic would wrap a PlanError in an error of its own.
        super().__init__(**fields)
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
            _check_row(row)
        if not self.phases or any(phase.epochs is None for phase in self.phases[:-1]):
            raise PlanError("plan: every phase but the last needs a number of epochs.")
        free = {row.name for row in self.rows if not row.frozen}
        for phase in self.phases:
            if unknown := sorted(set(phase.frozen) - set(names)):
                raise PlanError(f"plan: phase {phase.name!r} freezes {unknown}, which the plan does not have.")
            if free and not free - set(phase.frozen):
                raise PlanError(
                    f"plan: phase {phase.name!r} trains nothing: all that it would train is frozen throughout "
                    "by another strategy. Unfreeze it there, or leave the phase out."
                )

    @classmethod
    def draw(
        cls,
        layers: Sequence[Layer],
        shapes: Mapping[str, tuple[int, ...]],
        fresh: Mapping[str, str],
        fixed: Collection[str] = (),
    ) -> Plan:
        """The plan before any strategy: what fits is copied, everything is trained at the full rate.

        Args:
            layers: the model's layers, input side first.
            shapes: parameter name -> shape of its source tensor, where there is one.
            fresh: parameter name -> why it must not come from the source even where it would fit.
            fixed: parameters that have no gradient (integers), and so are frozen.
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
    def head(self) -> tuple[str, ...]:
        """Parameters of the last weight's module: the classifier, without the norm that joined its layer."""
        last = [row for row in self.rows if row.layer == self.layers[-1]]
        weights = [row for row in last if row.kind == "weight"]
        owner = _module((weights or last)[-1].name)
        return tuple(row.name for row in last if _module(row.name) == owner)

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

    def __getitem__(self, name: str) -> Row:
        """The row of a parameter."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

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
        rows = []
        for row in self.rows:
            old = row.chosen.get(column)
            chosen = values.get(row.name)
            if chosen is None or (old is not None and old.explicit and not explicit):
                rows.append(row)
                continue
            if old is not None and old.explicit == explicit:
                same = all(getattr(row, field) == value for field, value in chosen.items())
                if explicit or not same:
                    raise PlanError(
                        f"{by} and {old.by} both choose the {column} of {row.name!r} (layer {row.layer!r}). "
                        "Name each parameter in one of them only, or leave one strategy out."
                    )
            defaults: dict[str, Any] = {field: Row.model_fields[field].default for field in COLUMNS[column]}
            rows.append(_changed(row, by, {**defaults, **chosen, "chosen": {**row.chosen, column: new}}))
        return self._with(rows=tuple(rows))

    def with_phases(self, by: str, phases: Sequence[Phase]) -> Plan:
        """The same rows in other phases.

        Raises:
            PlanError: another strategy has set phases already.
        """
        if self.phases != (Phase(),):
            raise PlanError(f"{by} sets phases, but another strategy has set {[p.name for p in self.phases]}.")
        return self._with(phases=tuple(phases))

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
        from conservtl.table import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from conservtl.table import as_rich

        return as_rich(self)


def _module(name: str) -> str:
    """The module that owns a parameter, also where it is parametrised."""
    return name.rpartition(".parametrizations.")[0] or name.rpartition(".")[0]


def _changed(row: Row, by: str, fields: dict[str, Any]) -> Row:
    """The row with other fields, validated as a new one is."""
    try:
        return Row(**{**dict(row), **fields})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise PlanError(
            f"{by} gives {row.name!r} {field}={first['input']!r}, which no row can hold: {first['msg']}. "
            "Mend the strategy's fields."
        ) from error


def _check_row(row: Row) -> None:
    if (row.origin == "fresh") != (row.reason is not None):
        raise PlanError(f"plan: {row.name!r} is {row.origin} with reason {row.reason!r}; only fresh rows have one.")
    if row.origin == "fresh" and row.pull is not None:
        raise PlanError(f"plan: {row.name!r} is fresh, so there is no source value to pull it to.")
    if row.origin == "source" and row.decay is not None:
        raise PlanError(f"plan: {row.name!r} comes from the source; beta acts on fresh parameters only.")
    if row.origin == "source" and row.source_shape != row.shape:
        raise PlanError(f"plan: {row.name!r} has shape {row.shape}, its source {row.source_shape}.")
