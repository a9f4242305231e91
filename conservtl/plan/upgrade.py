"""Plans in files of earlier versions, brought to the fields of this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["upgrade"]

Fields = dict[str, Any]


def upgrade(fields: Mapping[str, Any]) -> Fields:
    """Return the fields of a plan as this version names them; those of today are returned as they are."""
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


_STEPS: tuple[Callable[[Fields], Fields], ...] = (_separate_searches, _instance_column)
