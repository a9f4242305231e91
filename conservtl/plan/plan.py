"""The plan: rows, phases and all other decisions, readable before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from conservtl.layers import Layer, matches, select
from conservtl.plan._filling import FillablePlan
from conservtl.plan.decision import Decision
from conservtl.plan.invariants import check_plan
from conservtl.plan.penalty import Penalty
from conservtl.plan.row import COLUMNS, Anneal, Choice, Phase, Row, like_bias
from conservtl.plan.term import Term
from conservtl.plan.upgrade import upgrade

__all__ = ["COLUMNS", "Anneal", "Choice", "Phase", "Plan", "Row"]


class Plan(FillablePlan):
    """All decisions about a model, before anything is trained. ``print(plan)`` is a table by layer.

    Raises:
        PlanError: an invariant does not hold: a parameter stands in two rows, layers are out of order, a phase names an
            unknown parameter or trains nothing, a fresh parameter has a pull, two decisions have the same name, a
            decision names an unknown parameter or layer, ...
    """

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
        rows = []
        for number, layer in enumerate(layers):
            for info in layer.parameters:
                source_shape = shapes.get(info.name)
                reason = fresh.get(info.name)
                if reason is None and source_shape is None:
                    reason = "missing in the source"
                elif reason is None and source_shape != info.shape:
                    reason = f"shape differs: {info.shape} here, {source_shape} in the source"
                rows.append(
                    Row(
                        name=info.name,
                        layer=layer.name,
                        aliases=info.aliases,
                        depth=number / max(1, len(layers) - 1),
                        shape=info.shape,
                        kind=info.kind,
                        source_shape=source_shape,
                        added=info.name in added,
                        origin="source" if reason is None else "fresh",
                        reason=reason,
                        found="fixed" if info.name in fixed else "frozen" if info.name in frozen else "trained",
                        weight_decay=not like_bias(info.name, info.kind, info.shape),
                        frozen=info.name in fixed or info.name in frozen,
                    )
                )
        infos = [info for layer in layers for info in layer.parameters]
        return cls(
            rows=tuple(rows),
            heads=tuple(dict.fromkeys(info.head for info in infos if info.head is not None)),
            head_candidates=tuple(dict.fromkeys(info.candidate for info in infos if info.candidate is not None)),
            outputs=tuple(dict.fromkeys(info.output for info in infos if info.output is not None)),
        )

    @property
    def fresh(self) -> tuple[str, ...]:
        """Parameters that do not come from the source, or have rows that do not; factors of low rank do not count."""
        return tuple(row.name for row in self.rows if row.fresh and row.name not in self.factors)

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
        fields = type(self).model_fields.keys() - {"notes", "proxies", "heads", "head_candidates", "outputs"}
        return isinstance(other, Plan) and all(getattr(self, name) == getattr(other, name) for name in fields)

    __hash__ = None  # type: ignore[assignment]

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

    def on_proxies(self, decision: Decision) -> bool:
        """Return whether a decision is a term that compares with the source on changed copies of the inputs."""
        return self.proxies and isinstance(decision, Term) and decision.source

    def frozen_in(self, phase: int) -> frozenset[str]:
        """Return the parameters that a phase does not train."""
        return frozenset(self.phases[phase].frozen) | {row.name for row in self.rows if row.frozen}

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

    def _repr_html_(self) -> str:
        from conservtl.plan.table import as_html

        return as_html(self)

    def __rich__(self) -> Any:
        from conservtl.plan.table import as_rich

        return as_rich(self)
