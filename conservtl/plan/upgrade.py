"""Upgrade of plans in files that earlier versions wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conservtl.plan.row import like_bias

__all__ = ["decayed_by_default", "upgrade"]

Fields = dict[str, Any]


def upgrade(fields: Mapping[str, Any]) -> Fields:
    """Return the fields of a plan as this version takes them; fields of this version are returned unchanged."""
    upgraded = dict(fields)
    for step in _STEPS:
        upgraded = step(upgraded)
    return upgraded


def _separate_searches(fields: Fields) -> Fields:
    """Move the search for the best block, a measurement in 0.1.0's first plans, to the searches."""
    measures = fields.get("measures", ())
    searches = [one for one in measures if isinstance(one, dict) and one.get("kind") == "best_block"]
    if not searches:
        return fields
    moved = [{key: value for key, value in one.items() if key != "data"} for one in searches]
    rest = [one for one in measures if one not in searches]
    return {**fields, "measures": rest, "searches": [*fields.get("searches", ()), *moved]}


def _instance_column(fields: Fields) -> Fields:
    """Turn the column ``instance`` of the rows into an extension of kind ``instance_statistics``."""
    rows = fields.get("rows", ())
    if not any(isinstance(row, dict) and "instance" in row for row in rows):
        return fields
    mixing = [row for row in rows if row.get("instance")]
    rest = {**fields, "rows": [{key: value for key, value in row.items() if key != "instance"} for row in rows]}
    if not mixing:
        return rest
    by, share = mixing[0]["chosen"]["statistics"]["by"], mixing[0]["instance"]
    names = tuple(row["name"] for row in mixing)
    return {**rest, "extensions": ({"kind": "instance_statistics", "by": by, "share": share, "names": names},)}


def _penalty_columns(fields: Fields) -> Fields:
    """Turn the columns ``mode``, ``importance``, ``anchor`` and ``anneal`` of the rows into penalties."""
    rows = fields.get("rows", ())
    if not any(isinstance(row, dict) and column in row for row in rows for column in _PENALTY_COLUMNS):
        return fields
    decayed = [row for row in rows if row.get("decay") is not None]
    pulled: dict[tuple[str, ...], list[Fields]] = {}
    for row in rows:
        if row.get("pull") is not None:
            pulled.setdefault(tuple(str(row.get(column)) for column in _PENALTY_COLUMNS), []).append(row)
    penalties: list[Fields] = []
    if decayed:
        modes = {row.get("mode", "coupled") for row in decayed}
        mode = "decoupled" if "decoupled" in modes else "coupled"
        penalties.append({"kind": "l2_decay", **_author(decayed, "decay"), "mode": mode})
    for alike in pulled.values():
        first = alike[0]
        given = {column: first[column] for column in ("mode", "anchor", "anneal") if first.get(column) is not None}
        importance = first.get("importance")
        kind, reads = ("l2_sp", ()) if importance is None else ("fisher_sp", (importance,))
        penalties.append({"kind": kind, **_author(alike, "pull"), **given, "reads": reads})
    rest = [{key: value for key, value in row.items() if key not in _PENALTY_COLUMNS} for row in rows]
    return {**fields, "rows": rest, "penalties": penalties}


def _author(rows: Sequence[Fields], column: str) -> Fields:
    """Return ``names`` and ``by`` of the penalty on some rows; ``by`` prefers a strategy that chose for all rows."""
    choices = [dict(row["chosen"][column]) for row in rows if column in row.get("chosen", {})]
    choices.sort(key=lambda choice: bool(choice["explicit"]))
    return {"by": choices[0]["by"] if choices else "L2SP", "names": [row["name"] for row in rows]}


def decayed_by_default(fields: Mapping[str, Any]) -> frozenset[str]:
    """Return the biases and norms, and what is like them, that the optimizer's weight decay acted on by default.

    In a plan of 0.1.0's first versions.
    """
    rows = [row for row in fields.get("rows", ()) if isinstance(row, dict) and "found" not in row]
    return frozenset(
        row["name"]
        for row in rows
        if like_bias(row.get("name", ""), row.get("kind", "weight"), row.get("shape", ()))
        and row.get("weight_decay", True)
        and "weight_decay" not in row.get("chosen", {})
    )


def _undecayed(fields: Fields) -> Fields:
    """Take the optimizer's weight decay off biases and norms, on which it acted by default."""
    names = decayed_by_default(fields)
    if not names:
        return fields
    rows = [{**row, "weight_decay": False} if _name(row) in names else row for row in fields["rows"]]
    return {**fields, "rows": rows}


def _name(row: Any) -> Any:
    return row.get("name") if isinstance(row, dict) else None


def _without_dimensions(fields: Fields) -> Fields:
    """Drop the numbers of dimensions that told the axis of channels: it is found from the outputs now."""
    upgraded = dict(fields)
    for name, kind in (("terms", "features"), ("measures", "attention")):
        decisions = fields.get(name, ())
        if any(isinstance(one, dict) and one.get("kind") == kind and "first" in one for one in decisions):
            upgraded[name] = [
                {key: value for key, value in one.items() if key != "first"} if isinstance(one, dict) else one
                for one in decisions
            ]
    return upgraded


_PENALTY_COLUMNS = ("mode", "importance", "anchor", "anneal")
_STEPS: tuple[Callable[[Fields], Fields], ...] = (
    _separate_searches,
    _instance_column,
    _penalty_columns,
    _undecayed,
    _without_dimensions,
)
