"""The options of a study of one's own problem, and the checks of their types."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, get_args

import torch
from pydantic import ValidationError
from torch import nn

from conservtl.bounds import is_number
from conservtl.engine import Training
from conservtl.errors import SpecError, did_you_mean
from conservtl.experiments.own.settings import OwnData
from conservtl.functions import Forward, Loss, Metrics
from conservtl.layers import check_globs
from conservtl.tasks.base import Shift

__all__ = ["ModelLike", "ProblemOptions", "check_options"]

ModelLike = nn.Module | Callable[[], nn.Module]
"""A model, which is copied for each run and left as it is; or a function that returns a new one."""


class ProblemOptions(TypedDict, total=False):
    """What a study may know of a problem beside model, source and data; every entry is optional."""

    valid: Any
    """Examples to select on, never a test part; or the part of ``train`` to select on, such as 0.2."""
    source_data: Any
    """Source examples for joint training, the distance of the domains, and measurements such as a Fisher."""
    shots: int | None
    """Examples of each class to adapt with, drawn anew for each seed; None: all of ``train``."""
    labels: tuple[Sequence[Any], Sequence[Any]] | None
    """As for ``adapt``: the labels of the model's and of the source's outputs, in order."""
    fresh: str | Sequence[str] | Mapping[str, str]
    """As for ``adapt``."""
    allow: Sequence[str]
    """As for ``adapt``."""
    layers: Sequence[str] | None
    """As for ``adapt``."""
    head: Sequence[str] | None
    """As for ``adapt``."""
    example: Any
    """As for ``adapt``; without it the inputs of the first examples."""
    key: str | None
    """As for ``adapt``."""
    prefix: str | None
    """As for ``adapt``."""
    rename: Mapping[str, str] | None
    """As for ``adapt``."""
    forward: Forward
    """As for ``fit``."""
    loss: Loss
    """As for ``fit``."""
    metrics: Metrics
    """As for ``fit``; ``training.select`` names the one that runs are judged by, if it is not the accuracy."""
    augment: Callable[[Any, torch.Generator], Any] | None
    """As for ``fit``."""
    proxies: Callable[[Any, torch.Generator], Any] | None
    """As for ``fit``; variants that compare nothing with the source go without."""
    optimizer: Any
    """As for ``fit``."""
    shift: Shift
    """How the target differs from a source of the same labels, for a recommendation: ``"input"`` or ``"speaker"``."""
    usual_lr: float
    """A rate that fits the model, for a recommendation."""


def check_options(training: Any, options: ProblemOptions) -> None:
    """Raise unless options are known, and settings, functions and number of shots have their types."""
    if unknown := sorted(options.keys() - ProblemOptions.__annotations__.keys()):
        names = ProblemOptions.__annotations__
        raise SpecError(f"{unknown[0]!r} is none of the options {', '.join(names)}.{did_you_mean(unknown[0], names)}")
    if training is not None and not isinstance(training, Training):
        raise SpecError(
            f"training must be a ctl.Training; received {type(training).__name__}. Write ctl.Training(epochs=...)."
        )
    for name in ("forward", "loss", "metrics", "augment", "proxies"):
        value = options.get(name)
        if not callable(value) and (value is not None or (name not in ("augment", "proxies") and name in options)):
            raise SpecError(
                f"{name} must be a function, as for fit; received {value!r:.60}. Pass one, or leave it out."
            )
    for name in ("fresh", "allow", "layers", "head"):
        check_globs(name, options.get(name), text=name == "fresh")
    if (shift := options.get("shift", "input")) not in get_args(Shift):
        raise SpecError(f"shift must be one of {', '.join(get_args(Shift))}; received {shift!r:.60}. Give one of them.")
    rate = options.get("usual_lr")
    if rate is not None and not (is_number(rate) and 0 < rate < math.inf):
        raise SpecError(f"usual_lr must be a finite rate above 0; received {rate!r}. Give one, or leave it out.")
    shots = options.get("shots")
    try:
        OwnData(shots="all" if shots is None else shots)
    except ValidationError as error:
        raise SpecError(
            f"shots must be a number of examples of each class, 1 at least, or 'all', or {{'up_to': a number}}; "
            f"received {shots!r:.60}. Give one, or leave it out to adapt with all of train."
        ) from error
