"""The base of every spec, plan and decision: an immutable Pydantic model that refuses unknown fields."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from conservtl.errors import SpecError
from conservtl.wrong_fields import sentences

__all__ = ["FieldError", "FrozenModel", "check_describable", "checked", "register"]

Class = TypeVar("Class")
Model = TypeVar("Model", bound=BaseModel)


class FieldError(SpecError, ValidationError):
    """A spec that is made in Python has a wrong field. It is Pydantic's error too, with a sentence for each field."""

    _model: type[BaseModel]

    @classmethod
    def of(cls, error: ValidationError, model: type[BaseModel]) -> Self:
        """Return the error for Pydantic's error about the fields of a model."""
        found = cls.from_exception_data(
            error.title,
            [
                {
                    "type": PydanticCustomError(one["type"], one["msg"], one.get("ctx")),
                    "loc": one["loc"],
                    "input": one["input"],
                }
                for one in error.errors(include_url=False)
            ],
        )
        vars(found)["_model"] = model
        return found

    @cached_property
    def _text(self) -> str:
        return "\n".join(_sentences(self, self._model, self._model.__name__, python=True))

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> Any:
        return SpecError, (str(self),)


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

    if not TYPE_CHECKING:  # mypy makes a constructor of the fields

        def __init__(self, /, *unnamed: Any, **fields: Any) -> None:
            if unnamed:
                fields = ", ".join(name for name in type(self).model_fields if name != "kind")
                received = f"{unnamed[0]!r:.80}"
                raise TypeError(f"{type(self).__name__} takes its fields by name, {fields}; received {received} alone")
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise FieldError.of(error, type(self)) from None

        __init__.__pydantic_base_init__ = True  # models within models are made without it
        __init__.__signature__ = inspect.signature(BaseModel.__init__)

        def __setattr__(self, name: str, value: Any) -> None:
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                raise FieldError.of(error, type(self)) from None

        def __delattr__(self, name: str) -> None:
            raise SpecError(
                f"{type(self).__name__}.{name}: no field can be deleted; received del. For its default make a new one "
                "with the other fields."
            )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy, with other values of some fields, which are checked as in a new one.

        Raises:
            SpecError: there is no such field, or a value is wrong.
        """
        copied = super().model_copy(deep=deep)
        if not update:
            return copied
        fields = {name: getattr(copied, name) for name in copied.model_fields_set}
        changed = type(self)(**fields | dict(update))
        object.__setattr__(changed, "__pydantic_private__", copied.__pydantic_private__)
        return changed

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema with numbers that are no booleans."""
        schema: CoreSchema = _with_numbers(handler(source))
        return schema

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Of each class, or one that is not built yet would have the signature of a base that is.
        cls.__signature__ = _Signature()  # type: ignore[assignment]


def _with_numbers(schema: Any) -> Any:
    """Return a schema of Pydantic whose numbers refuse True and False, which would count as 1 and 0."""
    if isinstance(schema, (list, tuple)):
        return type(schema)(map(_with_numbers, schema))
    if not isinstance(schema, dict):
        return schema
    if (check := _NUMBERS.get(schema.get("type", ""))) is not None:
        return core_schema.no_info_before_validator_function(check, schema)
    if schema.get("type") == "function-before" and schema["function"]["function"] in _NUMBERS.values():
        return schema  # of a model within
    return {key: part if key in _NO_SCHEMAS else _with_numbers(part) for key, part in schema.items()}


def _number(kind: Any, value: Any) -> Any:
    """Return a value unless it is a boolean, of NumPy or torch too."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise PydanticKnownError(kind)
    return value


_NUMBERS = {"int": partial(_number, "int_type"), "float": partial(_number, "float_type")}
_NO_SCHEMAS = ("metadata", "serialization", "default")


def register(registry: dict[str, type[Class]], cls: type[Class], *names: str) -> None:
    """Enter a class under its kind and its short names.

    The same class defined again, by a notebook's cell or a reloaded module, replaces the former.

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


def checked(cls: type[Model], fields: Any, where: str, end: str = "") -> Model:
    """Return a model of fields; a message begins with ``where``, their dotted name, and ends with ``end``."""
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise SpecError("\n".join(_sentences(error, cls, where)) + end) from None


def _sentences(error: ValidationError, cls: type[BaseModel], where: str, *, python: bool = False) -> list[str]:
    schema: dict[str, Any] = {}
    with warnings.catch_warnings(), suppress(PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        warnings.simplefilter("ignore")  # a default that JSON does not have is left out
        schema = cls.model_json_schema()
    return sentences(error.errors(), schema, where, python=python)


def check_describable(cls: type[BaseModel]) -> None:
    """Raise unless JSON can describe each field of a model: one that it cannot breaks the schema of all specs.

    The message names the field. A class with types that are not defined yet is not checked.
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
