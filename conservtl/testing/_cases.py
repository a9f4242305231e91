"""Models and sources that the contract tries a strategy on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from conservtl.adaptation.adaptation import Adaptation
from conservtl.adaptation.prepare import adapt
from conservtl.layers.copying import deep_copy
from conservtl.methods import Strategy
from conservtl.plan.plan import Plan
from conservtl.source.read import SourceLike
from conservtl.testing.weights import random_weights

__all__ = ["RATE", "Case", "cases", "require"]

RATE = 1e-3
"""Learning rate of the contract's training steps."""


@dataclass(frozen=True)
class Case:
    """A model with a source and an example of its input.

    Args:
        model: is copied.
        source: of ``adapt``.
        example: an input of the model, or None.
        ordered: whether modules are registered in the order of use, so that the example is not needed for it.
    """

    model: nn.Module
    source: SourceLike
    example: Any
    ordered: bool = False

    def adapted(self, strategies: Sequence[Strategy]) -> Adaptation:
        """Return an adaptation of a copy of the model, the same at each call."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            needed = not self.ordered or any(strategy.extends for strategy in strategies)
            example = self.example if needed else None
            adaptation = adapt(deep_copy(self.model), self.source, strategies, example=example)
        adaptation.bound.endings.leave_out()
        return adaptation

    def drawn(self, strategy: Strategy) -> Plan:
        """Return the plan before any strategy, with the parameters that this one adds."""
        return self.adapted([strategy] if strategy.extends else []).origin.drawn


def cases(model: nn.Module | None, source: SourceLike | None, example: Any) -> Iterator[Case]:
    """Yield the caller's case, or without a model two of a small network; arguments as for ``check_strategy``."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if model is not None:
            yield Case(model, random_weights(model, 1) if source is None else source, example)
            return
        weights = random_weights(_network(3), 1)
        for classes in (2, 3):
            yield Case(_network(classes), weights if source is None else source, torch.randn(4, 2, 5, 5), ordered=True)


def _network(classes: int) -> nn.Module:
    """Return a convolutional network of nine layers."""
    parts: list[nn.Module] = []
    for channels in (2, 3, 3):
        parts += [nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()]
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(5):
        parts += [nn.Linear(3, 3), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(3, classes))


def require(holds: bool, strategy: Strategy, rule: str) -> None:
    """Raise an ``AssertionError`` with the rule that a strategy breaks, unless it holds."""
    if not holds:
        raise AssertionError(f"{strategy.label}: {rule}")
