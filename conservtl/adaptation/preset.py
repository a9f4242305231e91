"""Strategies with the training settings that belong to them, as ``adapt`` takes both at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from conservtl.methods import Strategy

__all__ = ["Preset", "TrainingSettings"]


class TrainingSettings(Protocol):
    """Settings of training that an adaptation carries out in any loop: optimizer, schedule and norms."""

    @property
    def batch_norm(self) -> str:
        """train, or eval: statistics of batch norms stay as they are."""

    def make(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
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
