"""Strategies with the training settings that belong to them, as ``adapt`` takes both at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.optim.lr_scheduler import LambdaLR

from conservtl.errors import SpecError
from conservtl.methods import Strategy

__all__ = ["Preset", "TrainingSettings", "optimizer_of", "schedule_of"]


class TrainingSettings(Protocol):
    """Settings of training that an adaptation carries out in any loop: optimizer, schedule and norms."""

    @property
    def batch_norm(self) -> str:
        """train, or eval: statistics of batch norms stay as they are."""

    def make(self) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
        """Return the optimizer class and its keyword arguments."""

    def factor(self, step: int, steps: int) -> float:
        """Return the factor on all rates at a step of ``steps``."""


@runtime_checkable
class Preset(Protocol):
    """Strategies with their training settings, such as a recipe."""

    @property
    def strategies(self) -> Sequence[Strategy]:
        """The strategies."""

    @property
    def training(self) -> TrainingSettings:
        """The settings that belong to them."""


def optimizer_of(
    training: TrainingSettings | None, options: Mapping[str, Any]
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """Return the settings' optimizer class and its options, of which those given here win."""
    cls, usual = _checked(training, "optimizer(torch.optim.AdamW, lr=1e-3)").make()
    return cls, {**usual, **options}


def schedule_of(
    training: TrainingSettings | None, options: Mapping[str, Any]
) -> tuple[Callable[..., LambdaLR], dict[str, Any]]:
    """Return a scheduler class and its options that follow the settings' schedule over ``steps`` optimizer steps."""
    settings = _checked(training, "scheduler(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=100)")
    steps = options.get("steps")
    if options.keys() != {"steps"} or not isinstance(steps, int) or steps < 1:
        raise SpecError(
            "scheduler() without a class follows the training settings, and needs the number of optimizer steps of the "
            f"whole training: scheduler(steps=...); received {dict(options) or 'nothing'}."
        )
    return LambdaLR, {"lr_lambda": lambda step: settings.factor(min(step, steps - 1), steps)}


def _checked(training: TrainingSettings | None, otherwise: str) -> TrainingSettings:
    if training is None:
        raise SpecError(
            "adapt(...) was given strategies without training settings, which a recipe has: pass a class, such as "
            f"{otherwise}."
        )
    return training
