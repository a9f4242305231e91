"""Inputs from which a plan was drawn up, kept to draw it up again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from conservtl.adaptation.preset import TrainingSettings
from conservtl.methods import Strategy
from conservtl.plan.extension import Extension
from conservtl.plan.plan import Plan
from conservtl.source.shared import SharedModel

__all__ = ["Origin"]


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
    """

    drawn: Plan
    strategies: tuple[Strategy, ...] = ()
    source_model: nn.Module | SharedModel | None = None
    heads: tuple[str, ...] = ()
    inherited: tuple[Strategy, ...] = ()
    extensions: tuple[Extension, ...] = ()
    training: TrainingSettings | None = None
