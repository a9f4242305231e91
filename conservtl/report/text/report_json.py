"""The report as JSON: plain types, in a stable order."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conservtl.storage.files import write_text

__all__ = ["plain", "write_json"]

_ORDERED = frozenset({"drift", "spec"})
"""Mappings that keep their order: layers from the input side on, fields as documented."""


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as JSON, atomically: keys sorted, NaN and infinity as null.

    Raises:
        TypeError: JSON cannot hold a value; the message names it.
    """
    write_text(json.dumps(plain(_sort(report)), indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def plain(value: Any, at: str = "report") -> Any:
    """Return the value in types that JSON and YAML can hold; others are an error."""
    if value is None or isinstance(value, bool | str | int):
        # JSON and YAML would write a subclass, such as an enum of strings, by its representation.
        return value if value is None or isinstance(value, bool) else _base(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{at}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [plain(item, f"{at}[{index}]") for index, item in enumerate(items)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(item := getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return plain(item(), at)
    raise TypeError(
        f"{at}: a report holds numbers, text, lists and mappings, but this is {type(value).__name__}. "
        "Convert it before writing, a tensor with .tolist()."
    )


def _base(value: str | int) -> str | int:
    return str.__str__(value) if isinstance(value, str) else int(value)


def _sort(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report with sorted keys at every level but below the keys that keep their order."""
    return {
        str(key): value if key in _ORDERED else _sorted_value(value)
        for key, value in sorted(report.items(), key=lambda item: str(item[0]))
    }


def _sorted_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _sort(value)
    return [_sorted_value(item) for item in value] if isinstance(value, list | tuple) else value
