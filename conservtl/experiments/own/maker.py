"""Models of runs: copies of one that a program holds, or new ones from its function."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from conservtl.errors import SpecError
from conservtl.experiments.own.options import ModelLike
from conservtl.layers.copying import deep_copy

__all__ = ["maker"]


def maker(model: ModelLike) -> Callable[[], nn.Module]:
    """Return a function that makes a new model, which nothing else holds."""
    if isinstance(model, nn.Module):
        return lambda: deep_copy(model)
    if not callable(model):
        raise SpecError(
            f"model must be a torch.nn.Module, or a function that returns one; received {type(model).__name__}."
        )
    last: list[nn.Module] = []

    def make() -> nn.Module:
        try:
            inspect.signature(model).bind()
        except TypeError as error:
            raise SpecError(
                f"model must be a function without arguments, which is called for each run; calling it: {error}. Pass "
                "lambda: network(...)."
            ) from error
        except ValueError:  # a builtin without a signature
            pass
        made = model()
        if not isinstance(made, nn.Module):
            raise SpecError(f"model() must return a torch.nn.Module; it returns {type(made).__name__}.")
        if last and made is last[0]:
            raise SpecError(
                "model() must return a new model in each call, because every run trains its own; it returns the same "
                "one again. Pass the model itself, which is copied, or build it inside the function."
            )
        last[:] = [made]
        return made

    return make
