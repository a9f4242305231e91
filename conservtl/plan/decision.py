"""The base class of all decisions of a plan beside its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from inspect import isabstract
from typing import Any, ClassVar, Self

from pydantic import ModelWrapValidatorHandler, model_validator
from torch import nn

from conservtl.spec_model import FrozenModel, register

__all__ = ["Decision"]


class Decision(FrozenModel, ABC):
    """Base class of decisions beside the rows: frozen specs that are printed and saved with the plan.

    A subclass has a constant ``kind`` with its value as the default, and methods that carry the decision out on
    tensors. The built-in ones are in the files of their methods; a strategy of your own brings its own.
    """

    kind: str
    """Name of the class in files."""
    by: str
    """The strategy that made the decision."""

    kinds: ClassVar[dict[str, type[Decision]]] = {}
    """Kind -> class, by which a plan is read back from JSON."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            register(Decision.kinds, cls, kind)

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        named = Decision.kinds.get(value.get("kind", "")) if isinstance(value, dict) else None
        if named is not None and named is not cls and issubclass(named, cls):
            return named.model_validate(value)
        if named is None and isabstract(cls) and isinstance(value, dict):
            raise ValueError(f"there is no {cls.__name__} of kind {value.get('kind')!r}: import its class first")
        return handler(value)

    @property
    def name(self) -> str:
        """Name in the plan, which holds no two decisions of one kind and name."""
        return self.kind

    @abstractmethod
    def describe(self) -> str:
        """Return one line for the plan's table."""

    def check(self, model: nn.Module) -> None:
        """Raise, before anything is changed, if the decision cannot be carried out on a model; by default never."""
