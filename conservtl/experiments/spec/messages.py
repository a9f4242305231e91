"""Messages for wrong fields of a spec: field, rule, value received, fix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from conservtl.methods import Strategy
from conservtl.tasks.registry import unfinished_task
from conservtl.wrong_fields import sentences

__all__ = ["explanations"]

_LINES = 20


def explanations(errors: Sequence[Any], adapter: TypeAdapter[Any]) -> list[str]:
    """Return a line for each of the first wrong places, and one for all the others."""
    lines = [f"  {line}" for line in sentences(errors, _schema(adapter, tuple(Strategy.named.values())))]
    first = errors[0]
    if first["type"] == "union_tag_invalid" and not first["loc"]:
        lines[0] += unfinished_task(str(first["ctx"]["tag"]), " A task of your own needs --import MODULE.")
    return [*lines[:_LINES], f"  ... and {len(lines) - _LINES:,} more"] if len(lines) > _LINES else lines


@lru_cache(maxsize=2)
def _schema(adapter: TypeAdapter[Any], _known: tuple[type[Strategy], ...]) -> dict[str, Any]:
    """Return an adapter's schema, made anew when a strategy is registered."""
    return adapter.json_schema()
