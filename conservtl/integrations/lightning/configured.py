"""Optimizers as LightningCLI hands them over."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["class_and_options"]


def class_and_options(made: Any) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer's class and the arguments that differ from its defaults.

    LightningCLI hands over a partial of a function of its own, with the class among its arguments and every default
    written out; a weight decay that nobody asked for would contradict a pull.
    """
    if not isinstance(made, functools.partial):
        return made, {}
    cls = next((argument for argument in made.args if isinstance(argument, type)), made.func)
    known = inspect.signature(cls).parameters
    options = {
        name: value
        for name, value in made.keywords.items()
        if name == "lr"
        or name not in known
        or known[name].default is inspect.Parameter.empty
        or known[name].default != value
    }
    return cls, options
