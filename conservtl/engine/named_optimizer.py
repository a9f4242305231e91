"""An optimizer class that settings name, of a package that the user imports by hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_serializer
from pydantic_core import PydanticCustomError

from conservtl.errors import SpecError
from conservtl.plugins import IMPORTABLE, named_callable
from conservtl.spec_model import FrozenModel, checked
from conservtl.spec_scalars import Arguments

__all__ = ["NamedOptimizer", "OptimizerName"]

_FORM = "'adamw', 'adam' or 'sgd', or {import: package.module:Class, args: {...}}"


class NamedOptimizer(FrozenModel):
    """An optimizer class by name."""

    own: Annotated[str, Field(pattern=IMPORTABLE, alias="import", examples=["package.module:Class"])]
    """The class, as ``package.module:Class``. It is called with the parameters, ``lr`` and ``args`` by keyword. Nothing
    is imported unless ``--import package`` is on the command line."""
    args: Arguments = Field(default_factory=dict)
    """Further arguments."""

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"import": self.own, "args": self.args}

    def load(self) -> functools.partial[Any]:
        """Return the class with its arguments."""
        return functools.partial(named_callable(self.own, "training.optimizer"), **self.args)


def _checked(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        why = ""
        if isinstance(value, Mapping):
            try:
                checked(NamedOptimizer, value, "")
            except SpecError as inner:
                why = "; " + "; ".join(str(inner).splitlines())
        raise PydanticCustomError("optimizer", "Input should be {form}{why}", {"form": _FORM, "why": why}) from error


OptimizerName = Annotated[Literal["adamw", "adam", "sgd"] | NamedOptimizer, WrapValidator(_checked)]
"""One of torch's usual optimizers, or a class by name."""
