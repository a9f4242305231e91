"""The base of every spec, plan and decision: an immutable Pydantic model that refuses unknown fields."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from conservtl.errors import SpecError

__all__ = ["FrozenModel", "register"]

Class = TypeVar("Class")


class FrozenModel(BaseModel):
    """An immutable model. Unknown fields are refused; the docstring under a field becomes its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)


def register(registry: dict[str, type[Class]], cls: type[Class], *names: str) -> None:
    """Enter a class under its kind and its short names.

    The same class defined again, by a notebook's cell or a reloaded module, replaces the former.

    Args:
        registry: name -> class, changed in place.
        cls: the class.
        names: its kind and its short names.

    Raises:
        SpecError: another class has one of the names; nothing is entered.
    """
    for name in names:
        other = registry.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(
                f"kind {name!r} of {cls.__qualname__} is that of {other.__module__}.{other.__qualname__} already. "
                "Give it another."
            )
    registry.update(dict.fromkeys(names, cls))
