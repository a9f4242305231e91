"""Instances of Pydantic models, drawn within the bounds of their fields."""

from __future__ import annotations

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from hypothesis import reject
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from conservtl.errors import SpecError

__all__ = ["instances", "specs"]

Model = TypeVar("Model", bound=BaseModel)

_TEXT = st.text("abcdefgXYZ0189_-éß語", min_size=1, max_size=8)
_SCALARS = st.none() | st.booleans() | st.integers(-99, 99) | _TEXT
_LARGEST = 1000.0


def instances(cls: type[Model], /, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Model]:
    """Valid instances of a Pydantic model; each optional field is drawn or left at its default.

    ``st.builds`` would leave every optional field at its default, and ``st.from_type`` does not know the
    bounds that Pydantic keeps. Where a draw breaks a rule between fields, the optional fields that break it
    go back to their defaults.

    Args:
        cls: the model.
        fields: how to draw some fields, where their types say too little.

    Example:
        >>> from conservtl import L2SP
        >>> isinstance(instances(L2SP).filter(lambda s: s.mode == "decoupled"), st.SearchStrategy)
        True
    """
    return _instance(cls, fields)


def specs() -> st.SearchStrategy[BaseModel]:
    """Specs of both tasks, as ``conservtl run`` takes them; no file they name exists."""
    from conservtl.experiments.spec.spec import SpeechSpec, VisionSpec

    return st.one_of(instances(SpeechSpec), instances(VisionSpec))


@st.composite
def _instance(draw: st.DrawFn, cls: type[Model], given: dict[str, st.SearchStrategy[Any]]) -> Model:
    values: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if name in given:
            values[name] = draw(given[name])
        elif field.is_required() or draw(st.booleans()):
            values[name] = draw(_values(field.annotation, tuple(field.metadata)))
    while True:
        try:
            return cls(**values)
        except ValidationError as error:
            broken = {str(e["loc"][0]) for e in error.errors() if e["loc"]} or set(values)
            back = {n for n in broken if n in values and not cls.model_fields[n].is_required()}
            if not back:
                reject()
            values = {name: value for name, value in values.items() if name not in back}


def _values(kind: Any, rules: Iterable[Any] = ()) -> st.SearchStrategy[Any]:
    """Values of an annotation, within the bounds that ``Annotated`` and ``Field`` give."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _values(args[0], (*rules, *_unpacked(args[1:])))
    if origin in (Union, types.UnionType):
        return st.one_of([_values(arm, rules) for arm in args])
    if origin is Literal:
        return st.sampled_from(args)
    least = _bound(rules, "min_length") or 0
    if origin is tuple:
        if args[1:] == (...,):
            return st.lists(_values(args[0]), min_size=least, max_size=least + 2).map(tuple)
        return st.tuples(*map(_values, args))
    if origin is dict:
        return st.dictionaries(_values(args[0]), _values(args[1]), min_size=least, max_size=2)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return st.deferred(lambda: instances(kind))
    return _scalars(kind, rules)


def _scalars(kind: Any, rules: Iterable[Any]) -> st.SearchStrategy[Any]:
    low, high = _bound(rules, "ge", "gt"), _bound(rules, "le", "lt")
    if kind is type(None):
        return st.none()
    if kind is bool:
        return st.booleans()
    if kind is int:
        low = 0 if low is None else low
        found: st.SearchStrategy[Any] = st.integers(int(low), int(high if high is not None else low + 20))
    elif kind is float:
        found = st.floats(
            -_LARGEST if low is None else low, _LARGEST if high is None else high, allow_subnormal=False, width=64
        )
    elif kind is str:
        return _TEXT
    elif kind is Path:
        return _TEXT.map(Path)
    elif kind is Any:
        return _SCALARS
    else:
        raise SpecError(f"instances: no values are known for fields of type {kind!r}. Pass how to draw them.")
    over, under = _bound(rules, "gt"), _bound(rules, "lt")
    return found.filter(lambda value: (over is None or value > over) and (under is None or value < under))


def _unpacked(metadata: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(rule for item in metadata for rule in (item.metadata if isinstance(item, FieldInfo) else [item]))


def _bound(rules: Iterable[Any], *names: str) -> Any:
    found = (getattr(rule, name, None) for rule in rules for name in names)
    return next((value for value in found if value is not None), None)
