"""The optimizer of a run: one that the settings name, one of a package imported by hand, or a class of the caller's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_serializer
from pydantic_core import PydanticCustomError

from conservtl.errors import SpecError
from conservtl.plugins import IMPORTABLE, named_callable
from conservtl.spec_model import FrozenModel, checked
from conservtl.spec_scalars import Arguments

if TYPE_CHECKING:
    from conservtl.engine.training import Training

__all__ = ["Made", "NamedOptimizer", "OptimizerName", "choose_optimizer", "class_name", "made_of"]

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


Made = tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]
"""An optimizer class, or a partial of one, and keyword arguments for it."""


def choose_optimizer(training: Training, given: Any, *, recommended: bool = False) -> Made:
    """Return the optimizer class of a run, and its keyword arguments.

    ``recommended`` settings are a recipe's, whose optimizer another may replace.
    """
    if given is None:
        return training.make()
    name = class_name(given)
    if not callable(given):
        raise SpecError(
            f"optimizer must be a class, such as torch.optim.RMSprop, or a functools.partial of one; received {name} "
            "object. fit makes the optimizer from it."
        )
    if "optimizer" in training.model_fields_set and not recommended:
        raise SpecError(
            f"optimizer={name} and training.optimizer={training.optimizer!r} both name the optimizer. Leave one out."
        )
    return made_of(training, given)


def made_of(training: Training, given: Any) -> Made:
    """Return an optimizer class, or a partial of one, with the settings as its keyword arguments."""
    name = class_name(given)
    options: dict[str, Any] = {"lr": training.lr}
    if training.weight_decay is not None:
        options["weight_decay"] = training.weight_decay
    if training.fused is True:
        options["fused"] = True
    known = inspect.signature(given.func if isinstance(given, functools.partial) else given).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for option in options:
        if option in getattr(given, "keywords", {}):
            raise SpecError(
                f"optimizer: {option} is training.{option}; the partial of {name} has it too "
                f"({given.keywords[option]!r}). Leave it out there, and set training.{option}."
            )
        if option not in known and not anything:
            raise SpecError(f"training.{option} is for the optimizer, but {name} takes no {option}. Use another class.")
    step = getattr(given.func if isinstance(given, functools.partial) else given, "step", None)
    closure = inspect.signature(step).parameters.get("closure") if callable(step) else None
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise SpecError(f"{name} steps with a closure only, and fit calls step(). Use another class.")
    return given, options


def class_name(cls: Any) -> str:
    """Return the dotted name of an optimizer class, of a partial's class, or of an object's class."""
    cls = cls.func if isinstance(cls, functools.partial) else cls
    cls = cls if hasattr(cls, "__qualname__") else type(cls)
    return f"{cls.__module__}.{cls.__qualname__}"
