"""Inputs from which a plan was drawn up, kept to draw it up again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from conservtl.adaptation.preset import TrainingSettings
from conservtl.layers import unwrap
from conservtl.methods import Strategy
from conservtl.plan.extension import Extension
from conservtl.plan.plan import Plan
from conservtl.source.read import Source
from conservtl.source.shared import SharedModel

__all__ = ["Origin", "Structure", "named_source"]


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
