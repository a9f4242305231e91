"""Inputs from which a plan is drawn up, training settings among them, kept to draw it up again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from conservtl.errors import SpecError
from conservtl.layers import unwrap
from conservtl.methods import Strategy
from conservtl.plan.decision import Extension
from conservtl.plan.plan import Plan
from conservtl.source.read import Source
from conservtl.source.shared import SharedModel

__all__ = ["Origin", "Preset", "Structure", "TrainingSettings", "named_source", "optimizer_of", "schedule_of"]


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


@dataclass(frozen=True)
class Structure:
    """Arguments of ``adapt`` by which a model's layers are found again.

    Args:
        example: a batch as the model takes it, or None.
        layers: globs, or None.
        head: globs, or None.
    """

    example: Any = None
    layers: Sequence[str] | None = None
    head: Sequence[str] | None = None


def named_source(source: Source) -> str:
    """Return the name of a source; a model that was filled by Hugging Face's library tells where from."""
    config = getattr(unwrap(source.module), "config", None) if source.module is not None else None
    name = getattr(config, "_name_or_path", None) or source.where
    return str(name).removeprefix("source ")


@dataclass(frozen=True)
class Origin:
    """Inputs from which a plan was drawn up.

    Args:
        drawn: the plan before any strategy.
        strategies: in the order they were given.
        source_model: the source model, kept only if a term or a measurement needs it.
        heads: names of the head's modules if the target has labels of its own.
        inherited: strategies of an earlier run whose additions are part of the source's model.
        extensions: of the plan of an earlier run, kept unless a strategy decides about their kind.
        training: settings that came with the strategies, as in a recipe.
        structure: arguments by which the model's layers are found again.
        source: name of the source.
    """

    drawn: Plan
    strategies: tuple[Strategy, ...] = ()
    source_model: nn.Module | SharedModel | None = None
    heads: tuple[str, ...] = ()
    inherited: tuple[Strategy, ...] = ()
    extensions: tuple[Extension, ...] = ()
    training: TrainingSettings | None = None
    structure: Structure = Structure()
    source: str = ""
