"""Fields of a spec by dotted name: one way to set them, for the command line, variants and searches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from conservtl.errors import SpecError

__all__ = ["set_field", "with_values"]

_SWITCHES = ("kind", "task")


def set_field(content: dict[str, Any], name: str, value: Any) -> None:
    """Set a field of a spec's content in place; sections on the way are made where they are missing or null.

    A name is dotted, with positions in lists counted from 0: ``strategies.0.alpha``. Another ``kind`` of a section
    drops the section's other fields; another ``task`` drops ``data`` and ``model``.

    Raises:
        SpecError: a part of the name is no position in a list, or stands below a plain value.
    """
    *path, last = name.split(".")
    section: Any = content
    for key in path:
        section = _below(section, key, name)
    if isinstance(section, list):
        section[_position(section, last, name)] = value
        return
    known = section.get(last)
    if last in _SWITCHES and isinstance(known, str) and known != value:
        for other in [key for key in section if last == "kind" or key in ("data", "model")]:
            del section[other]
    section[last] = value


def with_values(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a spec's content with these fields set, by dotted name."""
    filled: dict[str, Any] = copy.deepcopy(dict(content))
    for name in sorted(values, key=lambda name: name.rpartition(".")[2] not in _SWITCHES):
        set_field(filled, name, values[name])
    return filled


def _below(section: Any, key: str, name: str) -> Any:
    if isinstance(section, list):
        return section[_position(section, key, name)]
    if section.get(key) is None:
        section[key] = {}
    if not isinstance(section[key], (dict, list)):
        raise SpecError(f"{name}: {key!r} holds {section[key]!r}, which has no fields below it.")
    return section[key]


def _position(section: list[Any], key: str, name: str) -> int:
    if not key.isdigit() or int(key) >= len(section):
        raise SpecError(
            f"{name}: there is no field {key!r} in a list of {len(section)}. Give a position, counted from 0."
        )
    return int(key)
