"""The rows of a plan: drawn from a model's layers, and filled in by strategies column by column."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from conservtl.errors import PlanError
from conservtl.layers import Layer
from conservtl.plan.row import COLUMNS, Choice, Row, changed, like_bias

__all__ = ["draw_rows", "fill_column"]


def draw_rows(
    layers: Sequence[Layer],
    shapes: Mapping[str, tuple[int, ...]],
    fresh: Mapping[str, str],
    fixed: Collection[str],
    added: Collection[str],
    frozen: Collection[str],
) -> tuple[Row, ...]:
    """Return the rows before any strategy; arguments as for ``Plan.draw``."""
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
    return tuple(rows)


def fill_column(
    rows: Sequence[Row], by: str, column: str, values: Mapping[str, Mapping[str, Any]], *, explicit: bool
) -> tuple[Row, ...]:
    """Return the rows with one column filled in by a strategy; arguments as for ``Plan.choose``."""
    known = {row.name for row in rows}
    for name, fields in values.items():
        if name not in known or not fields.keys() <= set(COLUMNS.get(column, ())):
            raise PlanError(
                f"{by} chooses the {column} of {name!r} as {dict(fields)}. It must name a parameter of the plan, a "
                f"column of {tuple(COLUMNS)} and fields of that column {COLUMNS.get(column, ())}."
            )
    choice = Choice(by=by, explicit=explicit)
    defaults = {field: Row.model_fields[field].default for field in COLUMNS.get(column, ())}
    filled = []
    for row in rows:
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
    return tuple(filled)


def _stays_frozen(row: Row, chosen: Mapping[str, Any], *, explicit: bool) -> bool:
    """Return whether a row stays frozen, as it was found, although a strategy would train it."""
    trains = chosen.get("frozen", True) is False and row.frozen
    return trains and (row.found == "fixed" or (row.found == "frozen" and not explicit))
