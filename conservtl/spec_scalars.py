"""Scalars of a spec that know how they are written, so that they are text wherever text is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

__all__ = ["Arguments", "Decimal", "SwitchWord", "Whole", "written"]


class Whole(int):
    """A whole number that is not written as Python prints it: ``+5``, ``1_000``, ``0x10``."""

    text: str


class Decimal(float):
    """A number that is not written as Python prints it: ``1.50``, ``.5``."""

    text: str


class SwitchWord(str):
    """A word without quotes that YAML 1.1 reads as a boolean: ``yes``, ``no``, ``on``, ``off``, ``True``.

    It is text, and a boolean where a boolean is wanted.
    """

    __slots__ = ()

    @property
    def value(self) -> bool:
        """The boolean."""
        return self.lower() in ("yes", "on", "true")


def written(value: Any) -> str | None:
    """Return the text that a number, a boolean or null is written as; None for other values.

    >>> written(17), written(None), written([17])
    ('17', 'null', None)
    """
    if isinstance(value, (Whole, Decimal)):
        return value.text
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, (int, float)) else None


def _as_switches(value: Any) -> Any:
    """Return a value with booleans for the words that YAML 1.1 reads as such, at any depth."""
    if isinstance(value, SwitchWord):
        return value.value
    if isinstance(value, Mapping):
        return {key: _as_switches(inner) for key, inner in value.items()}
    return [_as_switches(inner) for inner in value] if isinstance(value, list) else value


Arguments = Annotated[dict[str, Any], BeforeValidator(_as_switches)]
"""Arguments of another library's function, whose types are not known: ``yes`` without quotes is true."""
