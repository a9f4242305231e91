"""An optimizer class that settings name, of a package that the user imports by hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_serializer
from pydantic_core import PydanticCustomError

from conservtl.plugins import named_callable
from conservtl.spec_model import FrozenModel
from conservtl.spec_scalars import Arguments

__all__ = ["NamedOptimizer", "OptimizerName"]

_FORM = "'adamw', 'adam' or 'sgd', or {import: package.module:Class, args: {...}}"


class NamedOptimizer(FrozenModel):
    """An optimizer class by name."""

    own: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", alias="import")]
    """The class, as ``package.module:Class``. It is called with the parameters, ``lr`` and ``args`` by keyword. Nothing
    is imported unless ``--import package`` is on the command line."""
    args: Arguments = Field(default_factory=dict)
    """Further arguments."""

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"import": self.own, "args": self.args}

    def load(self) -> functools.partial[Any]:
        """Return the class with its arguments.

        Raises:
            SpecError: its package was not imported by hand, or has no such class.
        """
        return functools.partial(named_callable(self.own, "training.optimizer"), **self.args)


def _checked(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        if isinstance(value, Mapping):
            first = error.errors()[-1]
            where = ".".join(str(part) for part in first["loc"] if part != "NamedOptimizer")
            raise PydanticCustomError(
                "optimizer",
                "Input should be {form}; {where}: {why}",
                {"form": _FORM, "where": where, "why": first["msg"]},
            ) from error
        raise PydanticCustomError("optimizer", "Input should be {form}", {"form": _FORM}) from error


OptimizerName = Annotated[Literal["adamw", "adam", "sgd"] | NamedOptimizer, WrapValidator(_checked)]
"""One of torch's usual optimizers, or a class by name."""
