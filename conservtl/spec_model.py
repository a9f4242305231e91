"""The base of every spec, plan and decision: an immutable Pydantic model that refuses unknown fields."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from conservtl.errors import SpecError

__all__ = ["FrozenModel", "register"]

Class = TypeVar("Class")


class _Signature:
    """A class's signature, with its fields; computed when asked for, because building a class takes time."""

    def __get__(self, instance: object, owner: type[BaseModel]) -> inspect.Signature:
        if instance is None and owner.__dict__.get("__signature__") is self:
            owner.model_rebuild(raise_errors=False)  # Pydantic then sets the signature
            if owner.__dict__.get("__signature__") is not self:
                return owner.__signature__
        raise AttributeError("__signature__")


class FrozenModel(BaseModel):
    """An immutable model. Unknown fields are refused; the docstring under a field becomes its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Of each class, or one that is not built yet would have the signature of a base that is.
        cls.__signature__ = _Signature()  # type: ignore[assignment]


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
