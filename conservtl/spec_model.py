"""The base of every spec, plan and decision: an immutable Pydantic model that refuses unknown fields."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError

from conservtl.errors import SpecError

__all__ = ["FrozenModel", "check_describable", "register"]

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


def check_describable(cls: type[BaseModel]) -> None:
    """Raise unless JSON can describe each field of a model: one that it cannot breaks the schema of all specs.

    A class with types that are not defined yet is not checked.

    Raises:
        SpecError: JSON cannot describe a field; the message names it.
    """
    if (reason := _undescribed(cls)) is None:
        return
    alone: dict[str, Any] = {name: (info.annotation, info) for name, info in cls.model_fields.items()}
    for name, field in alone.items():
        # A class of the field alone: Pydantic's error does not name it.
        if _undescribed(create_model("Alone", __config__=cls.model_config, **{name: field})) is not None:
            raise SpecError(
                f"{cls.__qualname__}.{name} must be of a type that JSON can describe, because specs hold it; received "
                f"{field[0]!r}. Use text, numbers, lists or models of such fields, or make it a ClassVar."
            )
    raise SpecError(f"{cls.__qualname__}: JSON must be able to describe it, because specs hold it; {reason}")


def _undescribed(cls: type[BaseModel]) -> str | None:
    """Return why JSON cannot describe a model; None if it can, or if a type is not defined yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a default that JSON does not have is left out of the schema
            cls.model_json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError) as error:
        return error.message
    except PydanticUserError as error:
        if error.code != "class-not-fully-defined":
            raise
    return None
