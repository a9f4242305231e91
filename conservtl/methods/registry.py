"""Strategies by name: the built-in ones found in this package, a user's own by import or entry point.

A strategy registers itself when its class is defined, so importing its module is all that it takes. Specs never make
conservtl import anything: only the modules of this package, installed entry points of the group ``conservtl.methods``
and modules that the user names (``--import``, or ``import`` in Python) are imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Union

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from conservtl.errors import SpecError, wrong_tag
from conservtl.methods.base import Strategy
from conservtl.plugins import load_entry_points
from conservtl.wrong_fields import sentences

__all__ = ["AnyStrategy", "as_strategies", "as_strategy", "builtin_strategies", "import_builtin"]

_PACKAGE = __name__.rpartition(".")[0]
_ENTRY_POINTS = "conservtl.methods"
_OWN = " To use a strategy of your own, import its module first: `--import package.module` on the command line."


def import_builtin() -> None:
    """Import every module of ``conservtl.methods`` whose name has no leading underscore."""
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{_PACKAGE}.{module.name}")


def builtin_strategies() -> dict[str, type[Strategy]]:
    """Return every built-in strategy by the name of its class, sorted."""
    builtin = {cls.__name__: cls for cls in _registered() if cls.__module__.startswith(f"{_PACKAGE}.")}
    return dict(sorted(builtin.items()))


def as_strategy(strategy: Strategy | Mapping[str, Any], where: str = "strategy") -> Strategy:
    """Return a strategy unchanged, or make one from the fields that a spec would hold.

    Args:
        strategy: an instance, or its fields with ``kind`` (or a short name of one) among them.
        where: its place in messages.

    Raises:
        SpecError: it is neither, its kind is unknown, or a field is wrong; the message names the place.

    Example:
        >>> from conservtl.methods import as_strategy
        >>> as_strategy({"kind": "l2_sp", "alpha": 0.5}).alpha
        0.5
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, Mapping):
        fix = f" Write {meant}." if (meant := _meant(strategy)) else ""
        raise SpecError(f"{where} must be a Strategy, such as L2SP(alpha=0.1); received {strategy!r:.80}.{fix}")
    if set(strategy) == {"recipe"}:
        raise SpecError(f"{where}: a recipe takes the place of a list of strategies. Write {_meant(strategy)}.")
    if "kind" not in strategy:
        raise SpecError(f"{where}: kind is missing. Name the strategy, such as {{'kind': 'l2_sp'}}.")
    try:
        return _validate(dict(strategy))
    except PydanticCustomError as error:
        raise SpecError(f"{where}: {error.message()}") from error
    except ValidationError as error:
        schema = _all_kinds().json_schema()
        raise SpecError("\n".join(sentences(error.errors(), schema, where, python=True))) from None


def as_strategies(given: Any, where: str = "strategies") -> tuple[Strategy, ...]:
    """Return a list of strategies, each as ``as_strategy`` takes it.

    Args:
        given: the list.
        where: its place in messages.

    Raises:
        SpecError: it is no list, or one of them is wrong; the message names the place.
    """
    if isinstance(given, (Strategy, Mapping, str)) or not isinstance(given, Iterable):
        meant = _meant(given) or (repr(given) if isinstance(given, (Strategy, Mapping)) else "L2SP(alpha=0.1)")
        fix = meant if meant.startswith("ctl.recipe") else f"[{meant}]"
        raise SpecError(f"{where} must be a list; received {given!r:.200}. Write {fix}.")
    return tuple(as_strategy(one, f"{where}.{place}") for place, one in enumerate(given))


def _meant(given: Any) -> str:
    """Return how a strategy that is no instance and no fields of one is written; empty if nothing is meant."""
    if isinstance(given, Mapping):
        return f"ctl.recipe({given['recipe']!r})" if set(given) == {"recipe"} else ""
    load_entry_points(_ENTRY_POINTS)
    name = given if isinstance(given, str) else str(getattr(given, "__name__", ""))
    cls = Strategy.named.get(name) or builtin_strategies().get(name)
    return "" if cls is None else f"{{'kind': {name!r}}}" if name in Strategy.named else f"{name}()"


def _registered() -> tuple[type[Strategy], ...]:
    return tuple(dict.fromkeys(Strategy.named.values()))


@lru_cache(maxsize=1)
def _union(classes: tuple[type[Strategy], ...]) -> TypeAdapter[Strategy]:
    """Return the discriminated union of these classes; made anew only when a class is registered."""
    union: Any = Annotated[Union[classes], Field(discriminator="kind")]  # noqa: UP007 - known at run time only
    return TypeAdapter(union)


def _all_kinds() -> TypeAdapter[Strategy]:
    load_entry_points(_ENTRY_POINTS)
    return _union(_registered())


def _validate(value: Any) -> Strategy:
    """Return a strategy as it is or from its fields; errors keep the places that Pydantic's union gives them."""
    if isinstance(value, Strategy):
        return value
    kinds = _all_kinds()
    try:
        return kinds.validate_python(_without_alias(value))
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] or first["type"] not in ("union_tag_invalid", "union_tag_not_found"):
            raise
        message = "kind is missing. Name the strategy, such as {kind: l2_sp}."
        if isinstance(value, Mapping) and set(value) == {"recipe"}:
            message = f"a recipe is not one of a list. Write strategies: {{recipe: {value['recipe']}}}."
        if first["type"] == "union_tag_invalid":
            aliases = [name for name, cls in Strategy.named.items() if name in cls.aliases]
            message = wrong_tag(first, aliases) + _OWN
        raise PydanticCustomError("unknown_strategy", "{message}", {"message": message}) from error


def _without_alias(value: Any) -> Any:
    """Replace a short name by its kind and the fields it presets."""
    name = str(value.get("kind")) if isinstance(value, Mapping) else ""
    cls = Strategy.named.get(name)
    if cls is None or name not in cls.aliases:
        return value
    return {**cls.aliases[name], **value, "kind": cls.model_fields["kind"].default}


class _Registered:
    """Pydantic annotation: any registered strategy, told apart by ``kind``, registered after the spec's class too."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_validate)

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(_all_kinds().core_schema)


AnyStrategy = Annotated[Strategy, _Registered]
"""Every strategy that a spec can name, told apart by ``kind``."""
