"""A recommendation's parts: strategies, settings and the reasons for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conservtl.errors import counted

__all__ = ["Advice", "Reason", "longer"]


@dataclass(frozen=True)
class Reason:
    """One choice and its reason.

    Args:
        what: distance, side, features, amount, rates, conservation, norms, rate, length.
        reason: one sentence, with its numbers.
    """

    what: str
    reason: str


@dataclass(frozen=True)
class Advice:
    """Strategies and training settings.

    Args:
        strategies: as fields of a spec.
        training: the fields of ``training`` that are chosen.
        choices: the reasons.
    """

    strategies: tuple[dict[str, Any], ...]
    training: dict[str, Any]
    choices: tuple[Reason, ...]


def longer(epochs: int, steps: int, fewest: int) -> str:
    """Return why training takes more epochs than the spec's, each of so many steps.

    >>> print(longer(6, 3, 200))
    The spec's 6 epochs make 18 steps, 3 steps an epoch. At least 200 are needed: 67 epochs.
    """
    made = f"The spec's {counted(epochs, 'epoch', 'makes')} {counted(epochs * steps, 'step')}"
    enough = counted(-(-fewest // steps), "epoch")
    return f"{made}, {counted(steps, 'step')} an epoch. At least {fewest} are needed: {enough}."
