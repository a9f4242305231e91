"""Instances of Pydantic models, drawn within the bounds of their fields."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from hypothesis import reject
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from conservtl.errors import SpecError
from conservtl.methods.base import Span, Strategy
from conservtl.methods.registry import builtin_strategies

__all__ = ["FieldRanges", "instances", "instances_within", "specs"]

Model = TypeVar("Model", bound=BaseModel)

_TEXT = st.text("abcdefgXYZ0189_-éß語", min_size=1, max_size=8)
_SCALARS = st.none() | st.booleans() | st.integers(-99, 99) | _TEXT


@dataclass(frozen=True)
class FieldRanges:
    """Ranges of values that the types of fields leave open.

    Args:
        text: values of strings.
        keys: keys of dictionaries.
        largest: largest magnitude of floats without a bound.
        tested: whether a class's ``test_fields`` narrow its fields.
    """

    text: st.SearchStrategy[str] = _TEXT
    keys: st.SearchStrategy[str] = _TEXT
    largest: float = 1000.0
    tested: bool = False


def instances(cls: type[Model], /, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Model]:
    """Draw valid instances of a Pydantic model; each optional field is drawn or left at its default.

    ``st.builds`` would leave every optional field at its default, and ``st.from_type`` does not know Pydantic's
    bounds. If a draw breaks a rule between fields, the optional fields that break it take their defaults.

    Args:
        cls: the model.
        fields: how to draw some fields, if their types say too little.

    Example:
        >>> from hypothesis import given, settings, strategies as st
        >>> from conservtl import L2SP
        >>> from conservtl.testing import instances
        >>> @settings(max_examples=5)
        ... @given(instances(L2SP, alpha=st.floats(0, 2)))
        ... def test_alpha_is_drawn_as_asked(strategy):
        ...     assert 0 <= strategy.alpha <= 2
        >>> test_alpha_is_drawn_as_asked()
    """
    return _instance(cls, fields, FieldRanges())


def instances_within(cls: type[Model], ranges: FieldRanges) -> st.SearchStrategy[Model]:
    """Draw instances as ``instances`` does, within narrower ranges."""
    return _instance(cls, {}, ranges)


def specs() -> st.SearchStrategy[BaseModel]:
    """Draw specs of the built-in tasks, as ``conservtl run`` takes them; the files that they name do not exist.

    Example:
        >>> from hypothesis import given, settings
        >>> from conservtl.testing import specs
        >>> @settings(max_examples=5, deadline=None)
        ... @given(specs())
        ... def test_a_spec_survives_json(spec):
        ...     assert type(spec).model_validate_json(spec.model_dump_json()) == spec
        >>> test_a_spec_survives_json()
    """
    from conservtl.experiments.spec.spec import spec_class

    return st.one_of(*(instances(spec_class(name)) for name in ("speech", "vision")))


@st.composite
def _instance(
    draw: st.DrawFn, cls: type[Model], given: Mapping[str, st.SearchStrategy[Any]], ranges: FieldRanges
) -> Model:
    narrowed = draw(st.sampled_from(getattr(cls, "test_fields", ({},)))) if ranges.tested else {}
    values: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if name in given:
            values[name] = draw(given[name])
        elif name in narrowed:
            values[name] = draw(_narrowed(narrowed[name], ranges))
        elif field.is_required() or draw(st.booleans()):
            values[name] = draw(_values(field.annotation, tuple(field.metadata), ranges))
    while True:
        try:
            return cls(**values)
        except ValidationError as error:
            broken = {str(e["loc"][0]) for e in error.errors() if e["loc"]} or set(values)
            reset = {n for n in broken if n in values and not cls.model_fields[n].is_required()}
            if not reset:
                reject()
            values = {name: value for name, value in values.items() if name not in reset}


def _narrowed(choice: Any, ranges: FieldRanges) -> st.SearchStrategy[Any]:
    """Draw a value of ``Strategy.test_fields``."""
    if isinstance(choice, Span):
        return st.floats(choice.low, choice.high, allow_subnormal=False)
    if isinstance(choice, range):
        return st.sampled_from(choice)
    if isinstance(choice, list):
        return st.one_of([_narrowed(each, ranges) for each in choice])
    if isinstance(choice, tuple):
        return st.tuples(*(_narrowed(each, ranges) for each in choice))
    if isinstance(choice, dict):
        ((_, value),) = choice.items()
        return st.dictionaries(ranges.keys, _narrowed(value, ranges), min_size=1, max_size=3)
    if isinstance(choice, type) or get_origin(choice) is not None:
        return _values(choice, (), ranges)
    return st.just(choice)


def _values(kind: Any, rules: Iterable[Any], ranges: FieldRanges) -> st.SearchStrategy[Any]:
    """Draw values of an annotation, within the bounds that ``Annotated`` and ``Field`` give."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _values(args[0], (*rules, *_unpacked(args[1:])), ranges)
    if origin in (Union, types.UnionType):
        return st.one_of([_values(arm, rules, ranges) for arm in args])
    if origin is Literal:
        return st.sampled_from(args)
    least = _bound(rules, "min_length") or 0
    if origin is tuple:
        if args[1:] == (...,):
            distinct = args[0] is str
            return st.lists(_values(args[0], (), ranges), min_size=least, max_size=least + 2, unique=distinct).map(
                tuple
            )
        return st.tuples(*(_values(arg, (), ranges) for arg in args))
    if origin is dict:
        return st.dictionaries(ranges.keys, _values(args[1], (), ranges), min_size=least, max_size=2)
    if kind is Strategy:
        return st.sampled_from(list(builtin_strategies().values())).flatmap(lambda cls: _instance(cls, {}, ranges))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return st.deferred(lambda: _instance(kind, {}, ranges))
    return _scalars(kind, rules, ranges)


def _scalars(kind: Any, rules: Iterable[Any], ranges: FieldRanges) -> st.SearchStrategy[Any]:
    low, high = _bound(rules, "ge", "gt"), _bound(rules, "le", "lt")
    if kind is type(None):
        return st.none()
    if kind is bool:
        return st.booleans()
    if kind is int:
        low = 0 if low is None else low
        numbers: st.SearchStrategy[Any] = st.integers(int(low), int(high if high is not None else low + 20))
    elif kind is float:
        least = -ranges.largest if low is None else low
        numbers = st.floats(least, ranges.largest if high is None else high, allow_subnormal=False, width=64)
    elif kind is str:
        return ranges.text
    elif kind is Path:
        return _TEXT.map(Path)
    elif kind is Any:
        return _SCALARS
    else:
        raise SpecError(f"instances: no values are known for fields of type {kind!r}. Pass how to draw them.")
    above, below = _bound(rules, "gt"), _bound(rules, "lt")
    return numbers.filter(lambda value: (above is None or value > above) and (below is None or value < below))


def _unpacked(metadata: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(rule for item in metadata for rule in (item.metadata if isinstance(item, FieldInfo) else [item]))


def _bound(rules: Iterable[Any], *names: str) -> Any:
    bounds = (getattr(rule, name, None) for rule in rules for name in names)
    return next((value for value in bounds if value is not None), None)
