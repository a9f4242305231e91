"""Part of the contract: a strategy is a frozen, documented spec."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import get_args

from pydantic import ValidationError

from conservtl.methods import Strategy
from conservtl.testing._cases import require

__all__ = ["check_spec"]


def check_spec(strategy: Strategy) -> None:
    """Raise unless the strategy is frozen, refuses unknown fields, survives JSON and documents each field."""
    cls = type(strategy)
    fields = strategy.model_dump()
    require(bool(fields.get("kind")), strategy, "has no kind; give it kind: Literal['...'] = '...'.")
    kind = cls.model_fields["kind"]
    constant = get_args(kind.annotation) == (kind.default,) == (fields["kind"],)
    rule = "kind must be a constant, Literal['...'] = '...', so that specs can name it."
    require(constant, strategy, rule)
    require(_refused(lambda: setattr(strategy, "kind", fields["kind"])), strategy, "is not frozen; keep frozen=True.")
    extra = {**fields, "no_such_field": 1}
    require(_refused(lambda: cls(**extra)), strategy, "takes fields that it does not have; keep extra='forbid'.")
    try:
        again: Strategy | str = cls.model_validate_json(strategy.model_dump_json())
    except ValidationError as error:
        again = str(error)
    require(again == strategy, strategy, f"differs after JSON: {again}")
    require(copy.deepcopy(strategy) == strategy, strategy, "a deep copy of it differs.")
    schema = cls.model_json_schema()
    for model, definition in {cls.__name__: schema, **schema.get("$defs", {})}.items():
        for name, field in definition.get("properties", {}).items():
            described = name == "kind" or "description" in field
            fix = "write a docstring under the field, or Field(description=...)."
            require(described, strategy, f"{model}.{name} has no description; {fix}")


def _refused(action: Callable[[], object]) -> bool:
    """Whether an action raises the error of a frozen model or of an unknown field."""
    try:
        action()
    except (ValidationError, AttributeError, TypeError):
        return True
    return False
