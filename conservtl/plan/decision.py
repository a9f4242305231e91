"""The base of every decision that stands in a plan beside its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from inspect import isabstract
from typing import Any, ClassVar, Self

from pydantic import ModelWrapValidatorHandler, model_validator
from torch import nn

from conservtl.spec_model import FrozenModel, register

__all__ = ["Decision"]


class Decision(FrozenModel, ABC):
    """Base of what stands in a plan beside its rows. A subclass has a ``kind`` with its value as the default."""

    kind: str
    """Tells it apart in a file."""
    by: str
    """The strategy that decided it."""

    kinds: ClassVar[dict[str, type[Decision]]] = {}
    """Every class by its kind, so that a plan can be read back from JSON."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            register(Decision.kinds, cls, kind)

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        own = Decision.kinds.get(value.get("kind", "")) if isinstance(value, dict) else None
        if own is not None and own is not cls and issubclass(own, cls):
            return own.model_validate(value)
        if own is None and isabstract(cls) and isinstance(value, dict):
            raise ValueError(f"there is no {cls.__name__} of kind {value.get('kind')!r}: import its class first")
        return handler(value)

    @property
    def name(self) -> str:
        """What it is called in a plan, which holds no two of one name."""
        return self.kind

    @abstractmethod
    def describe(self) -> str:
        """One line for the plan's table."""

    def check(self, model: nn.Module) -> None:
        """Raise, before anything is changed, if the decision cannot be carried out on a model; by default never."""
